"""Associative recall: pairs of a key and a value, hidden in noise, whose keys are asked for later.

    noise noise KEY VALUE noise noise noise ... noise KEY noise ...
                      |<------- distance -------->|
                                                  the model must say VALUE here

Every key occurs in one pair of a sequence and is asked for many times; the answers are not part of the sequence. Keys
and values are drawn anew for every sequence, so nothing but that pair tells an answer: who cannot see it is right as
often as chance has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NOBODY_ASKS = -100  # where a token is no question


@dataclass(frozen=True)
class Task:
    """Of a sequence how many keys, of how many values, among how many kinds of noise; tokens are in that order."""

    keys: int
    values: int
    noise: int = 64

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return self.keys + self.values + self.noise

    @property
    def shortest(self) -> int:
        """Tokens of a sequence in which pairs and questions take half the room."""
        return 8 * self.keys


@dataclass(frozen=True)
class Sequences:
    """Some sequences with their questions, which are numbered through.

    Attributes:
        ids: [B, T], int64.
        questions: [B, T], int64: the number of the question that a token is, or `NOBODY_ASKS`.
        answers: [Q], int64: the value, from 0.
        asked, told: [Q]: the place of the question, and that of the value that answers it.
    """

    ids: Tensor
    questions: Tensor
    answers: Tensor
    asked: np.ndarray
    told: np.ndarray

    @property
    def distances(self) -> np.ndarray:
        """[Q]: how many tokens an answer lies back."""
        return self.asked - self.told


def sequences(task: Task, rng: np.random.Generator, count: int, length: int, questions: int) -> Sequences:
    """So many sequences of `length` tokens, each with at most `questions` questions."""
    rows = [_sequence(task, rng, length, questions) for _ in range(count)]
    numbers = torch.full((count, length), NOBODY_ASKS)
    begin = 0
    for row, (_, asked, _, _) in zip(numbers, rows):
        row[torch.from_numpy(asked)] = torch.arange(begin, begin + len(asked))
        begin += len(asked)
    ids, asked, told, answers = zip(*rows)
    return Sequences(
        torch.from_numpy(np.stack(ids)),
        numbers,
        torch.from_numpy(np.concatenate(answers)),
        np.concatenate(asked),
        np.concatenate(told),
    )


def _sequence(task: Task, rng: np.random.Generator, length: int, questions: int) -> tuple[np.ndarray, ...]:
    """Tokens, and of each question its place, that of its value, and the value."""
    ids = task.keys + task.values + rng.integers(task.noise, size=length)
    # Pairs at even places, the first of them at 0: so there are questions of all distances.
    at = 2 * np.append(0, 1 + rng.choice(length // 2 - 1, task.keys - 1, replace=False))
    keys, values = rng.permutation(task.keys), rng.integers(task.values, size=task.keys)
    ids[at], ids[at + 1] = keys, task.keys + values
    taken = np.zeros(length, dtype=bool)
    taken[at] = taken[at + 1] = True
    # Far more questions than are wanted: most of the distant ones would lie behind the end. Logarithms of distances
    # are spread evenly.
    which = rng.integers(task.keys, size=8 * questions)
    distances = np.exp2(rng.uniform(0, math.log2(length - 1), size=8 * questions)).astype(np.int64)
    asked = at[which] + 1 + distances
    inside = np.flatnonzero(asked < length)
    which, asked = which[inside], asked[inside]
    _, first = np.unique(asked, return_index=True)  # one question a place
    first = np.sort(first[~taken[asked[first]]])[:questions]
    which, asked = which[first], asked[first]
    ids[asked] = keys[which]
    return ids, asked, at[which] + 1, values[which]
