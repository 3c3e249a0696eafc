"""Decoding on a GPU: a step as a CUDA graph gives what the step gives, in memory that does not grow."""

import pytest
import torch
from test_inference import MODELS, ids_of, logits_of, model_of

import lasp
from lasp.inference.decode import Decoding
from lasp.inference.run import Runner
from lasp.models import TNL, TNLConfig

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(600),  # kernels are compiled
]
# Keys and values of all tokens; and experts, whose sizes the host reads but in bf16.
NO_GRAPH = ("softmax", "hybrid", "of a user, with tokens", "experts")


def on_gpu(name, dtype):
    model = model_of(name, dtype).cuda()
    for module in model.modules():
        if isinstance(getattr(module, "decay", None), torch.Tensor):  # which moves with no module
            module.decay = module.decay.cuda()
    return model, ids_of(3, 126).cuda()  # one of the models knows 128 positions


def steps(model, state, ids, *, cuda_graph):
    decoding = Decoding(Runner(model, None), state.fork(), cuda_graph=cuda_graph)
    found = []
    for token in ids.unbind(1):
        decoding.step(token)
        found.append(decoding.logits.clone())
    return torch.stack(found, 1), decoding


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-3)])
def test_a_graph_gives_what_the_steps_give(name, dtype, bound):
    model, ids = on_gpu(name, dtype)
    state = lasp.prefill(model, ids[:, :107], segment=50)
    eager, _ = steps(model, state, ids[:, 107:], cuda_graph=False)
    found, decoding = steps(model, state, ids[:, 107:], cuda_graph=True)
    assert (decoding._graph is None) == (name in NO_GRAPH)
    assert bool(decoding.no_graph) == (name in NO_GRAPH)
    assert torch.equal(found, eager)  # the same kernels in the same order
    expected = logits_of(model, ids)
    torch.testing.assert_close(state.logits, expected[:, 106].to(dtype), atol=bound, rtol=bound)
    torch.testing.assert_close(found, expected[:, 107:], atol=bound, rtol=bound)


@pytest.mark.parametrize("rows", [1, 3, 4, 80])
def test_a_graph_in_bf16_of_as_many_rows_as_kernels_take_and_more(rows):
    torch.manual_seed(0)
    model = TNL(TNLConfig(200, layers=3, width=512, heads=4, glu_width=1280)).cuda().bfloat16()
    ids = torch.randint(200, (rows, 40), device="cuda")
    state = lasp.prefill(model, ids[:, :20])
    eager, _ = steps(model, state, ids[:, 20:], cuda_graph=False)
    found, decoding = steps(model, state, ids[:, 20:], cuda_graph=True)
    assert decoding._graph is not None
    assert torch.equal(found, eager)
    expected = logits_of(model, ids)[:, 20:].double()
    assert (found.double() - expected).norm() < 3e-2 * expected.norm()


@pytest.mark.parametrize("name", ["tnl", "mamba2", "gated_delta_net", "transnormer", "hybrid"])
def test_generations_are_alike_with_and_without_a_graph(name):
    model, ids = on_gpu(name, torch.float32)
    rows = [ids[0, :100], ids[1, :7], ids[2, :100]]
    options = {"max_new_tokens": [20, 9, 13], "do_sample": True, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.1}
    found = lasp.generate(model, rows, **options)
    eager = lasp.generate(model, rows, cuda_graph=False, **options)
    assert torch.equal(found.ids, eager.ids)
    assert found.lengths == eager.lengths == (20, 9, 13)
    for a, b in zip(found.state._tensors(used=True).values(), eager.state._tensors(used=True).values()):
        assert torch.equal(a, b)
    streams = [lasp.stream_tokens(model, rows, **options) for _ in range(2)]
    for _ in range(20):  # two graphs, one replay of each after the other
        first, second = (next(stream) for stream in streams)
        assert first == second
    assert torch.equal(streams[0].result().ids, found.ids)


def test_memory_does_not_grow_with_tokens():
    model, ids = on_gpu("tnl", torch.bfloat16)
    stream = lasp.stream_tokens(model, ids, max_new_tokens=400)
    for _ in range(20):
        next(stream)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bytes_of_state = stream.decoding.state(goes_on=True).nbytes
    for _ in range(300):
        next(stream)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
    assert torch.cuda.max_memory_allocated() <= before + 2**20 + bytes_of_state
    assert lasp.prefill(model, ids[:, :3]).nbytes == bytes_of_state


def test_the_host_does_not_wait_in_a_step():
    model, ids = on_gpu("tnl", torch.bfloat16)
    _, decoding = steps(model, lasp.prefill(model, ids), ids[:, :5], cuda_graph=True)
    before = decoding.logits.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoding.step(ids[:, 0])  # raises where the host waits,
        with pytest.raises(RuntimeError, match="synchroniz"):
            decoding.logits[0, 0].item()  # as here
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(decoding.logits, before)
    assert decoding.lengths == [ids.shape[1] + 6] * 3


def test_a_state_moves_between_devices(tmp_path):
    model, ids = on_gpu("mamba2", torch.float32)
    state = lasp.prefill(model, ids)
    state.save(tmp_path / "state")
    loaded = lasp.InferenceState.load(tmp_path / "state", device="cuda")
    expected = lasp.generate(model, None, state=state, max_new_tokens=5)
    assert torch.equal(lasp.generate(model, None, state=loaded, max_new_tokens=5).ids, expected.ids)
    with pytest.raises(ValueError, match=r"state must lie where the model does, on cuda:0, got cpu"):
        lasp.generate(model, None, state=state.to("cpu"), max_new_tokens=5)
