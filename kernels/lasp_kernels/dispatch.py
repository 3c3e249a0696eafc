"""What computes a call, and the steps in which it is computed.

| device | inputs | path |
|---|---|---|
| CUDA | bf16, fp16, fp32; log_decay None, [H], [B, T, H]; K, V up to 256 | `steps.TritonSteps` |
| CUDA | the same with wider K or V | refused |
| CUDA | bf16, fp32; log_decay [B, T, H, K]; K, V up to 256; heads of q, k, v alike | `channel_steps.ChannelSteps` |
| CUDA | fp64, or log_decay [B, T, H, K] with anything else, a normaliser too | `chunked.ChunkedSteps` |
| CPU | any | `chunked.ChunkedSteps` |

The delta rule (`delta_steps_of`), and channels that decay each by itself (`elementwise_path`):

| CUDA | the delta rule in bf16, fp32; K, V up to 256 | `delta_kernel_steps.DeltaKernelSteps` |
| CUDA | recurrences in bf16, fp16, fp32; a selective scan with up to 256 numbers a channel | scan_steps.py |
| CUDA, CPU | anything else | delta_steps.py, elementwise.py, selective_scan.py |

One token more (`step_path`), of all operators:

| CUDA | bf16, fp16, fp32; K up to 1024, up to 256 numbers a channel of a selective scan | decode_kernels.py |
| CUDA, CPU | anything else | decode.py |

The environment variable LASP_KERNELS overrules this for debugging: "reference", or "triton", which raises a
`ValueError` where the kernels cannot serve and which runs on a CPU under Triton's interpreter (TRITON_INTERPRET=1).
LASP_DEBUG=1 prints each choice once. Nothing changes the path otherwise; `path` tells it: "triton", or "reference" for
PyTorch's products in chunked.py and delta_steps.py (not the loop in reference.py, which is the specification).

Products of fp32 inputs are true fp32, or TF32 on a GPU after `torch.set_float32_matmul_precision("high")`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from lasp_kernels.chunked import ChunkedSteps
from lasp_kernels.delta import DeltaOperands
from lasp_kernels.delta_steps import DeltaSteps
from lasp_kernels.elementwise import ElementwiseSteps, RecurrenceOperands, RecurrenceSteps
from lasp_kernels.operands import Operands
from lasp_kernels.paths import Path, path_of
from lasp_kernels.selective_scan import SelectiveOperands, SelectiveSteps

if TYPE_CHECKING:
    from lasp_kernels.scan_steps import TileSteps

Maps: TypeAlias = Any  # chunked.SegmentMaps or steps.PieceMaps; only the steps of the same path can read them
OutputGradient: TypeAlias = Any  # do; with a normaliser what `output_gradient` of the same path makes of it


class Steps(Protocol):
    """The steps of forward and backward on one device, for inputs of one shape.

    Forward: `local_maps` -> `scan` -> `outputs`. Backward: `query_gradient` needs the scanned states of
    forward only; `gradient_maps` -> `scan(reverse=True)` -> `key_value_gradient`; `decay_gradient` last.
    Between the first and the second, `run_map` or `border_maps` give what these tokens do to a state that passes
    through, for others that hold the tokens before or behind. x are operands of the shapes and dtypes of the inputs.
    With a normaliser V of states is one more than that of v, and `output_gradient` is the first step of backward.
    """

    @property
    def tokens(self) -> int:
        """Of the inputs."""
        ...

    @property
    def heads(self) -> int:
        """Of states: of k and v, or where heads of v share one of k, of v."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of states."""
        ...

    @property
    def segment_length(self) -> int:
        """The most tokens that a segment may have, whatever the number of tokens here."""
        ...

    @property
    def states_shape(self) -> tuple[int, ...]:
        """Of the states that `scan` returns."""
        ...

    def zero_state(self) -> Tensor:
        """A state of zeros for every run: [N, H, K, V]."""
        ...

    def of_end(self, tokens: int) -> Steps:
        """For the last `tokens` of the inputs alone, for their `run_map`.

        Where these are all that a state remembers, that is the map of all tokens, and known earlier.
        """
        ...

    def of_keys(self) -> Steps:
        """For the gradients of k and v; may return these."""
        ...

    def local_maps(self, x: Operands, *, needs_end: bool = True) -> Maps:
        """What each segment does to a state. Of q only the shape counts.

        `needs_end`: whether the state behind the last token is needed.
        """
        ...

    def gradient_maps(self, x: Operands, do: OutputGradient) -> Maps:
        """The same for the gradient of a state, which passes from the last segment to the first."""
        ...

    def run_map(self, maps: Maps, *, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """All segments of each run as one map: its local state [N, H, K, V] and log-decay [N, H, K | 1] or None."""
        ...

    def border_maps(self, maps: Maps, *, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """The segments one by one as maps, in the order in which a state passes through them, for `fold`.

        state [U, N, H, K, V] and log_decay [U, N, H, K | 1] or None. Packed, only of the run that reaches the end of
        the tokens (`reverse`: their beginning), since tokens elsewhere can continue no other: N is 1, and U may be 0.
        They need a given segment_length.
        """
        ...

    def scan(self, maps: Maps, entering: Tensor | None, *, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """From the state that enters each run [N, H, K, V]: states that only these steps can read, and the one behind.

        The left fold of the maps; with `reverse` from the last segment to the first. None enters: zeros. None instead
        of the state behind all where the maps leave it out.
        """
        ...

    def outputs(self, x: Operands, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """o [B, T, H*G, V] from the states of `scan`; with a normaliser also its denominators [B, H*G, T]."""
        ...

    def output_gradient(self, x: Operands, do: Tensor, o: Tensor, denominators: Tensor) -> OutputGradient:
        """With a normaliser: what the other steps of backward take as `do`."""
        ...

    def query_gradient(self, x: Operands, do: OutputGradient, states: Tensor) -> Tensor:
        """dq, from the states that `scan` gave in forward."""
        ...

    def key_value_gradient(self, x: Operands, do: OutputGradient, d_states: Tensor) -> tuple[Tensor, Tensor]:
        """dk and dv, from the states of `scan(reverse=True)`."""
        ...

    def decay_gradient(
        self, x: Operands, gradients: tuple[OutputGradient, Tensor, Tensor], states: Tensor, d_states: Tensor
    ) -> Tensor:
        """d log_decay in its shape, from do, dq and dk, and the states of both scans."""
        ...


def path(x: Operands | DeltaOperands) -> Path:
    """What computes these inputs (see the table above)."""
    if isinstance(x, DeltaOperands):
        return path_of(x.k, served=_serves_delta(x))
    return path_of(x.k, served=not _per_channel(x) or _serves_channels(x))


def _per_channel(x: Operands | DeltaOperands) -> bool:
    return x.log_decay is not None and x.log_decay.ndim == 4


def _serves_channels(x: Operands) -> bool:
    """Whether the kernels of a decay per channel do; asked on a GPU alone, for elsewhere there may be no Triton."""
    if not x.k.is_cuda:
        return False
    from lasp_kernels.channel_steps import unsupported

    return unsupported(x) is None


def _serves_delta(x: DeltaOperands) -> bool:
    """The same of the delta rule's kernels."""
    if not x.k.is_cuda:
        return False
    from lasp_kernels.delta_kernel_steps import unsupported

    return unsupported(x) is None


def steps_of(
    x: Operands,
    *,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    segment_length: int | None = None,
    decay_gradient: bool = False,
    ends: bool = True,
) -> Steps:
    """The steps of the path for these inputs.

    Args:
        x: the inputs, checked by `check_inputs`. q may be a stand-in of the right shape until `outputs`.
        cu_seqlens: offsets of packed sequences; on the host, or the host waits for them.
        segment_length: tokens of a segment, a multiple of 64; None chooses. If it is given, the bits of a sequence
            do not depend on what is packed beside it, nor on where it is cut, if at the border of a segment.
        decay_gradient: whether `decay_gradient` will be called.
        ends: whether a state enters or the one behind the last token is wanted, or such a gradient in backward.
    """
    chosen = path(x)
    if "LASP_DEBUG" in os.environ:
        _tell(chosen, x)
    if chosen == "reference":
        return ChunkedSteps(x, cu_seqlens=cu_seqlens, segment_length=segment_length, decay_gradient=decay_gradient)
    # Where Triton is not installed, nothing else needs these.
    if _per_channel(x):
        from lasp_kernels.channel_steps import ChannelSteps as KernelSteps
    else:
        from lasp_kernels.steps import TritonSteps as KernelSteps
    return KernelSteps.of(
        x, cu_seqlens=cu_seqlens, segment_length=segment_length, decay_gradient=decay_gradient, ends=ends
    )


def elementwise_path(x: RecurrenceOperands | SelectiveOperands) -> Path:
    """What computes a recurrence of these inputs (see above)."""
    if not x[0].is_cuda:
        return path_of(x[0], served=False)
    from lasp_kernels.scan_steps import unsupported

    return path_of(x[0], served=unsupported(x) is None)


def elementwise_steps_of(
    x: RecurrenceOperands | SelectiveOperands, *, cu_seqlens: Sequence[int] | None = None
) -> ElementwiseSteps | TileSteps:
    """The steps of that path."""
    recurrence = isinstance(x, RecurrenceOperands)
    if elementwise_path(x) == "reference":
        steps = RecurrenceSteps if recurrence else SelectiveSteps
    else:
        from lasp_kernels import scan_steps

        if (reason := scan_steps.unsupported(x)) is not None:
            raise ValueError(f"the Triton kernels of a recurrence take {reason}")
        steps = scan_steps.TileRecurrenceSteps if recurrence else scan_steps.TileSelectiveSteps
    return steps(x, cu_seqlens=cu_seqlens)  # type: ignore[arg-type]


def step_path(x: Tensor, *, rows: int = 1, states: int = 1) -> Path:
    """What computes a step of decode.py, from x of its inputs: with so many rows of a state, or states of a channel."""
    served = False
    if x.is_cuda:
        from lasp_kernels.decode_kernels import unsupported

        served = unsupported(x, rows=rows, states=states) is None
    chosen = path_of(x, served=served)
    if os.environ.get("LASP_DEBUG", "0") not in ("", "0"):
        _tell_once(f"lasp_kernels: {chosen} for a step of one token, {x.dtype} on {x.device.type}")
    return chosen


def delta_steps_of(
    x: DeltaOperands,
    *,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    segment_length: int | None = None,
    ends: bool = True,
) -> Any:
    """The steps of the delta rule for these inputs, checked by `check_delta_inputs`; see `delta_steps.DeltaSteps`.

    `ends` as in `steps_of`.
    """
    chosen = path(x)
    if "LASP_DEBUG" in os.environ:
        _tell(chosen, x)
    if chosen == "reference":
        return DeltaSteps(x, cu_seqlens=cu_seqlens, segment_length=segment_length)
    from lasp_kernels.delta_kernel_steps import DeltaKernelSteps

    return DeltaKernelSteps.of(x, cu_seqlens=cu_seqlens, segment_length=segment_length, ends=ends)


def _tell(chosen: Path, x: Operands | DeltaOperands) -> None:
    if os.environ["LASP_DEBUG"] not in ("", "0"):
        form = "none" if x.log_decay is None else f"{x.log_decay.ndim}-d"
        rule = "the delta rule, " if isinstance(x, DeltaOperands) else ""
        _tell_once(
            f"lasp_kernels: {chosen} for {rule}{x.k.dtype} on {x.k.device.type}, K {x.k.shape[-1]}, V {x.v.shape[-1]}, "
            f"decay {form}"
        )


@lru_cache
def _tell_once(message: str) -> None:
    print(message, file=sys.stderr)
