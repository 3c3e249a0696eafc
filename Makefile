# Every target sets up what it needs, in a virtual environment of its own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles a file when it first imports it. All files of an environment would take pip half a minute of a core.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
# Where it may not keep that (a setting of many containers), each process compiles PyTorch anew, for seconds; tests start
# hundreds.
export PYTHONDONTWRITEBYTECODE :=

# The oldest and the newest PyTorch that pyproject.toml allows; each has an environment beside .venv.
OLDEST := 2.11.0
NEWEST := 2.14.1

# An environment beside .venv finds there what it has not got itself: pip installs what differs, and writes 2 GB less.
BESIDE = test -x $(@D)/bin/python || $(BIN)/python -m venv $(@D); \
	$(@D)/bin/python -c "import sysconfig; own = sysconfig.get_path('purelib'); \
	open(own + '/beside.pth', 'w').write(own.replace('$(@D)', '$(VENV)'))"

# What leans on parts of PyTorch that change: collectives, launchers, compiled graphs, hooks of autograd, FSDP2,
# checkpoints. In these files tests are marked any_pytorch that take long and do not.
LEANS_ON_PYTORCH := $(addprefix tests/test_,arguments.py aside.py attention.py checkpoint.py compiled.py data_parallel.py \
	exchange.py finite.py launchers.py mixing.py recompute.py saver.py schemes.py softmax.py tensor_parallel.py \
	verify.py)
FAST := $(addprefix tests/test_,api.py arguments.py data.py decay.py exchange.py layering.py loss.py)

# Some files at once, each in one process from its first test to its last: tests of a file share what takes long. How
# many, and in which order, is said by tests/conftest.py.
WORKERS ?= auto
PYTEST = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PRECIOUS: .venv-torch-%/.installed
# What needs libraries that must not be beside the others: transformers takes fla's kernels wherever it finds them, and
# these need a GPU.
OTHERS := $(addprefix tests/test_,fla.py trl.py peft.py loops.py)

.PHONY: demo install test test-all test-fast test-matrix test-newest test-others test-docs environments browser lint bench \
	docs doctor clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[train,transformers,dev]'
	touch $@

# The oldest PyTorch brings Triton 3.6, whose interpreter fails with numpy 2.4.
.venv-torch-%/.installed: $(VENV)/.installed
	$(BESIDE)
	grep -v -E '^(torch|triton$(if $(filter $(OLDEST),$*),|numpy))==' constraints.txt > $(@D)/constraints.txt
	$(if $(filter $(OLDEST),$*),echo 'numpy<2.4' >> $(@D)/constraints.txt)
	$(@D)/bin/python $(INSTALL) -c $(@D)/constraints.txt -e '.[train,transformers,dev]' torch==$*
	$(@D)/bin/python $(INSTALL) -c $(@D)/constraints.txt --ignore-installed --no-deps mpi4py mpich  # found beside Python
	touch $@

install: $(VENV)/.installed  ## what most targets need

demo: $(VENV)/.installed  ## train a small TransNormerLLM on two ranks and compare it with one process
	$(BIN)/python examples/train.py --verify
	@echo 'It goes on with text of yours: $(BIN)/python examples/complete.py'

test: lint test-all  ## lint, types, tests

test-all: $(VENV)/.installed
	$(BIN)/python $(PYTEST)

test-fast: $(VENV)/.installed  ## within a minute what concerns most changes; CONTRIBUTING.md says what it leaves out
	$(BIN)/python $(PYTEST) $(FAST)

test-matrix: test-torch-$(OLDEST) test-torch-$(NEWEST)  ## all tests on the oldest and the newest PyTorch

test-torch-%: .venv-torch-%/.installed
	.venv-torch-$*/bin/python $(PYTEST)

test-newest: .venv-torch-$(NEWEST)/.installed  ## on the newest PyTorch what leans on its insides
	.venv-torch-$(NEWEST)/bin/python $(PYTEST) -m 'not any_pytorch' $(LEANS_ON_PYTORCH)

.venv-others/.installed: $(VENV)/.installed
	$(BESIDE)
	$(@D)/bin/python $(INSTALL) -c constraints.txt -e '.[transformers,fla,others,dev]'
	touch $@

test-others: .venv-others/.installed  ## layers of fla, TRL's trainers, Lightning Fabric
	.venv-others/bin/python $(PYTEST) $(OTHERS)

.venv-docs/.installed: $(VENV)/.installed
	$(BESIDE)
	$(@D)/bin/python $(INSTALL) -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv-docs/.installed  ## the pages as a site, site/index.html
	.venv-docs/bin/python docs/build_site.py

test-docs: docs  ## that site: links, pictures, search, the reference; in Chromium, if there is one
	.venv-docs/bin/python -m pytest tests/test_site.py

environments: $(VENV)/.installed  ## what test-newest, -others and -docs need: one after the other, as all build lasp here
	$(MAKE) .venv-torch-$(NEWEST)/.installed
	$(MAKE) .venv-others/.installed
	$(MAKE) .venv-docs/.installed

# Without one test-docs looks at the files alone, and says so.
browser:
	command -v chromium || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) || \
		echo 'no Chromium could be had'

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

doctor: $(VENV)/.installed  ## does this machine work?
	$(BIN)/python -m lasp doctor

bench: $(VENV)/.installed  ## the CPU benchmarks; the others name their hardware in bench/README.md
	$(BIN)/python bench/reference.py

clean:
	rm -rf $(VENV) .venv-torch-* .venv-others .venv-docs site build *.egg-info kernels/*.egg-info
