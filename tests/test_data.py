"""`shard_batch`, `shard_sequence`, `unshard_sequence`, `ShardLayout`: the shards together are the whole, labels too."""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from inputs import assert_close
from ranks import mesh_of, run_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import lasp
from lasp import arguments
from lasp.ranks import peers_of

IGNORE = -100
WORLDS = pytest.mark.parametrize("world", [1, 2, 3, 4])


def ids(*shape):
    return torch.randint(100, shape, generator=torch.Generator().manual_seed(0))


def _shard(batch, options):
    return lasp.shard_batch(batch, dist.group.WORLD, **options)


def shards(world, batch, **options):
    """What `shard_batch` gives to each rank."""
    return run_ranks(world, _shard, batch, options)


def joined(parts, name, dim=1):
    return torch.cat([part[name] for part in parts], dim)


def next_tokens(tokens, *, padding=0):
    """The label of each token is the one after it; none behind the last."""
    shifted = torch.full((tokens.shape[0], tokens.shape[1] + padding), IGNORE)
    shifted[:, : tokens.shape[1] - 1] = tokens[:, 1:]
    return shifted


@WORLDS
@pytest.mark.parametrize("T", [1, 2, 7, 12])
def test_shards_together_are_the_padded_whole(world, T):
    batch = {"input_ids": ids(2, T), "name": "text", "per_row": torch.ones(2)}
    parts = shards(world, batch)
    padding = -T % world
    assert {part["input_ids"].shape[1] for part in parts} == {(T + padding) // world}
    whole = joined(parts, "input_ids")
    assert torch.equal(whole[:, :T], batch["input_ids"])
    assert (whole[:, T:] == 0).all()
    assert torch.equal(joined(parts, "labels"), next_tokens(batch["input_ids"], padding=padding))
    positions = joined(parts, "position_ids")[:, :T]
    assert positions.dtype == torch.int64
    assert torch.equal(positions, torch.arange(T).expand(2, T))
    for part in parts:
        assert part["name"] == "text"
        assert torch.equal(part["per_row"], batch["per_row"])
        assert part["layout"] == lasp.ShardLayout(((T + padding) // world,) * world, padding=padding)


@WORLDS
@pytest.mark.parametrize("T", [0, 1, 3, 7])
def test_without_padding_the_first_ranks_hold_one_more(world, T):
    tokens = ids(2, T)
    parts = shards(world, {"input_ids": tokens}, pad=False)
    assert [p["input_ids"].shape[1] for p in parts] == [T // world + (r < T % world) for r in range(world)]
    assert torch.equal(joined(parts, "input_ids"), tokens)
    if T:
        assert torch.equal(joined(parts, "labels"), next_tokens(tokens))
    assert joined(parts, "position_ids").shape == (2, T)


def test_the_last_label_of_a_shard_is_the_first_token_of_the_next():
    tokens = ids(1, 8)
    first, second = shards(2, {"input_ids": tokens})
    assert first["labels"][0, -1] == second["input_ids"][0, 0]
    assert second["labels"][0, -1] == IGNORE


def test_given_labels_are_shifted_and_may_be_ignored():
    tokens = ids(2, 6)
    labels = tokens.clone()
    labels[:, :4] = -1
    parts = shards(3, {"input_ids": tokens, "labels": labels}, ignore_index=-1)
    expected = torch.full_like(labels, -1)
    expected[:, 3:5] = tokens[:, 4:]
    assert torch.equal(joined(parts, "labels"), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_labels_that_are_made_leave_padding_out(dtype):
    """It neither predicts nor is predicted, on the left, on the right, and across the borders of ranks."""
    tokens, mask = ids(3, 6), torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    parts = shards(2, {"input_ids": tokens, "attention_mask": mask.to(dtype)})
    expected = torch.full_like(tokens, IGNORE)
    expected[0, 3:5], expected[1, :3] = tokens[0, 4:], tokens[1, 1:4]
    assert torch.equal(joined(parts, "labels"), expected)


def test_labels_that_are_given_stay_at_padding():
    tokens, mask = ids(1, 4), torch.tensor([[0, 1, 1, 1]])
    parts = shards(2, {"input_ids": tokens, "labels": tokens, "attention_mask": mask})
    assert torch.equal(joined(parts, "labels"), next_tokens(tokens))


def test_labels_that_are_shifted_already_stay():
    tokens, labels = ids(2, 5), ids(2, 5) + 1
    parts = shards(2, {"input_ids": tokens, "labels": labels}, shift_labels=False)
    whole = joined(parts, "labels")
    assert torch.equal(whole[:, :5], labels)
    assert (whole[:, 5:] == IGNORE).all()


def test_given_positions_stay():
    parts = shards(2, {"input_ids": ids(2, 4), "position_ids": torch.arange(4).expand(2, 4) + 10})
    assert torch.equal(joined(parts, "position_ids")[0], torch.arange(10, 14))


def test_any_tensor_along_the_sequence_is_cut():
    embeddings, mask = torch.randn(2, 6, 3), torch.ones(2, 6, dtype=torch.bool)
    parts = shards(3, {"input_ids": ids(2, 6), "embeddings": embeddings, "mask": mask})
    assert torch.equal(joined(parts, "embeddings"), embeddings)
    assert torch.equal(joined(parts, "mask"), mask)


@pytest.mark.parametrize("seq_dim", [0, -2])
def test_sequence_in_the_first_dimension(seq_dim):
    tokens = ids(7, 2)
    parts = shards(2, {"input_ids": tokens}, seq_dim=seq_dim)
    assert torch.equal(joined(parts, "input_ids", 0)[:7], tokens)
    assert torch.equal(joined(parts, "labels", 0), next_tokens(tokens.T, padding=1).T)
    assert torch.equal(joined(parts, "position_ids", 0)[:7, 1], torch.arange(7))


@WORLDS
def test_packed(world):
    cu_seqlens = torch.tensor([0, 3, 3, 4, 10], dtype=torch.int32)
    tokens = ids(1, 10)
    parts = shards(world, {"input_ids": tokens, "cu_seqlens": cu_seqlens})
    padding = -10 % world
    expected = next_tokens(tokens, padding=padding)
    expected[0, [2, 3, 9]] = IGNORE  # the last of each document
    assert torch.equal(joined(parts, "labels"), expected)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4, 5]])
    assert torch.equal(joined(parts, "position_ids")[:, :10], positions)
    for part in parts:
        assert part["layout"] == lasp.ShardLayout(((10 + padding) // world,) * world, (0, 3, 3, 4, 10), padding)
        assert torch.equal(part["cu_seqlens"], cu_seqlens)


def _in_form(form):
    offsets = [0, 3, 3, 4, 10]
    return {
        "list": offsets,
        "tuple": tuple(offsets),
        "numpy": np.array(offsets, dtype=np.int32),
        "tensor": torch.tensor(offsets, dtype=torch.int32),
        "of a collator": torch.tensor([offsets]),
        "nested list": [offsets],
        "numpy, of a collator": np.array([offsets]),
        "list of NumPy's": [np.int64(n) for n in offsets],
        "list of a tensor": [torch.tensor(offsets)],
    }[form]


FORMS = ["list", "tuple", "numpy", "tensor", "of a collator", "nested list", "numpy, of a collator", "list of NumPy's"]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("form", [*FORMS, "list of a tensor"])
def test_offsets_in_every_form(form, world):
    tokens, padding = ids(1, 10), -10 % world
    expected = next_tokens(tokens, padding=padding)
    expected[0, [2, 3, 9]] = IGNORE
    parts = shards(world, {"input_ids": tokens, "cu_seqlens": _in_form(form)})
    assert torch.equal(joined(parts, "labels"), expected)
    for part in parts:
        assert part["layout"] == lasp.ShardLayout(((10 + padding) // world,) * world, (0, 3, 3, 4, 10), padding)
    assert lasp.ShardLayout((5, 5), (0, 3, 3, 4, 10)) == lasp.ShardLayout((5, 5), _in_form(form))
    assert lasp.ShardLayout((5, 5), (0, 3, 3, 4, 10)) == lasp.ShardLayout.even(10, 2, cu_seqlens=_in_form(form))


def _documents(form, offsets, seq_dim=1):
    """What collators write for packed documents."""
    offsets = torch.tensor(offsets, dtype=torch.int32)
    lengths = offsets.diff()
    numbers = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
    positions = torch.cat([torch.arange(int(length)) for length in lengths])
    longest = int(lengths.max())
    return {
        "cu_seqlens": {"cu_seqlens": offsets},
        "cu_seq_lens_q": {
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": longest,
            "max_length_k": torch.tensor(longest),
        },
        "seq_idx": {"seq_idx": numbers[None] if seq_dim else numbers[:, None]},
        "seq_idx with gaps": {"seq_idx": 3 * (numbers[None] if seq_dim else numbers[:, None]) - 5},
        "position_ids": {"position_ids": positions},
        "position_ids of a batch": {"position_ids": positions[None] if seq_dim else positions[:, None]},
    }[form]


DOCUMENTS = ["cu_seqlens", "cu_seq_lens_q", "seq_idx", "seq_idx with gaps", "position_ids", "position_ids of a batch"]


@WORLDS
@pytest.mark.parametrize("seq_dim", [1, 0])
@pytest.mark.parametrize("offsets", [(0, 3, 4, 10), (0, 1, 2, 3, 10), (0, 9, 10)], ids=str)
def test_every_form_of_packed_documents_gives_the_same(offsets, seq_dim, world):
    tokens = ids(1, 10) if seq_dim else ids(10, 1)
    padding = -10 % world
    layout = lasp.ShardLayout(((10 + padding) // world,) * world, offsets, padding)
    expected = next_tokens(tokens if seq_dim else tokens.T, padding=padding)
    expected[0, [end - 1 for end in offsets[1:]]] = IGNORE
    for form in DOCUMENTS:
        batch = {"input_ids": tokens, **_documents(form, offsets, seq_dim)}
        parts = shards(world, batch, seq_dim=seq_dim)
        labels = joined(parts, "labels", seq_dim)
        assert torch.equal(labels if seq_dim else labels.T, expected), form
        positions = torch.cat([part["position_ids"].flatten() for part in parts])[:10]
        assert torch.equal(positions, _documents("position_ids", offsets)["position_ids"]), form
        for part in parts:
            assert part["layout"] == layout, form
            kept = {"input_ids", "labels", "position_ids", "layout"} | ({"cu_seqlens"} & batch.keys())
            assert set(part) == (kept if world > 1 else kept | batch.keys()), form


def test_on_one_rank_what_holds_for_the_whole_stays():
    batch = {"input_ids": ids(1, 10), **_documents("cu_seq_lens_q", (0, 3, 10)), **_documents("seq_idx", (0, 3, 10))}
    found = lasp.shard_batch(batch, None)
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(x)) for name, x in batch.items())


@pytest.mark.parametrize("world", [1, 2])
def test_without_documents_nothing_is_packed(world):
    for positions in (torch.arange(7), torch.arange(7)[None] + 2, None):
        for part in shards(world, {"input_ids": ids(1, 7), "position_ids": positions}):
            assert not part["layout"].packed
    [part] = shards(1, {"input_ids": ids(1, 7), "seq_idx": torch.zeros(1, 7).int()})
    assert part["layout"] == lasp.ShardLayout((7,), (0, 7))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"seq_idx": torch.tensor([[0, 0, 1, 1, 0, 0]])}, r"seq_idx must rise from one packed sequence to the next"),
        ({"seq_idx": torch.zeros(1, 5).int()}, r"seq_idx must have the shape of input_ids \(1, 6\), got \(1, 5\)"),
        ({"input_ids": ids(2, 6), "seq_idx": torch.zeros(2, 6).int()}, r"seq_idx needs a batch of 1.*\(2, 6\)"),
        ({"input_ids": ids(2, 6), "cu_seq_lens_q": [0, 6]}, r"cu_seq_lens_q need a batch of 1.*\(2, 6\)"),
        ({"cu_seq_lens_q": [0, 2, 5]}, r"cu_seq_lens_q must rise from 0 to the 6 tokens of input_ids, got \[0, 2, 5\]"),
        (
            {"cu_seq_lens_q": [0, 2, 6], "cu_seq_lens_k": [0, 3, 6]},
            r"cu_seq_lens_q and cu_seq_lens_k must be of the same packed sequences, got offsets \(0, 2, 6\) and",
        ),
        (
            {"cu_seqlens": [0, 2, 2, 6], "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
            r"cu_seqlens and seq_idx must be of the same packed sequences, got offsets \(0, 2, 2, 6\) and \(0, 3, 6\)",
        ),
        # Positions that transformers would not take for packed documents.
        ({"position_ids": torch.tensor([[0, 1, 2, 1, 2, 3]])}, "position_ids start again within a row"),
        ({"position_ids": torch.tensor([[2, 3, 4, 0, 1, 2]])}, "position_ids start again within a row"),
        ({"position_ids": torch.tensor([[0, 1, 3, 0, 1, 2]])}, "position_ids start again within a row"),
        ({"position_ids": torch.tensor([[[0, 1, 2, 0, 1, 2]]] * 3)}, "position_ids start again within a row"),
        (
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "attention_mask": torch.ones(1, 6)},
            "position_ids start again within a row",
        ),
        (
            {"input_ids": ids(2, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
            "position_ids start again within a row.*as cu_seqlens, or positions that start at 0 and count by one",
        ),
    ],
)
def test_packed_documents_that_are_not_clear_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        lasp.shard_batch({"input_ids": ids(1, 6), **batch}, None)


@pytest.mark.parametrize("form", [name for name in DOCUMENTS if name != "cu_seqlens"])
def test_numbers_of_documents_in_another_type_are_refused(form):
    batch = {name: x.float() for name, x in _documents(form, (0, 3, 10)).items() if isinstance(x, torch.Tensor)}
    with pytest.raises(TypeError, match=f"{form.split()[0]} must be .*integers"):
        lasp.shard_batch({"input_ids": ids(1, 10), **batch}, None)


def test_an_empty_document_is_in_offsets_only():
    batch = {"input_ids": ids(1, 6), "cu_seqlens": [0, 2, 2, 6], "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    assert lasp.shard_batch(batch, None)["layout"].cu_seqlens == (0, 2, 2, 6)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("seq_dim", [1, 0])
def test_positions_in_the_three_shapes_that_models_use(seq_dim, world):
    tokens, padding = ids(2, 7) if seq_dim else ids(7, 2), -7 % world
    rows = torch.stack([torch.arange(7), torch.arange(7) + 4])
    rows = rows if seq_dim else rows.T
    planes = torch.stack([rows, rows + 1, rows.flip(0)])
    for whole, dim in ((torch.arange(7), 0), (rows, seq_dim), (planes, seq_dim + 1)):
        parts = shards(world, {"input_ids": tokens, "position_ids": whole}, seq_dim=seq_dim)
        found = joined(parts, "position_ids", dim)
        assert torch.equal(found.narrow(dim, 0, 7), whole)
        assert found.shape[dim] == 7 + padding
        assert all(part["position_ids"].is_contiguous() for part in parts)


def test_slices_are_contiguous():
    batch = {"input_ids": ids(2, 6), "x": torch.randn(2, 3, 6).mT, "attention_mask": torch.ones(2, 6).long()}
    for part in shards(2, batch):
        assert all(x.is_contiguous() for x in part.values() if isinstance(x, torch.Tensor))
        part["labels"].view(-1)


LEFT_PADDED = [[0, 0, 0, 1, 2, 3], [1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    "positions",
    [
        [0, 1, 0, 1, 2, 3],
        [[0, 1, 2, 3, 4, 5]] * 2 + [[0, 1, 2, 0, 1, 2]],
        [[5, 6, 7, 2, 3, 4]] * 3,
        [[0, 0, 0, 0, 0, 0]] * 3,
        [[[0, 1, 2, 0, 1, 2]] * 3] * 3,
        LEFT_PADDED,
    ],
    ids=str,
)
def test_positions_that_start_again_need_offsets(positions):
    batch = {"input_ids": ids(3, 6), "position_ids": torch.tensor(positions)}
    with pytest.raises(ValueError, match=r"position_ids start again within a row.*need their offsets as cu_seqlens"):
        lasp.shard_batch(batch, None)


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        (LEFT_PADDED, MASK),
        (LEFT_PADDED, MASK.bool()),
        (LEFT_PADDED, MASK.float()),
        (
            [[0, 1, 2, 3, 0, 0], [0, 1, 2, 1, 1, 1], [0, 0, 0, 0, 0, 0]],
            torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [0] * 6]),
        ),
        # The three of a text with an image of 2 x 2 tokens: the third falls within the image.
        ([[[0, 1, 1, 1, 1, 3]] * 3, [[0, 1, 1, 2, 2, 3]] * 3, [[0, 1, 2, 1, 2, 3]] * 3], None),
        ([[10, 11, 12, 15, 16, 17]] * 3, None),
    ],
)
def test_padding_and_images_do_not_start_again(positions, mask):
    given = torch.tensor(positions)
    batch = {"input_ids": ids(3, 6), "position_ids": given, "attention_mask": mask}
    assert torch.equal(lasp.shard_batch(batch, None)["position_ids"], given)


def test_positions_may_start_again_where_offsets_are_given():
    batch = {"input_ids": ids(1, 5), "position_ids": torch.tensor([0, 1, 0, 1, 2]), "cu_seqlens": [0, 2, 5]}
    assert lasp.shard_batch(batch, None)["position_ids"].tolist() == [0, 1, 0, 1, 2]


def test_positions_that_are_made_here_are_not_looked_at(monkeypatch):
    """On a device the host would wait for them, at every step."""
    looked = []
    monkeypatch.setattr(lasp.batch, "_start_again", lambda *given: looked.append(given))
    assert lasp.shard_batch({"input_ids": ids(1, 5)}, None)["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert looked == []
    lasp.shard_batch({"input_ids": ids(1, 5), "position_ids": torch.arange(5)}, None)
    assert len(looked) == 1  # given ones are


def test_none_counts_as_absent():
    names = ("labels", "position_ids", "attention_mask", "cu_seqlens")
    found = lasp.shard_batch({"input_ids": ids(1, 5), **dict.fromkeys(names)}, None)
    plain = lasp.shard_batch({"input_ids": ids(1, 5)}, None)
    assert torch.equal(found["labels"], plain["labels"])
    assert torch.equal(found["position_ids"], plain["position_ids"])
    assert found["attention_mask"] is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_are_int64(dtype):
    tokens = ids(1, 5)
    made = lasp.shard_batch({"input_ids": tokens.to(dtype)}, None)["labels"]
    assert made.dtype == torch.int64
    assert torch.equal(made, next_tokens(tokens))
    if dtype != torch.uint8:  # which has no -100
        given = lasp.shard_batch({"input_ids": tokens, "labels": tokens.to(dtype)}, None)["labels"]
        assert torch.equal(given, made)


def test_the_batch_itself_is_not_changed():
    tokens = ids(2, 5)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    lasp.shard_batch(batch, None)
    assert set(batch) == {"input_ids", "labels"}
    assert torch.equal(batch["labels"], tokens)


def _shard_on_mesh(batch):
    return lasp.shard_batch(batch, mesh_of(sp=2))["input_ids"]


def test_the_whole_mesh_cuts_along_its_sequence_axis():
    tokens = ids(1, 6)
    parts = run_ranks(4, _shard_on_mesh, {"input_ids": tokens})
    assert all(torch.equal(parts[r], tokens[:, 3 * (r % 2) : 3 * (r % 2) + 3]) for r in range(4))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": ids(3)}, r"seq_dim must be a dimension of batch\['input_ids'\] \(3,\), got 1"),
        (
            {"input_ids": ids(1, 4), "labels": ids(1, 3)},
            r"labels must have the shape of input_ids \(1, 4\), got \(1, 3\)",
        ),
        (
            {"input_ids": ids(1, 4), "cu_seqlens": torch.tensor([0, 3])},
            "cu_seqlens must rise from 0 to the 4 tokens of input_ids, got \\(0, 3\\)",
        ),
        (
            {"input_ids": ids(1, 4), "cu_seqlens": torch.tensor([], dtype=torch.int32)},
            "cu_seqlens must rise from 0 to the 4",
        ),
        ({"input_ids": ids(1, 4), "cu_seqlens": torch.tensor([0, 3, 2, 4])}, "cu_seqlens must rise from 0"),
    ],
)
def test_batches_that_cannot_be_cut(batch, message):
    with pytest.raises(ValueError, match=message):
        lasp.shard_batch(batch, None)


# shard_sequence and unshard_sequence


def _inverses(order, T, dim):
    """Gradients are those of the mean over ranks of what each of them calls backward on."""
    sequence = DeviceMesh("cpu", order) if order else dist.group.WORLD
    place = order.index(dist.get_rank()) if order else dist.get_rank()
    world = dist.get_world_size()
    shape = [2, 3, 2]
    shape[dim] = T
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    weights = torch.randn([world, *shape], generator=draw, dtype=torch.float64)
    start, end = lasp.ShardLayout.even(T, world).bounds(place)

    leaf = x.clone().requires_grad_()
    piece = lasp.shard_sequence(leaf, sequence, dim=dim)
    assert torch.equal(piece, x.narrow(dim, start, end - start))
    (piece * weights[0].narrow(dim, start, end - start)).sum().backward()
    assert_close(leaf.grad, weights[0] / world, "gradient of shard_sequence")

    leaf = x.narrow(dim, start, end - start).clone().requires_grad_()
    whole = lasp.unshard_sequence(leaf, sequence, dim=dim)
    assert torch.equal(whole, x)
    (whole * weights[place]).sum().backward()
    assert_close(leaf.grad, weights.sum(0).narrow(dim, start, end - start), "gradient of unshard_sequence")

    leaf = x.clone().requires_grad_()
    there_and_back = lasp.unshard_sequence(lasp.shard_sequence(leaf, sequence, dim=dim), sequence, dim=dim)
    (there_and_back * weights[place]).sum().backward()
    assert torch.equal(there_and_back, x)
    assert_close(leaf.grad, weights.mean(0), "gradient there and back")


@WORLDS
@pytest.mark.parametrize("T", [0, 1, 7, 8])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unshard_is_the_inverse_of_shard(world, T, dim):
    run_ranks(world, _inverses, None, T, dim)


def test_unshard_follows_the_order_of_the_mesh():
    run_ranks(4, _inverses, [2, 0, 3, 1], 7, 1)


def _unshard_uneven(lengths):
    rank = dist.get_rank()
    whole = torch.arange(float(sum(lengths)), dtype=torch.float64).view(1, -1)
    start = sum(lengths[:rank])
    piece = whole[:, start : start + lengths[rank]]
    assert torch.equal(lasp.unshard_sequence(piece, dist.group.WORLD), whole)


@pytest.mark.parametrize("lengths", [(0, 5, 2), (3, 0, 0), (1, 1, 9)], ids=str)
def test_unshard_of_slices_of_any_length(lengths):
    run_ranks(3, _unshard_uneven, lengths)


def _unshard_of_dtype(dtype):
    rank = dist.get_rank()
    whole = torch.arange(2 * 5 * 3).view(2, 5, 3).to(dtype)
    for dim, starts in ((0, (0, 1, 2)), (1, (0, 3, 5)), (2, (0, 1, 3))):
        piece = whole.narrow(dim, starts[rank], starts[rank + 1] - starts[rank])
        found = lasp.unshard_sequence(piece, dist.group.WORLD, dim=dim)
        assert found.dtype == dtype
        assert torch.equal(found.contiguous().view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize(
    "dtype", [torch.int16, torch.uint16, torch.float8_e4m3fn, torch.bool, torch.complex64], ids=str
)
def test_unshard_of_a_dtype_that_a_backend_may_not_know(dtype):
    run_ranks(2, _unshard_of_dtype, dtype)


@pytest.mark.parametrize("function", [lasp.shard_sequence, lasp.unshard_sequence])
@pytest.mark.parametrize("dim", [2, -3])
def test_a_dimension_that_is_not_there(function, dim):
    with pytest.raises(ValueError, match=rf"dim must be a dimension of x \(2, 3\), got {dim}"):
        function(torch.zeros(2, 3), None, dim=dim)


# ShardLayout


@pytest.mark.parametrize(
    ("lengths", "cu_seqlens", "message"),
    [
        ((), None, "lengths must be one non-negative number of tokens a rank"),
        ((3, -1), None, r"lengths must be one non-negative .*got \(3, -1\)"),
        ((4,), (1, 4), r"cu_seqlens must rise from 0 .*got \(1, 4\)"),
        ((4,), (0, 3, 2, 4), "cu_seqlens must rise from 0"),
        ((4,), (0,), "cu_seqlens must rise from 0"),
        ((2, 2), (0, 5), r"cu_seqlens must rise from 0 to the 4 tokens of all ranks, got \(0, 5\)"),
    ],
)
def test_layouts_that_are_refused(lengths, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        lasp.ShardLayout(lengths, cu_seqlens)


def test_even_layout():
    layout = lasp.ShardLayout.even(7, 3, cu_seqlens=torch.tensor([0, 2, 7]))
    assert (layout.lengths, layout.cu_seqlens, layout.total) == ((3, 2, 2), (0, 2, 7), 7)
    assert [layout.bounds(r) for r in range(3)] == [(0, 3), (3, 5), (5, 7)]


@pytest.mark.parametrize(
    ("lengths", "cu_seqlens", "runs"),
    [
        # per rank: local offsets, which sequences, began on an earlier rank, goes on on a later one
        ((2, 2), (0, 4), [((0, 2), (0, 1), False, True), ((0, 2), (0, 1), True, False)]),
        ((2, 2), (0, 2, 4), [((0, 2), (0, 1), False, False), ((0, 2), (1, 2), False, False)]),
        ((2, 2), (0, 1, 4), [((0, 1, 2), (0, 2), False, True), ((0, 2), (1, 2), True, False)]),
        ((2, 2), (0, 2, 2, 4), [((0, 2), (0, 1), False, False), ((0, 0, 2), (1, 3), False, False)]),
        (
            (2, 0, 2),
            (0, 4),
            [((0, 2), (0, 1), False, True), ((0, 0), (0, 0), True, True), ((0, 2), (0, 1), True, False)],
        ),
        ((1, 1), (0, 2, 2), [((0, 1), (0, 1), False, True), ((0, 1, 1), (0, 2), True, False)]),
    ],
)
def test_local_runs_at_borders(lengths, cu_seqlens, runs):
    layout = lasp.ShardLayout(lengths, cu_seqlens)
    for rank, (offsets, sequences, continues, continued) in enumerate(runs):
        local = layout.local(rank)
        assert local.cu_seqlens == offsets
        assert (local.sequences.start, local.sequences.stop) == sequences
        assert (local.continues, local.continued) == (continues, continued)


@pytest.mark.parametrize("cu_seqlens", [(0, 0, 5, 5, 5, 9, 9), (0, 9), (0, 0, 0, 9), (0, 1, 2, 9, 9)], ids=str)
@pytest.mark.parametrize("lengths", [(9,), (4, 5), (5, 4), (0, 9), (9, 0), (1, 0, 8), (3, 3, 0, 3)], ids=str)
def test_every_sequence_begins_and_ends_on_one_rank(lengths, cu_seqlens):
    layout = lasp.ShardLayout(lengths, cu_seqlens)
    begun, ended = [], []
    for rank in range(len(lengths)):
        local = layout.local(rank)
        own = list(local.sequences)
        begun += own[1:] if local.continues else own
        ended += own[:-1] if local.continued else own
    everything = list(range(len(cu_seqlens) - 1))
    assert begun == ended == everything


# In what torch.compile compiles


def _compiled():
    torch._dynamo.reset()
    mesh, ids = mesh_of(sp=3), torch.arange(22).view(2, 11)

    def step(weight):
        local = lasp.shard_batch({"input_ids": ids}, mesh, pad=False)
        x = weight[local["input_ids"]] * 2 + lasp.shard_sequence(weight[ids], mesh)
        whole = lasp.unshard_sequence(x.sin(), mesh) * weight[ids]
        return whole.square().sum(), local["labels"]

    leaves = [torch.linspace(-1, 1, 22 * 3).view(22, 3).requires_grad_() for _ in range(2)]
    (expected, labels), (found, of_graph) = (f(x) for f, x in zip((step, torch.compile(step, backend="eager")), leaves))
    assert torch.equal(of_graph, labels)
    assert_close(found, expected, "loss", rtol=1e-6)
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip((expected, found), leaves)]
    assert_close(gradients[1], gradients[0], "gradient", rtol=1e-5, atol=1e-6)


def test_a_compiled_step_that_cuts_and_gathers():
    run_ranks(3, _compiled)


def test_a_batch_that_was_cut_is_not_cut_again():
    cut = lasp.shard_batch({"input_ids": torch.arange(12)[None]}, None)
    with pytest.raises(ValueError, match=r"batch must be whole, .*got what lasp.shard_batch returned"):
        lasp.shard_batch(cut, None)


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def _mask_on_a_device(kind, right):
    """Where the host would wait for a look, here by a mock, a mask is looked at in batches that are compared."""
    batch, mesh = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": kind}, mesh_of(sp=2)
    peers_of(mesh["sp"].get_group()).batches.clear()  # of other tests
    with mock.patch.object(arguments, "on_host", return_value=False):
        refused = pytest.raises(ValueError, match="attention_mask must be 1 for tokens and 0 for padding")
        with contextlib.nullcontext() if right else refused:
            lasp.shard_batch(batch, mesh)
        with mock.patch.object(Tensor, "__bool__", _waits):
            lasp.shard_batch(batch, mesh, validate="off")


def _waits(x):
    raise AssertionError("the host would wait")


@pytest.mark.parametrize(
    ("kind", "right"),
    [(MASK, True), (MASK.bool(), True), (MASK.float(), True), (MASK + 1, False), ((1.0 - MASK) * -1e9, False)],
    ids=["integers", "bools", "floats", "documents", "additive"],
)
def test_a_mask_on_a_device_is_looked_at_where_batches_are_compared(kind, right):
    run_ranks(2, _mask_on_a_device, kind, right)
