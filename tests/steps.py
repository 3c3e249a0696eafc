"""Forward and backward by the steps of lasp_kernels, one after the other, as `lasp.linear_attention` takes them."""

from lasp_kernels import Operands


def operands(x, scale=1.0):
    return Operands(x.q, x.k, x.v, x.log_decay, scale, x.normalize)


def forward_steps(steps, x, scale=1.0, entering=None):
    """The states at the segments, the one behind all, and o."""
    call = operands(x, scale)
    states, end = steps.scan(steps.local_maps(call), entering)
    return states, end, steps.outputs(call, states)[0]


def backward_steps(steps, x, states, scale=1.0, *, decay_gradient=True):
    """All gradients by name. x has do and d_final_state."""
    call, of_keys, do = operands(x, scale), steps.of_keys(), x.do
    if x.normalize:
        do = steps.output_gradient(call, do, *steps.outputs(call, states))
    maps = of_keys.gradient_maps(call, do)
    found = {"q": steps.query_gradient(call, do, states)}
    d_states, found["initial_state"] = of_keys.scan(maps, x.d_final_state, reverse=True)
    found["k"], found["v"] = of_keys.key_value_gradient(call, do, d_states)
    if decay_gradient and x.log_decay is not None:
        found["log_decay"] = steps.decay_gradient(call, (do, found["q"], found["k"]), states, d_states)
    return found
