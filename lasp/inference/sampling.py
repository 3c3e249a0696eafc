"""How the next token is chosen from logits: named and defined as in transformers, for each row by itself.

The number that chance gives to a token is made of the row's seed and the token's position, and of nothing else. So a
row gets the same tokens in whatever batch, on however many ranks, on a CPU and on a GPU (as far as their logits are the
same), and a generation that was broken off goes on as it would have.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp import arguments


@dataclass(frozen=True)
class Sampling:
    """Options, in the order in which they are applied.

    Args:
        do_sample: draw; else the most probable token, and the options behind `repetition_penalty` are not heeded.
        repetition_penalty: scores of tokens that a row has seen are divided by it if positive, else multiplied.
        temperature: scores are divided by it.
        top_k: of the tokens only so many with the highest scores; None or 0 is all.
        top_p: of these only the most probable, as many as are needed for this probability together.
    """

    do_sample: bool = False
    repetition_penalty: float = 1.0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        arguments.flag("do_sample", self.do_sample)
        arguments.number("repetition_penalty", self.repetition_penalty, positive=True)
        for name in ("temperature", "top_k", "top_p"):
            value = getattr(self, name)
            if value is None:
                continue
            if name == "top_k":
                arguments.integer(name, value, at_least=0)
            else:
                arguments.number(name, value, positive=self.do_sample or name == "top_p")
            if not self.do_sample:
                warnings.warn(f"{name}={value} is not heeded without do_sample=True", stacklevel=5)
        if self.top_p is not None and self.top_p > 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def scores(self, logits: Tensor, seen: Tensor) -> Tensor:
        """[B, vocab], -inf for what is left out, of logits [B, vocab] and which tokens a row has seen."""
        scores = logits
        if self.repetition_penalty != 1:
            changed = torch.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
            scores = torch.where(seen, changed, scores)
        if not self.do_sample:
            return scores
        if self.temperature not in (None, 1):
            scores = scores / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[-1]))[0][..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p not in (None, 1):
            ordered, places = scores.sort()
            out = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            out[..., -1] = False
            scores = scores.masked_fill(torch.zeros_like(out).scatter(-1, places, out), -torch.inf)
        return scores

    def choose(self, logits: Tensor, seen: Tensor, numbers: Sequence[float]) -> Tensor:
        """[B], int64: a token for each row, or -1 where its scores are no numbers. `numbers` in [0, 1) are those of
        chance, one for each row."""
        scores = self.scores(logits, seen)
        if not self.do_sample:
            most, tokens = scores.max(-1)
            return tokens.masked_fill(most.isnan(), -1)
        sums = scores.double().softmax(-1).cumsum(-1)
        total = sums[:, -1:]
        drawn = torch.tensor(numbers, dtype=torch.float64).to(sums.device, non_blocking=True)[:, None] * total
        # Below the whole sum also where the product was rounded up to it: behind are tokens that were left out.
        drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(sums, drawn, right=True).masked_fill(total.isnan(), -1)[:, 0]


def number_of(seed: int, position: int) -> float:
    """In [0, 1), for the token at a position of a row."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def seeds_of(seed: Any, rows: int) -> tuple[int, ...]:
    """One a row: what was given, or that and the numbers behind it."""
    if arguments.is_several(seed):
        found = arguments.integers("seed", seed)
        if len(found) != rows:
            raise ValueError(f"seed must be one, or one for each of {rows} rows, got {arguments.shown(seed)}")
        return found
    first = arguments.integer("seed", seed)
    return tuple(range(first, first + rows))
