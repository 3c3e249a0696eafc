"""On one device: with a segment length the bits of a sequence depend on no neighbour, nor on where it is cut."""

from dataclasses import replace

import interpreter
import pytest
import torch
from inputs import FORMS, random_inputs
from steps import backward_steps, forward_steps

from lasp_kernels import Operands, fold, steps_of

OFFSETS = (0, 70, 70, 263, 264, 300)


def results(x, *, segment_length, cu_seqlens=None):
    """By name. The gradient of a decay per head is a sum over all tokens, and not among them."""
    call = Operands(x.q, x.k, x.v, x.log_decay, 0.7)
    wanted = x.log_decay is not None and x.log_decay.ndim > 1
    steps = steps_of(call, cu_seqlens=cu_seqlens, segment_length=segment_length, decay_gradient=wanted)
    states, end, o = forward_steps(steps, x, 0.7, x.initial_state)
    return {"o": o, "final_state": end, **backward_steps(steps, x, states, 0.7, decay_gradient=wanted)}


def part(x, first, end, run=slice(None)):
    """Some tokens of one sequence, in memory of their own."""
    cut = {name: getattr(x, name)[:, first:end].clone() for name in ("q", "k", "v", "do")}
    if x.log_decay is not None and x.log_decay.ndim > 1:
        cut["log_decay"] = x.log_decay[:, first:end].clone()
    return replace(x, **cut, initial_state=x.initial_state[run].clone(), d_final_state=x.d_final_state[run].clone())


KERNEL_FORMS = [form for form in FORMS if form != "channel"]  # the kernels take no decay per channel
CASES = [("reference", form) for form in FORMS] + [("triton", form) for form in KERNEL_FORMS]


def inputs(monkeypatch, path, form, T, dtype=torch.float32, **options):
    monkeypatch.setenv("LASP_KERNELS", path)
    options["H"] = 1 if path == "triton" else options.get("H", 2)  # the interpreter's time goes by programs
    x = random_inputs(form, T, B=1, K=16, V=24, strength=0.3, dtype=torch.float32, **options).to(dtype)
    device = "cuda" if path == "triton" and interpreter.CUDA else "cpu"
    return replace(x, **{name: t.to(device) for name, t in vars(x).items() if t is not None})


@pytest.mark.parametrize(("path", "form"), CASES)
@pytest.mark.parametrize(
    ("segment_length", "groups", "heads", "dtype"), [(64, 1, 2, torch.float32), (128, 3, 1, torch.bfloat16)]
)
def test_packed_sequences_have_the_bits_of_each_alone(monkeypatch, path, form, segment_length, groups, heads, dtype):
    x = inputs(monkeypatch, path, form, OFFSETS[-1], dtype, H=heads, groups=groups, sequences=len(OFFSETS) - 1)
    together = results(x, segment_length=segment_length, cu_seqlens=OFFSETS)
    for n, (first, end) in enumerate(zip(OFFSETS, OFFSETS[1:])):
        alone = results(part(x, first, end, slice(n, n + 1)), segment_length=segment_length)
        for name, expected in alone.items():
            states = name in ("final_state", "initial_state")
            found = together[name][n : n + 1] if states else together[name][:, first:end]
            assert torch.equal(found, expected), f"{name} of the sequence from {first} to {end}"


def cut_in_two(x, border, *, segment_length):
    """`results` of two devices: the second continues the fold over the maps of the first, and the other way round."""
    parts = [part(x, 0, border), part(x, border, x.k.shape[1])]
    calls = [Operands(p.q, p.k, p.v, p.log_decay, 0.7) for p in parts]
    steps = [steps_of(call, segment_length=segment_length) for call in calls]
    between = fold(x.initial_state, *steps[0].border_maps(steps[0].local_maps(calls[0])))
    maps = steps[1].gradient_maps(calls[1], parts[1].do)
    d_between = fold(x.d_final_state, *steps[1].border_maps(maps, reverse=True))
    before = results(replace(parts[0], d_final_state=d_between), segment_length=segment_length)
    behind = results(replace(parts[1], initial_state=between), segment_length=segment_length)
    ends = {"final_state": behind["final_state"], "initial_state": before["initial_state"]}
    return {name: ends[name] if name in ends else torch.cat([before[name], behind[name]], 1) for name in before}


@pytest.mark.parametrize(("path", "form"), CASES)
@pytest.mark.parametrize(("segment_length", "borders"), [(64, (64, 128)), (128, (128,))])
def test_a_sequence_cut_at_a_segment_has_the_bits_of_the_whole(monkeypatch, path, form, segment_length, borders):
    x = inputs(monkeypatch, path, form, 200)
    whole = results(x, segment_length=segment_length)
    for border in borders:
        found = cut_in_two(x, border, segment_length=segment_length)
        for name, expected in whole.items():
            assert torch.equal(found[name], expected), f"{name}, cut at {border}"
