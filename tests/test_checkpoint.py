"""The example's checkpoints: the same bits on other ranks and under other schemes, no code, no byte changed unseen."""

import functools
import hashlib
import json
import os
import pickle
import shutil
from unittest import mock

import _checkpoint
import pytest
import torch
import torch.distributed as dist
from _files import FileError, NotWritten, on_all_ranks, on_rank_0, write
from ranks import mesh_of, run_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from scripts import run_script
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2


class Odd(nn.Module):
    """Sizes that no number of ranks divides, a last layer with fewer rows than ranks, and a number that is a buffer."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 2)])
        self.scale = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(seed))


def _mesh():
    """Of four ranks, in two copies."""
    return mesh_of(dp_replicate=2 if dist.get_world_size() == 4 else 1, dp_shard=1, sp=-1)


def _wrapped(seed, scheme):
    model = Odd(seed)
    return wrap_ddp(model, _mesh()) if scheme == "ddp" else wrap_fsdp2(model, _mesh(), blocks=model.blocks)


def _both(seed, scheme, **settings):
    """Model and optimizer."""
    model, make = Odd(seed), functools.partial(torch.optim.AdamW, **settings)
    return lasp.data_parallel(model, _mesh(), scheme=scheme, optimizer=make, blocks=model.blocks)


def _step(model, optimizer):
    """With gradients that are random, and alike on all ranks."""
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        whole = torch.randn(p.shape, dtype=p.dtype, generator=draw)
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole
    optimizer.step()


def _whole(model, optimizer):
    """All that is to be kept, by name, in whole tensors: the same for every scheme."""
    weights, moments = get_state_dict(model, optimizer, options=_checkpoint.FLAT)
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in (weights | moments).items()}


def _merged(of_ranks):
    """What all ranks hold together, and hold alike: of ZeRO-1's states each has some."""
    merged = {name: x for found in of_ranks for name, x in found.items()}
    for found in of_ranks:
        _assert_same(found, {name: merged[name] for name in found})
    return merged


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x) if isinstance(x, torch.Tensor) else found[name] == x, name


def _save(folder, scheme, steps=2):
    model, optimizer = _both(1, scheme, lr=0.125, betas=(0.5, 0.75))
    for _ in range(steps):
        _step(model, optimizer)
    _checkpoint.save(folder, steps, model, optimizer)
    return _whole(model, optimizer)


def _load(folder, scheme):
    model, optimizer = _both(2, scheme, lr=1.0)
    assert _checkpoint.load(folder, model, optimizer) == 2
    return _whole(model, optimizer)


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ((2, "ddp"), (2, "ddp")),
        ((3, "fsdp2"), (3, "fsdp2")),
        ((2, "ddp"), (3, "fsdp2")),
        ((3, "fsdp2"), (1, "ddp")),
        ((1, "ddp"), (2, "fsdp2")),
        ((3, "fsdp2"), (2, "fsdp2")),
        ((3, "zero1"), (3, "zero1")),
        ((4, "zero1"), (3, "zero3")),  # in copies
        ((4, "hsdp"), (4, "zero1")),
        ((2, "zero2"), (4, "hsdp")),
        ((4, "hsdp"), (2, "ddp-legacy")),
        ((2, "ddp-legacy"), (2, "zero2")),
    ],
)
def test_every_bit_comes_back_on_other_ranks_and_under_other_schemes(tmp_path, saving, loading):
    expected = _merged(run_ranks(saving[0], _save, tmp_path, saving[1]))
    of_ranks = run_ranks(loading[0], _load, tmp_path, loading[1])
    for found in of_ranks if loading[1] != "zero1" else [_merged(of_ranks)]:
        _assert_same(found, expected)
    assert expected["param_groups.scale.betas"] == (0.5, 0.75)
    assert expected["state.scale.step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-000002"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of two ranks, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, _save, folder, "fsdp2")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def _refused(folder, kind, *words):
    with pytest.raises(kind) as caught:
        _load(folder, "ddp")
    assert all(word in str(caught.value) for word in words), caught.value


FILES = (
    "SHA256SUMS",
    "values.json",
    "shard-00001-model-00001-of-00001.safetensors",
    "shard-00002-model-00001-of-00001.safetensors",
)


def test_a_checkpoint_is_these_files(saved):
    assert sorted(path.name for path in (saved / "step-000002").iterdir()) == sorted(FILES)


