# pyright: reportCallIssue=false, reportArgumentType=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The steps of elementwise.py on the Triton kernels of scan.py and scan_selective.py.

Where nothing is asked between the maps and the state that enters (one rank), nothing is launched for `local_maps` and
`scan`: `outputs` and `gradients` read the tokens once, and fill what `scan` has returned. Else `run_map` computes the
maps of tiles, and `scan` what enters groups of them. States are fp32, and results the same bits every time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp_kernels import scan, scan_selective
from lasp_kernels.delta import host_bounds
from lasp_kernels.elementwise import RecurrenceOperands, document_starts
from lasp_kernels.launch import Launch, layout
from lasp_kernels.selective_scan import MOST_STATES, SelectiveOperands

STATES = 4  # of a channel that backward of a selective scan holds at once
GROUP = 8  # tiles
PREFIX_BLOCK = 64  # channels of a program of `prefix_kernel`


class Config(NamedTuple):
    """How the programs of an operator are laid out."""

    strips: int  # of a tile, one a warp
    tokens: int  # of a strip
    channels: int
    registers: int  # of a thread, so that more programs have room; what they do not hold lies in the L1 cache


RECURRENCE, SELECTIVE = Config(4, 16, 64, 128), Config(4, 16, 32, 255)


@dataclass
class TileMaps:
    """What each tile does to a state that passes, once that is computed: log and state [B, tiles, numbers]."""

    x: Any
    dy: Tensor | None
    log: Tensor | None = None
    state: Tensor | None = None


class Entering(NamedTuple):
    """What `scan` was told, until the step that reads the tokens."""

    maps: TileMaps
    state: Tensor | None  # before all tokens (in backward: behind)
    prefix: Tensor | None  # before each group of tiles; None if the launch finds them itself
    end: Tensor


