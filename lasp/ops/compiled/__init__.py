"""The operators as custom ops, so that `torch.compile(fullgraph=True)` passes through a model that uses them.

A file an operator. Eager code does not come here. An op takes tensors and plain values only: a layout is its two lists
of integers as tensors on the host, and the ranks are a number in such a tensor. So nothing that differs between layers
or steps is a constant of the graph: layers share one, and packed sequences of other lengths need no other. Kernels and
exchange are opaque to the compiler; forward and backward are those of the operators' own files.
"""

from lasp.ops.compiled import attention, delta, elementwise, halo, softmax

__all__ = ["attention", "delta", "elementwise", "halo", "softmax"]