@pytest.mark.any_pytorch
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["first byte", "middle byte", "last byte", "cut", "empty", "missing"])
def test_a_changed_file_is_an_error_that_names_it(copy, name, fault):
    file = copy / "step-000002" / name
    data = bytearray(file.read_bytes())
    places = {"first byte": 0, "middle byte": len(data) // 2, "last byte": len(data) - 1}
    if fault in places:
        data[places[fault]] ^= 1
    elif fault == "cut":
        del data[len(data) - 70 :]
    else:
        data.clear()
    file.write_bytes(data)
    if fault == "missing":
        file.unlink()
    # A fault of the sums themselves shows at the file that they no longer fit.
    gone = name == "SHA256SUMS" and fault not in ("missing", "empty")
    run_ranks(2, _refused, copy, ValueError, "step-000002" if gone else str(file))


def test_a_part_of_another_checkpoint_is_an_error(copy):
    folder = copy / "step-000002"
    shutil.copy(folder / FILES[2], folder / "shard-00003-model-00001-of-00001.safetensors")
    run_ranks(2, _refused, copy, ValueError, "shard-00003", "not of this checkpoint")


@pytest.mark.any_pytorch
@pytest.mark.parametrize("name", ["../copy/step-000002", "/tmp", "..", ".", "", "step-000002/", "step-2\nstep-3"])
def test_the_newest_checkpoint_lies_in_the_folder(copy, name):
    (copy / "LATEST").write_text(name)
    run_ranks(1, _refused, copy, ValueError, "LATEST", repr(name))


class _Touches:
    """Pickled as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def _sign(folder):
    """Whoever writes a checkpoint can write the sums as well."""
    names = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".json")]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.any_pytorch
@pytest.mark.parametrize("name", [*FILES, "LATEST"])
def test_a_pickle_in_place_of_a_file_is_not_run(copy, tmp_path, name):
    folder, made = copy / "step-000002", tmp_path / "made"
    pickle.loads(pickle.dumps(_Touches(str(made)))).close()  # that is what it does where it is unpickled
    made.unlink()
    (copy / "LATEST" if name == "LATEST" else folder / name).write_bytes(pickle.dumps(_Touches(str(made)), protocol=0))
    if name not in ("SHA256SUMS", "LATEST"):
        _sign(folder)
    run_ranks(2, _refused, copy, FileError, str(copy))
    assert not made.exists()


def test_pickles_beside_the_files_are_not_read(copy, tmp_path):
    """Under names that PyTorch's other formats have."""
    made = tmp_path / "made"
    for name in (".metadata", "__0_0.distcp", "model.pt", "step-000002.pkl"):
        (copy / "step-000002" / name).write_bytes(pickle.dumps(_Touches(str(made))))
    run_ranks(2, _load, copy, "fsdp2")
    assert not made.exists()


def test_options_that_this_run_does_not_know_are_an_error(copy):
    values = copy / "step-000002" / "values.json"
    values.write_text(json.dumps({**json.loads(values.read_text()), "optimizer.param_groups.scale.other": 1}))
    _sign(values.parent)
    run_ranks(2, _refused, copy, ValueError, "values.json", "optimizer.param_groups.scale.other")


def _interrupted(folder):
    """A save that ends before the folder gets its name."""
    model = _wrapped(3, "ddp")
    optimizer = torch.optim.AdamW(model.parameters())
    with mock.patch.object(_checkpoint.os, "replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        _checkpoint.save(folder, 4, model, optimizer)


def test_an_interrupted_save_leaves_the_checkpoint_before_it(copy, saved):
    run_ranks(1, _interrupted, copy)
    assert (copy / "step-000004.partial").exists()
    assert not (copy / "step-000004").exists()
    [found], [expected] = (run_ranks(1, _load, folder, "ddp") for folder in (copy, saved))
    _assert_same(found, expected)
    run_ranks(1, _save, copy, "ddp", 4)  # and what it left is in nobody's way
    assert (copy / "LATEST").read_text() == "step-000004"


def test_what_interrupted_saves_left_is_removed_when_the_next_is_saved_or_loaded(copy):
    """And never what came to its end, nor a folder of another name."""
    kept = ["LATEST", "step-000002", "step-000003", "step-2.partial.mine"]
    for load in (_save, _load):
        for name in ("step-000001.partial", "step-000005.partial", "step-000007.old.partial", *kept[2:]):
            (copy / name / "within").mkdir(parents=True, exist_ok=True)
        (copy / "step-000009.partial").write_text("a file")
        run_ranks(2, load, copy, "ddp")
        assert sorted(path.name for path in copy.iterdir()) == kept


def _change(folder, change):
    """Rewrite each tensor, its place and its name as `change` says, as a stranger would who also writes the sums."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        places = json.loads(metadata["DCP_SHARDING_INFO"])
        found = [change(name, x, places[name]["saved_offsets"]) for name, x in tensors.items()]
        tensors = {name: x.contiguous() for name, x, _ in filter(None, found)}
        places = {name: {"saved_offsets": place} for name, _, place in filter(None, found)}
        save_file(tensors, file, {**metadata, "DCP_SHARDING_INFO": json.dumps(places)})
    _sign(folder)


WEIGHT = "model.blocks.0.weight"  # [7, 5]; of two ranks the first has rows 0 to 3
CHANGES = {
    "nothing": lambda x, at: (x, at),
    "one NaN": lambda x, at: (torch.where(torch.arange(5) == 3, torch.nan, x), at),
    "one Inf": lambda x, at: (torch.where(torch.arange(5) == 3, -torch.inf, x), at),
    "another dtype": lambda x, at: (x.double(), at),
    "a row less": lambda x, at: (x[1:], at),
    "a row more": lambda x, at: (torch.cat([x, x[:1]]), at),
    "a column less": lambda x, at: (x[:, 1:], at),
    "flat": lambda x, at: (x.flatten(), at[:1]),
    "one dimension more": lambda x, at: (x[None], [0, *at]),
    "all parts at the first row": lambda x, at: (x, [0, 0]),
    "no part at the first row": lambda x, at: (x, [at[0] + 1, 0]),
    "before the first row": lambda x, at: (x, [at[0] - 1, 0]),
    "in another column": lambda x, at: (x, [at[0], 1]),
    "a place of text": lambda x, at: (x, "00"),
    "a place of fractions": lambda x, at: (x, [float(at[0]), 0.0]),
    "no place": lambda x, at: (x, None),
    "nowhere": lambda x, at: None,
    "half of it nowhere": lambda x, at: None if at[0] else (x, at),
}


@pytest.mark.any_pytorch
@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_a_stranger_has_changed(copy, saved, change):
    """With sums that fit. Only what is the same, and finite, is taken; anything else names the tensor."""

    def changed(name, x, at):
        if name != WEIGHT:
            return name, x, at
        found = CHANGES[change](x, at)
        return found and (name, *found)

    _change(copy / "step-000002", changed)
    if change == "nothing":
        [found, _], [expected, _] = (run_ranks(2, _load, folder, "ddp") for folder in (copy, saved))
        return _assert_same(found, expected)
    run_ranks(2, _refused, copy, FileError, str(copy / "step-000002"), WEIGHT)


@pytest.mark.parametrize("change", ["another name", "one more", "of the optimizer"])
def test_other_tensors_than_those_of_this_run(copy, change):
    def changed(name, x, at):
        if change == "of the optimizer" and name == "optimizer.state.scale.exp_avg":
            return name, x * torch.inf, at
        return (name.replace("scale", "scales") if change == "another name" else name), x, at

    folder = copy / "step-000002"
    if change == "one more":
        info = {"DCP_SHARDING_INFO": json.dumps({"model.other": {"saved_offsets": [0]}})}
        save_file({"model.other": torch.ones(2)}, folder / "shard-00003-model-00001-of-00001.safetensors", info)
    _change(folder, changed)
    words = {"another name": "model.scales", "one more": "model.other", "of the optimizer": "state.scale.exp_avg"}
    run_ranks(2, _refused, copy, FileError, str(folder), words[change])


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"", "header"),
        (b"\xff" * 8, "header"),
        ((2**62).to_bytes(8, "little") + b"{}", "header"),
        ((2).to_bytes(8, "little") + b"{}", "DCP_SHARDING_INFO"),
        ((2).to_bytes(8, "little") + b"[]", "header"),
        ((40).to_bytes(8, "little") + b'{"__metadata__":{"DCP_SHARDING_INFO":1}}', "header"),
        ((46).to_bytes(8, "little") + b'{"__metadata__":{"DCP_SHARDING_INFO":"[1, 2]"}}'[:46], "header"),
    ],
)
def test_headers_that_are_none(copy, header, word):
    file = copy / "step-000002" / FILES[2]
    file.write_bytes(header)
    _sign(file.parent)
    run_ranks(2, _refused, copy, FileError, FILES[2], word)


LR = "optimizer.param_groups.scale.lr"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 3),
        ("step", "2"),
        ("step", 2.0),
        ("step", None),
        ("step", True),
        (LR, "fast"),
        (LR, None),
        (LR, True),
        (LR, [0.1]),
        (LR, "1e999"),
        (LR, "NaN"),
        ("optimizer.param_groups.scale.betas", [0.5]),
        ("optimizer.param_groups.scale.betas", [0.5, "x"]),
        ("optimizer.param_groups.scale.betas", {"a": 1}),
        ("optimizer.param_groups.scale.amsgrad", 0),
        ("run", None),
        ("run", {"text": "another"}),
    ],
)
def test_a_value_of_another_kind(copy, name, value):
    file = copy / "step-000002" / "values.json"
    text = json.dumps({**json.loads(file.read_text()), name: value})
    file.write_text(text.replace(f'"{value}"', value) if value in ("1e999", "NaN") else text)
    _sign(file.parent)
    run_ranks(2, _refused, copy, FileError, str(file), "number" if value == "NaN" else name.rsplit(".", 1)[-1])


@pytest.mark.any_pytorch
@pytest.mark.parametrize("content", ["", "[]", "5", "{", "[" * 100000, '{"step": 2}'])
def test_values_that_are_none(copy, content):
    file = copy / "step-000002" / "values.json"
    file.write_text(content)
    _sign(file.parent)
    run_ranks(2, _refused, copy, FileError, str(file))


def _of_a_run(folder, text):
    model = _wrapped(1, "ddp")
    optimizer = torch.optim.AdamW(model.parameters())
    if not folder.exists():
        _checkpoint.save(folder, 2, model, optimizer, run={"text": "abc"})
    if text == "abc":
        assert _checkpoint.load(folder, model, optimizer, run={"text": text}) == 2
        return
    with pytest.raises(FileError, match=f"values.json is of another run: its text is abc, that of this run {text}"):
        _checkpoint.load(folder, model, optimizer, run={"text": text})


def test_a_checkpoint_of_another_run(tmp_path):
    run_ranks(2, _of_a_run, tmp_path / "run", "abc")
    run_ranks(2, _of_a_run, tmp_path / "run", "xyz")


@pytest.mark.any_pytorch
@pytest.mark.parametrize("name", ["LATEST", "step-000002", *(f"step-000002/{name}" for name in FILES)])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_link_or_a_pipe_in_place_of_a_file(copy, name, kind):
    """Even one to the same bytes, elsewhere; and nobody waits for what comes out of a pipe."""
    path = copy / name
    os.rename(path, copy.parent / "elsewhere")
    if kind == "link":
        path.symlink_to(copy.parent / "elsewhere")
    else:
        os.mkfifo(path)
    run_ranks(2, _refused, copy, FileError, str(path), "link" if kind == "link" else "folder", timeout=20.0)


@pytest.mark.any_pytorch
@pytest.mark.parametrize("name", ["LATEST", "step-000002"])
def test_what_is_missing_is_named(copy, name):
    remove = shutil.rmtree if (copy / name).is_dir() else os.unlink
    remove(copy / name)
    run_ranks(2, _refused, copy, FileError, str(copy / name))


def _with_nan(folder, where):
    """On the second rank alone, in rows that only it has."""
    model = _wrapped(1, "fsdp2")
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer)
    if dist.get_rank() == 1:
        weight = model.blocks[0].weight
        x = weight if where == "weight" else optimizer.state[weight]["exp_avg_sq"]
        x.to_local().detach()[0, 0] = torch.inf
    name = "model.blocks.0.weight" if where == "weight" else r"optimizer.state.blocks.0.weight.exp_avg_sq"
    with pytest.raises(FloatingPointError, match=f"rank 1: .*step-000004 is not saved: NaN or Inf in {name}$"):
        _checkpoint.save(folder, 4, model, optimizer)


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_not_saved(copy, where):
    run_ranks(2, _with_nan, copy, where)
    assert (copy / "LATEST").read_text() == "step-000002"
    assert sorted(path.name for path in copy.iterdir()) == ["LATEST", "step-000002"]


FAULTS = {
    "planning": ("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.prepare_local_plan", RuntimeError),
    "writing": ("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data", RuntimeError),
    "the sums": ("_checkpoint._digest", RuntimeError),
    "a full disk": ("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data", NotWritten),
}


def _one_rank_fails(folder, odd, fault):
    target, kind = FAULTS[fault]
    error = OSError(28, "No space left on device") if kind is NotWritten else KeyError("of this rank")
    model = _wrapped(3, "ddp")
    optimizer = torch.optim.AdamW(model.parameters())
    fails = mock.patch(target, side_effect=error) if dist.get_rank() == odd else mock.patch("time.sleep")
    with fails, pytest.raises(kind, match=f"step-000004.*rank {odd}: .*{error.args[-1]}"):
        _checkpoint.save(folder, 4, model, optimizer)
    if kind is NotWritten:
        assert not (folder / "step-000004.partial").exists()


@pytest.mark.any_pytorch
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_fails_while_it_saves(copy, odd, fault):
    """All ranks are told who and why, and go on: the next save succeeds."""
    run_ranks(2, _one_rank_fails, copy, odd, fault)
    assert (copy / "LATEST").read_text() == "step-000002"
    assert not (copy / "step-000004").exists()
    run_ranks(2, _save, copy, "ddp", 4)
    assert sorted(path.name for path in copy.iterdir()) == ["LATEST", "step-000002", "step-000004"]


KILLED = """
import os, signal, sys, torch, lasp, _checkpoint, pathlib
env = lasp.init("gloo", timeout=20)
model = torch.nn.Linear(300, 3)
optimizer = torch.optim.AdamW(model.parameters())
folder = pathlib.Path(sys.argv[1])
_checkpoint.save(folder, 1, model, optimizer)
end = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if env.rank == int(sys.argv[2]) and sys.argv[3] == "while it writes its part":
    _checkpoint.HuggingFaceStorageWriter.write_data = end
elif env.rank == int(sys.argv[2]):
    write = _checkpoint.write
    _checkpoint.write = lambda path, data: end() if path.name == "LATEST" else write(path, data)
try:
    _checkpoint.save(folder, 2, model, optimizer)
except lasp.PeerError as error:
    print(error)
"""


@pytest.mark.any_pytorch
@pytest.mark.parametrize(("odd", "place"), [(1, "while it writes its part"), (0, "before LATEST names it")])
def test_a_rank_that_is_killed_while_it_saves(tmp_path, odd, place):
    code = KILLED.replace("sys.argv", repr(["", str(tmp_path / "run"), str(odd), place]))
    ranks = run_script(code, 2, agent=False)
    assert ranks[odd][0] == -9, ranks
    assert ranks[1 - odd][0] == 0, ranks
    assert f"saving {tmp_path / 'run' / 'step-000002'}" in ranks[1 - odd][1]
    assert (tmp_path / "run" / "LATEST").read_text() == "step-000001"
    whole = {path.name for path in (tmp_path / "run").iterdir() if (path / "SHA256SUMS").exists()}
    assert whole == ({"step-000001"} if odd == 1 else {"step-000001", "step-000002"})
    assert {x.name for x in (tmp_path / "run").glob("*.partial")} == ({"step-000002.partial"} if odd == 1 else set())


def _fails(kind, rank):
    if dist.get_rank() == rank:
        raise kind(f"of {rank}")
    return rank


def _together():
    """Values come back from all ranks in their order; what fails on some is the same error on all."""
    rank = dist.get_rank()
    values = [None, "\u00e9" * 1000, {"a": [2.5]}]
    assert on_all_ranks("this", lambda: values[rank]) == values
    assert on_all_ranks("this", lambda: "") == [""] * 3
    assert on_rank_0("this", lambda: rank) == 0
    with pytest.raises(FileError, match=r"^rank 1: of 1$"):
        on_all_ranks("this", lambda: _fails(FileError, 1))
    with pytest.raises(RuntimeError, match=r"^this: rank 2: KeyError: 'of 2'$"):
        on_all_ranks("this", lambda: _fails(KeyError, 2))
    with pytest.raises(NotWritten, match=r"^rank 0: of 0$"):
        on_rank_0("this", lambda: _fails(NotWritten, 0))
    with pytest.raises(FileError, match=r"^rank 0: of 0; rank 2: ZeroDivisionError: of 2$"):
        on_all_ranks("this", lambda: _fails([FileError, None, ZeroDivisionError][rank], rank if rank != 1 else 0))
    with pytest.raises(FileError, match=r"^the same$"):
        on_all_ranks("this", lambda: _fails_everywhere())


def _fails_everywhere():
    raise FileError("the same")


def test_what_is_done_on_all_ranks():
    run_ranks(3, _together)


def test_a_file_is_whole_or_what_it_was(tmp_path):
    """Whatever fails in between; and what is left by a process that was killed there is in nobody's way."""
    path = tmp_path / "run.json"
    write(path, "before")
    for fault in ("fsync", "replace"):
        with mock.patch(f"os.{fault}", side_effect=OSError(28, "No space left on device")), pytest.raises(NotWritten):
            write(path, "after")
        assert path.read_text() == "before"
        assert [x.name for x in tmp_path.iterdir()] == ["run.json"]
        with mock.patch(f"os.{fault}", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            write(path, "after")
        assert path.read_text() == "before"
    write(path, "after")
    assert path.read_text() == "after"
    assert [x.name for x in tmp_path.iterdir()] == ["run.json"]
