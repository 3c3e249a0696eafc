"""`InferenceState`: all that a model knows of the tokens of some rows, to go on from; in memory, or in a file."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lasp import arguments
from lasp.checks.checksum import checksums, form
from lasp.models.trunk import LanguageModel
from lasp.ops.session import Held, Key, with_room
from lasp.ranks.parts import parts_of_model

_FORMAT = "lasp.InferenceState 2"


class InferenceState:
    """What `lasp.prefill` and `lasp.generate` return, and go on from. They never change one that they are given.

    Of each row it is all that depends on the tokens so far: of a linear layer its state (fp32; fp64 of a model in
    fp64), of a short convolution, a window or a block the last tokens, and of softmax attention without a window the
    keys and values of all. Without such layers its size does not depend on the number of tokens.

    Attributes:
        lengths: tokens that each row has seen, which is the position of its next one.
        logits: [B, vocab], fp32 (fp64): of each row's next token.
        seen: [B, vocab], bool: which tokens a row has seen, for `repetition_penalty`.
        held: what each call of an operator holds, by its layer.
        model: of which model it is, in words.
    """

    def __init__(self, held: dict[Key, Held], lengths: Iterable[int], logits: Tensor, seen: Tensor, model: str):
        self.held, self.lengths, self.logits, self.seen, self.model = held, tuple(lengths), logits, seen, model

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """The device of the state."""
        return self.logits.device

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together, with the room that keys and values have for more tokens."""
        return sum(x.nbytes for x in self._tensors().values())

    def select(self, rows: Sequence[int]) -> InferenceState:
        """A copy of some rows, in this order; a row may be there more than once.

        Raises:
            TypeError, ValueError: rows that are no integers from 0 to the number of rows - 1, or none.
        """
        found = arguments.integers("rows", rows)
        if not found or not 0 <= min(found) <= max(found) < len(self):
            raise ValueError(f"rows must be some of 0 to {len(self) - 1}, got {arguments.shown(rows)}")
        index = torch.tensor(found, device=self.device)
        lengths = tuple(self.lengths[row] for row in found)
        most = max(lengths)
        held = {
            key: Held((x[:, :most] if grows else x).index_select(0, index), grows)
            for key, (x, grows) in self.held.items()
        }
        logits, seen = (x.index_select(0, index) for x in (self.logits, self.seen))
        return InferenceState(held, lengths, logits, seen, self.model)

    def fork(self) -> InferenceState:
        """A copy of all rows."""
        return self.select(range(len(self)))

    def to(self, device: Any) -> InferenceState:
        """The state on another device; the same tensors where they lie there already."""
        where = arguments.device("device", device)
        held = {key: Held(x.to(where), grows) for key, (x, grows) in self.held.items()}
        return InferenceState(held, self.lengths, self.logits.to(where), self.seen.to(where), self.model)

    @classmethod
    def join(cls, states: Sequence[InferenceState]) -> InferenceState:
        """The rows of several, of one model and on one device, one after the other; a copy.

        Raises:
            TypeError, ValueError: states that are none, or of different models.
        """
        if not isinstance(states, (list, tuple)) or not states or not all(isinstance(x, cls) for x in states):
            raise TypeError(f"states must be a list of InferenceState, got {arguments.shown(states)}")
        first = states[0]
        for other in states[1:]:
            if other.model != first.model or other.held.keys() != first.held.keys():
                raise ValueError(f"states must be of one model, got {first.model} and {other.model}")
            if other.device != first.device:
                raise ValueError(f"states must lie on one device, got {first.device} and {other.device}")
        lengths = tuple(length for state in states for length in state.lengths)
        held = {}
        for key, (_, grows) in first.held.items():
            parts = [state.held[key].x for state in states]
            if grows:
                parts = [with_room(x, max(s.lengths), max(lengths)) for x, s in zip(parts, states)]
            held[key] = Held(torch.cat(parts), grows)
        logits, seen = (torch.cat([getattr(state, name) for state in states]) for name in ("logits", "seen"))
        return cls(held, lengths, logits, seen, first.model)

    # Files

    def save(self, path: str | os.PathLike) -> None:
        """Write it as one safetensors file, which is there whole or not at all.

        Raises:
            TypeError: a path that is none.
            ImportError: safetensors is missing.
        """
        path, save = _path(path), _safetensors().save
        tensors = {name: x.cpu().contiguous() for name, x in self._tensors(used=True).items()}
        told = {
            "format": _FORMAT,
            "model": self.model,
            "lengths": json.dumps(self.lengths),
            "held": json.dumps([[*key, held.grows] for key, held in self.held.items()]),
        }
        _write(path, save(tensors, metadata={**told, "checksum": _checksum(tensors, told)}))

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: Any = None) -> InferenceState:
        """Read what `save` has written; on the CPU, or on a `device`.

        Raises:
            TypeError, ValueError: a path that is none; a file that is no state, that was cut off or has changed.
            ImportError: safetensors is missing.
        """
        path, library = _path(path), _safetensors()
        where = arguments.device("device", device) or torch.device("cpu")
        try:
            with library.safe_open(path, "pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except library.SafetensorError as error:
            raise ValueError(f"path must be a whole file of InferenceState.save, got {str(path)!r}: {error}") from error
        if told.get("format") != _FORMAT:
            raise ValueError(f"path must be a file of InferenceState.save, got {str(path)!r} of {told.get('format')!r}")
        if told.pop("checksum", None) != _checksum(tensors, told):
            raise ValueError(f"path must be a file as InferenceState.save wrote it, got {str(path)!r} that has changed")
        held = {
            Key(*key): Held(tensors[f"held.{number}"].to(where), grows)
            for number, (*key, grows) in enumerate(json.loads(told["held"]))
        }
        logits, seen = (tensors[name].to(where) for name in ("logits", "seen"))
        return cls(held, json.loads(told["lengths"]), logits, seen, told["model"])

    def _tensors(self, *, used: bool = False) -> dict[str, Tensor]:
        """All of them; `used`: of what grows only what a row uses, and zeros elsewhere."""
        found = {"logits": self.logits, "seen": self.seen}
        for number, (x, grows) in enumerate(self.held.values()):
            if grows and used:
                x = x[:, : max(self.lengths)].clone()
                for row, length in enumerate(self.lengths):
                    x[row, length:] = 0
            found[f"held.{number}"] = x
        return found

    # Whether it fits

    def check(self, name: str, model: str, device: torch.device, rows: int | None = None) -> None:
        """Raise `ValueError`, with the argument's name, unless it is of this model, device and number of rows."""
        if self.model != model:
            raise ValueError(f"{name} must be of the model that it is given with, {model}, got one of {self.model}")
        if self.device != device:
            raise ValueError(f"{name} must lie where the model does, on {device}, got {self.device}: {name}.to(device)")
        if rows is not None and rows != len(self):
            raise ValueError(f"{name} must have as many rows as ids, {rows}, got {len(self)}")

    def __repr__(self) -> str:
        tokens = f"{min(self.lengths):,} to {max(self.lengths):,}" if len(set(self.lengths)) > 1 else self.lengths[0]
        return f"InferenceState({len(self)} rows of {tokens} tokens, {self.nbytes:,} bytes on {self.device})"


def form_of(model: nn.Module) -> str:
    """Which model a state is of: its class, the configuration of one of `lasp.models` (decays are no parameters), and
    the names, shapes and dtypes of its parameters; not their values."""
    forms = [(_plain(name), form(p)) for name, p in model.named_parameters()]
    configured = [m.config for m in model.modules() if isinstance(m, LanguageModel) and hasattr(m, "config")]
    inner = model
    while (wrapped := next((getattr(inner, x, None) for x in ("module", "_orig_mod")), None)) is not None:
        inner = wrapped
    told = f"{type(inner).__name__.removeprefix('FSDP')} with {len(forms)} parameters, checksum "
    return f"{told}{zlib.crc32(repr((forms, configured)).encode()):08x}{_part_of(model)}"


def _part_of(model: nn.Module) -> str:
    """Which of the parts of tensor parallelism it is: a state has the heads of this rank."""
    meshes = (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    mesh = next((mesh for mesh in meshes if "tp" in (mesh.mesh_dim_names or ())), None)
    return "" if mesh is None else f", part {mesh.get_local_rank('tp')} of {parts_of_model(model)}"


def _plain(name: str) -> str:
    """A parameter's name without those of what wraps its layers."""
    wraps = ("module", "_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wraps)


def _checksum(tensors: dict[str, Tensor], told: dict[str, str]) -> str:
    """Of numbers, and of what is told of them."""
    return f"{zlib.crc32(repr(sorted([*checksums(tensors).items(), *told.items()])).encode()):08x}"


def _path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be the path of a file, got {arguments.shown(path)}")
    return Path(path)


def _write(path: Path, content: bytes) -> None:
    """Beside it first, so that a process that ends meanwhile leaves the file of before."""
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("a state's file needs safetensors: pip install safetensors") from error

    class Library:
        save = staticmethod(safetensors.torch.save)
        safe_open = safetensors.safe_open
        SafetensorError = safetensors.SafetensorError

    return Library
