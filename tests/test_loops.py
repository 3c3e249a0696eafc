"""The examples for other libraries' loops: on two ranks the losses, gradient norms and weights of one process."""

import re

import pytest
from processes import ROOT
from scripts import run_script


def numbers_of(text):
    return [float(x) for x in re.findall(r"(?:loss|norm|weights) (\d+\.\d+)", text)]


@pytest.mark.timeout(400)  # of a loaded machine, on which each rank imports all this
@pytest.mark.parametrize(
    ("name", "package"), [("with_accelerate.py", "accelerate"), ("with_fabric.py", "lightning_fabric")]
)
def test_a_loop_gives_the_same_on_two_ranks(name, package):
    pytest.importorskip("transformers", reason="needs the extra `transformers`")
    pytest.importorskip(package)
    code = "import os; os.environ['OMP_NUM_THREADS'] = '1'; "  # a forked process hangs with threads of its own
    code += f"import runpy; runpy.run_path({str(ROOT / 'examples' / name)!r}, run_name='__main__')"
    [(code_alone, alone, error)] = run_script(code, 1, limit=180.0)
    assert code_alone == 0, error
    ranks = run_script(code, 2, limit=180.0)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    expected, found = numbers_of(alone), numbers_of(ranks[0][1])
    assert len(expected) == 3 * 8 * 2 + 1
    assert expected[-3] < 0.9 * expected[0]  # it learns
    assert found == pytest.approx(expected, rel=2e-5, abs=2e-5)
    assert numbers_of(ranks[1][1]) == []  # rank 0 alone prints
