"""The example's checkpoints: the same bits on other ranks and under other schemes, no code, no byte changed unseen."""

import hashlib
import json
import pickle
import shutil
from unittest import mock

import _checkpoint
import pytest
import torch
from ranks import mesh_of, run_ranks
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from lasp.data_parallel import wrap_ddp, wrap_fsdp2


class Odd(nn.Module):
    """Sizes that no number of ranks divides, a last layer with fewer rows than ranks, and a number that is a buffer."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 2)])
        self.scale = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(seed))


def _wrapped(seed, scheme):
    model, mesh = Odd(seed), mesh_of(dp_shard=1, sp=-1)
    return wrap_ddp(model, mesh) if scheme == "ddp" else wrap_fsdp2(model, mesh, blocks=model.blocks)


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


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x) if isinstance(x, torch.Tensor) else found[name] == x, name


def _save(folder, scheme, steps=2):
    model = _wrapped(1, scheme)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125, betas=(0.5, 0.75))
    for _ in range(steps):
        _step(model, optimizer)
    _checkpoint.save(folder, steps, model, optimizer)
    return _whole(model, optimizer)


def _load(folder, scheme):
    model = _wrapped(2, scheme)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
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
    ],
)
def test_every_bit_comes_back_on_other_ranks_and_under_other_schemes(tmp_path, saving, loading):
    [expected, *_] = run_ranks(saving[0], _save, tmp_path, saving[1])
    for found in run_ranks(loading[0], _load, tmp_path, loading[1]):
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
    words = ["step-000002" if name == "SHA256SUMS" else str(file)]
    run_ranks(
        2, _refused, copy, FileNotFoundError if words == ["step-000002"] and fault == "missing" else ValueError, *words
    )


def test_a_part_of_another_checkpoint_is_an_error(copy):
    folder = copy / "step-000002"
    shutil.copy(folder / FILES[2], folder / "shard-00003-model-00001-of-00001.safetensors")
    run_ranks(2, _refused, copy, ValueError, "shard-00003", "not of this checkpoint")


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


@pytest.mark.parametrize("name", [*FILES, "LATEST"])
def test_a_pickle_in_place_of_a_file_is_not_run(copy, tmp_path, name):
    folder, made = copy / "step-000002", tmp_path / "made"
    pickle.loads(pickle.dumps(_Touches(str(made)))).close()  # that is what it does where it is unpickled
    made.unlink()
    (copy / "LATEST" if name == "LATEST" else folder / name).write_bytes(pickle.dumps(_Touches(str(made)), protocol=0))
    if name not in ("SHA256SUMS", "LATEST"):
        _sign(folder)
    run_ranks(2, _refused, copy, (ValueError, CheckpointException))
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