class TileSteps(ABC):
    """The steps of `elementwise.ElementwiseSteps` on a GPU."""

    config: Config

    def __init__(self, like: Tensor, channels: tuple[int, ...], cu_seqlens: Sequence[int] | None):
        """`like` [B, T, ...] has the tokens of inputs; `channels` is the shape of a state."""
        self.heads, self.dtype, self.device = 1, torch.float32, like.device
        self.batch, self.tokens = like.shape[:2]
        self.channels, self.numbers = channels, torch.Size(channels).numel()
        self.segment_length = self.config.tokens  # of a strip: the states that enter these are kept
        self.tiles = -(-self.tokens // (self.config.strips * self.config.tokens))
        self.groups = -(-self.tiles // GROUP)
        bounds = None if cu_seqlens is None else tuple(host_bounds(cu_seqlens, self.batch, self.tokens))
        self._starts = None if bounds is None else document_starts(bounds, self.tokens, self.device)
        self._entering: Entering | None = None

    # What the operators differ in

    @property
    def _inner(self) -> int:
        """How many numbers of a state lie together where others put it, and apart in the kernels' own."""
        return 1

    @property
    @abstractmethod
    def _blocks(self) -> int:
        """How many blocks of channels there are; a program has one of them, in one tile."""

    @abstractmethod
    def _launch(self, maps: TileMaps, mode: int, **tensors: Any) -> None:
        """Start the kernel of a pass over all tiles."""

    # The steps

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def zero_state(self) -> Tensor:
        """A state of zeros for every run at a border of the tokens: [N, 1, channels, 1]."""
        return torch.zeros(self.batch, 1, self.numbers, 1, dtype=torch.float32, device=self.device)

    def local_maps(self, x: Any) -> TileMaps:
        """What tiles do to a state, when it is asked."""
        return TileMaps(x, None)

    def gradient_maps(self, x: Any, dy: Tensor) -> TileMaps:
        """What tiles do to the gradient of a state, when it is asked."""
        return TileMaps(x, dy)

    def run_map(self, maps: TileMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """What all tokens do to a state that passes, and leave in the run at their end (`reverse`: beginning)."""
        end, log = self._empty(self.batch, 1, self.numbers, 1), self._empty(self.batch, 1, self.numbers)
        if not self.tokens:
            return end.zero_(), log.zero_()
        if maps.log is None:
            maps.log, maps.state = (self._empty(self.batch, self.tiles, self.numbers) for _ in range(2))
            self._launch(maps, scan.MAPS.value, log=maps.log, state=maps.state)
        self._prefixes(maps, None, None, end, log)
        return end, log

    def border_maps(self, maps: TileMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """There is no `segment_length` for which these are asked."""
        raise NotImplementedError

    def scan(self, maps: TileMaps, entering: Tensor | None, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """From the state that enters the tokens: those that enter strips [B, strips, *channels]; the one behind.

        `outputs` (reversed: `gradients`) must follow, and fills both. Of gradients none are kept.
        """
        end = self._empty(self.batch, 1, self.numbers, 1)
        states = self._empty(self.batch, 0 if reverse else self.tiles * self.config.strips, *self.channels)
        if entering is not None:
            entering = entering.to(torch.float32).contiguous()
        if not self.tokens:
            return states, end.zero_() if entering is None else entering.view(end.shape).clone()
        prefix = None
        if maps.log is not None:
            prefix = self._empty(self.batch, self.groups, self.numbers)
            self._prefixes(maps, entering, prefix, end, None)
        self._entering = Entering(maps, entering, prefix, end)
        return states, end

    def _prefixes(
        self, maps: TileMaps, entering: Tensor | None, prefix: Tensor | None, end: Tensor, log_end: Tensor | None
    ) -> None:
        C = self.numbers
        launch = _launches.of(
            ("prefix", C, self._inner, entering is None, prefix is None, log_end is None, self._starts is None),
            (self.batch, self.tiles), self.device,
            lambda: Launch(
                scan.prefix_kernel, self.device, (self.batch, -(-C // PREFIX_BLOCK)),
                (self.tiles, self.groups, C, C // self._inner), BC=PREFIX_BLOCK, GROUP=GROUP,
                PACKED=self._starts is not None, num_warps=2,
            ),
            entering,
        )  # fmt: skip
        launch(maps.log, maps.state, prefix, entering, end, log_end)

    def _taken(self) -> Entering:
        """What `scan` was told, once."""
        found, self._entering = self._entering, None
        assert found is not None, "scan comes before"
        return found

    def _walk(self, **tensors: Any) -> None:
        """The pass that writes results, from what `scan` was told."""
        entering = self._taken()
        maps, flags, prefix = entering.maps, None, entering.prefix
        mode = scan.WALK.value
        if prefix is None:
            mode = scan.ALONE.value
            maps.log, maps.state = (self._empty(self.batch, self.tiles, self.numbers) for _ in range(2))
            prefix = self._empty(self.batch, self.groups, self.numbers)
            count = 1 + self._blocks * self.batch * (self.tiles + self.groups)
            flags = torch.zeros(count, dtype=torch.int32, device=self.device)
        self._launch(
            maps, mode, log=maps.log, state=maps.state, prefix=prefix, entering=entering.state, end=entering.end,
            flags=flags, **tensors,
        )  # fmt: skip
        maps.log = maps.state = None


class _Launches:
    """The newest launches, by all that Triton specializes on in the arguments."""

    MOST = 512

    def __init__(self) -> None:
        self._kept: dict[tuple, Launch] = {}

    def of(
        self, kind: tuple, sizes: tuple, device: torch.device, make: Callable[[], Launch], *tensors: Tensor | None
    ) -> Launch:
        """The launch of a kind of call, for tensors of these layouts and dtypes."""
        key = (kind, sizes, device, *(None if x is None else (x.dtype, layout(x)) for x in tensors))
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= self.MOST:
                self._kept.clear()
            found = self._kept[key] = make()
        return found


_launches = _Launches()


def _flat(x: Tensor) -> Tensor:
    """[B, T, ...] to [B, T, C], whose last dimension is dense."""
    x = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """The strides of the batch and of tokens."""
    return tuple(n for x in tensors for n in x.stride()[:2])


class TileRecurrenceSteps(TileSteps):
    """The steps for `RecurrenceOperands` in fp32, bf16 or fp16."""

    config = RECURRENCE

    def __init__(self, x: RecurrenceOperands, *, cu_seqlens: Sequence[int] | None = None):
        super().__init__(x.x, tuple(x.x.shape[2:]), cu_seqlens)
        self._block = min(self.config.channels, power_of_two(self.numbers))

    @property
    def _blocks(self) -> int:
        return -(-self.numbers // self._block)

    def _operands(self, x: RecurrenceOperands) -> tuple[Tensor, Tensor, int]:
        """x [B, T, C], log_decay [B, T, C | 1], and its stride from channel to channel."""
        if x.log_decay.shape[2:].numel() not in (1, self.numbers):  # 1 in some dimensions only
            x = x._replace(log_decay=x.log_decay.expand_as(x.x))
        g = _flat(x.log_decay)
        return _flat(x.x), g, int(g.shape[2] == self.numbers)

    def outputs(self, x: RecurrenceOperands, states: Tensor) -> tuple[Tensor, None]:
        """h in the dtype of x."""
        y = torch.empty(x.x.shape, dtype=x.x.dtype, device=self.device)
        if self.tokens:
            self._walk(y=y, states=states)
        return y, None

    def gradients(
        self,
        x: RecurrenceOperands,
        dy: Tensor,
        states: Tensor,
        kept: Tensor | None,
        d_states: Tensor,
        needed: Sequence[bool],
    ) -> tuple[Tensor, Tensor | None]:
        """dx and, if needed, d log_decay."""
        dx = torch.empty(x.x.shape, dtype=x.x.dtype, device=self.device)
        summed = x.log_decay.shape != x.x.shape
        dg = None
        if needed[1]:
            dtype = torch.float32 if summed else x.log_decay.dtype
            dg = torch.empty(x.x.shape, dtype=dtype, device=self.device)
        if self.tokens:
            self._walk(y=dx, states=states, dg=dg)
        return dx, dg.sum_to_size(x.log_decay.shape) if summed and dg is not None else dg

    def _launch(
        self,
        maps: TileMaps,
        mode: int,
        *,
        y: Tensor | None = None,
        dg: Tensor | None = None,
        log: Tensor | None = None,
        state: Tensor | None = None,
        prefix: Tensor | None = None,
        entering: Tensor | None = None,
        states: Tensor | None = None,
        end: Tensor | None = None,
        flags: Tensor | None = None,
    ) -> None:
        x, g, g_c = self._operands(maps.x)
        dy = None if maps.dy is None else _flat(maps.dy)
        others = (self._starts, log, state, prefix, entering, states, end, log if flags is None else flags)
        if dy is None:
            tensors, kernel = (x, g, y, *others), scan.recurrence_kernel
            strides = _strides(x, g)
        else:
            tensors, kernel = (dy, x, g, y, dg, *others), scan.recurrence_gradient_kernel
            strides = _strides(dy, x, g)
        programs = self._blocks * self.batch * self.tiles
        launch = _launches.of(
            ("recurrence", mode, dy is None, self.config, g_c), (self.batch, self.tokens, self.numbers), self.device,
            lambda: Launch(
                kernel, self.device, (programs, 1),
                (self.batch, self.tokens, self.tiles, self.groups, self.numbers, *strides, g_c),
                S=self.config.strips, U=self.config.tokens, BC=self._block, GROUP=GROUP, MODE=mode,
                PACKED=self._starts is not None, num_warps=self.config.strips, maxnreg=self.config.registers,
            ),
            *tensors,
        )  # fmt: skip
        launch(*tensors)


class TileSelectiveSteps(TileSteps):
    """The steps for `SelectiveOperands` in fp32, bf16 or fp16."""

    config = SELECTIVE

    def __init__(self, x: SelectiveOperands, *, cu_seqlens: Sequence[int] | None = None):
        super().__init__(x.u, tuple(x.A.shape), cu_seqlens)
        self._block = min(power_of_two(self.channels[0]), self.config.channels)

    @property
    def _inner(self) -> int:
        return self.channels[1]

    @property
    def _blocks(self) -> int:
        return -(-self.channels[0] // self._block)

    def outputs(self, x: SelectiveOperands, states: Tensor) -> tuple[Tensor, None]:
        """y [B, T, D] in the dtype of u."""
        y = torch.empty(x.u.shape, dtype=x.u.dtype, device=self.device)
        if self.tokens:
            self._walk(y=y, states=states)
        return y, None

    def gradients(
        self,
        x: SelectiveOperands,
        dy: Tensor,
        states: Tensor,
        kept: Tensor | None,
        d_states: Tensor,
        needed: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """The gradients of all operands, which share nearly all of the work."""
        if not self.tokens:
            return tuple(torch.zeros_like(y) for y in x)
        D, N = self.channels
        du, d_dt = (torch.empty(y.shape, dtype=y.dtype, device=self.device) for y in (x.u, x.dt))
        dA = self._empty(self.batch, self.tiles, N, D)
        dB, dC = (self._empty(self._blocks, *x.B.shape) for _ in range(2))
        self._walk(y=du, states=states, others=(d_dt, dA, dB, dC))
        return du, d_dt, dA.sum((0, 1)).mT.contiguous(), dB.sum(0), dC.sum(0)  # dense, as ranks add them up

    def _launch(
        self,
        maps: TileMaps,
        mode: int,
        *,
        y: Tensor | None = None,
        others: tuple[Tensor | None, ...] = (None,) * 4,
        log: Tensor | None = None,
        state: Tensor | None = None,
        prefix: Tensor | None = None,
        entering: Tensor | None = None,
        states: Tensor | None = None,
        end: Tensor | None = None,
        flags: Tensor | None = None,
    ) -> None:
        x = tuple(_dense(y) for y in maps.x)
        settings = {}
        more = (self._starts, log, state, prefix, entering, states, end, log if flags is None else flags)
        if maps.dy is None:
            tensors, kernel = (*x, y, *more), scan_selective.selective_kernel
            strides = _strides(x[0], x[1], *x[3:])
        else:
            dy = _dense(maps.dy)
            settings["V"] = min(STATES, self.config.tokens)
            tensors, kernel = (dy, *x, y, *others, *more), scan_selective.selective_gradient_kernel
            strides = _strides(dy, x[0], x[1], *x[3:])
        programs = self._blocks * self.batch * self.tiles
        launch = _launches.of(
            ("selective", mode, maps.dy is None, self.config), (self.batch, self.tokens, self.channels), self.device,
            lambda: Launch(
                kernel, self.device, (programs, 1),
                (self.batch, self.tokens, self.tiles, self.groups, *self.channels, *strides),
                S=self.config.strips, U=self.config.tokens, NP=power_of_two(self._inner), BD=self._block, GROUP=GROUP,
                MODE=mode, PACKED=self._starts is not None, num_warps=self.config.strips, maxnreg=self.config.registers,
                **settings,
            ),
            *tensors,
        )  # fmt: skip
        launch(*tensors)


def _dense(x: Tensor) -> Tensor:
    """x with a dense last dimension; a parameter dense altogether."""
    return x if x.stride(-1) == 1 and x.ndim == 3 else x.contiguous()


def unsupported(x: RecurrenceOperands | SelectiveOperands) -> str | None:
    """What the kernels take in place of what these inputs have; None where they serve."""
    if x[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"fp32, bf16 or fp16, got {x[0].dtype}"
    if isinstance(x, SelectiveOperands) and x.A.shape[1] > MOST_STATES:
        return f"up to {MOST_STATES} states a channel, got {x.A.shape[1]}"
    return None


def power_of_two(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
