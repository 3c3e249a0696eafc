"""The prompts of a call, in whatever form they are given: rows of tokens without padding."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from lasp import arguments


def prompts_of(
    ids: Any,
    *,
    attention_mask: Any = None,
    cu_seqlens: Any = None,
    pad_token_id: int | None = None,
    vocabulary: int | None = None,
) -> list[Tensor]:
    """Rows [T] of int64, each with at least one token, where they lay.

    Args:
        ids: [B, T] or, of one row, [T]; or a list of rows, tensors [T] or lists of integers.
        attention_mask: [B, T], 0 where tokens of a tensor are padding, at the left or right end of a row.
        cu_seqlens: offsets [N + 1] of prompts that are packed in one row.
        pad_token_id: tokens at both ends of a row that are padding, where no attention_mask says so.
        vocabulary: of the model, if it is known.

    Raises:
        TypeError, ValueError: what does not fit.
    """
    rows = _rows(ids)
    if attention_mask is not None:
        rows = _masked(ids, rows, attention_mask)
    elif pad_token_id is not None:
        rows = [_without(row, pad_token_id) for row in rows]
    if cu_seqlens is not None:
        rows = _unpacked(rows, cu_seqlens)
    for number, row in enumerate(rows):
        if not row.numel():
            raise ValueError(f"ids must have at least one token in each row, got none in row {number}")
    if vocabulary is not None:
        _check_words(rows, vocabulary)
    return rows


def _rows(ids: Any) -> list[Tensor]:
    if isinstance(ids, Tensor):
        arguments.integer_tensor("ids", ids)
        if ids.ndim not in (1, 2) or not len(ids):
            raise ValueError(f"ids must have shape [B, T] or [T] with at least one row, got {tuple(ids.shape)}")
        return list(ids.long().unbind()) if ids.ndim == 2 else [ids.long()]
    if not isinstance(ids, (list, tuple)) or not ids:
        raise TypeError(f"ids must be a tensor [B, T] of integers, or a list of rows, got {arguments.shown(ids)}")
    if isinstance(ids[0], numbers.Integral):
        return [torch.tensor(arguments.integers("ids", ids))]
    return [_row(row) for row in ids]


def _row(row: Any) -> Tensor:
    if not isinstance(row, Tensor):
        return torch.tensor(arguments.integers("ids", row), dtype=torch.int64)
    if arguments.integer_tensor("ids", row).ndim != 1:
        raise ValueError(f"ids must be rows [T] where they are a list, got one of {tuple(row.shape)}")
    return row.long()


def _masked(ids: Any, rows: list[Tensor], mask: Any) -> list[Tensor]:
    if not isinstance(ids, Tensor):
        raise ValueError("attention_mask goes with ids that are a tensor: rows of a list have no padding, got a list")
    arguments.padding_mask("attention_mask", mask, "ids", ids, read=True)
    found = []
    for number, (row, real) in enumerate(zip(rows, mask.view(len(rows), -1) != 0)):
        first, last, count = _ends(real)
        if last - first != count:
            raise ValueError(
                f"attention_mask must have padding at the ends of a row only, got {last - first - count} holes "
                f"between the tokens of row {number}"
            )
        found.append(row[first:last])
    return found


def _without(row: Tensor, padding: int) -> Tensor:
    first, last, _ = _ends(row != padding)
    return row[first:last]


def _ends(real: Tensor) -> tuple[int, int, int]:
    """The first and the last + 1 of the places [T] that are True, and how many there are."""
    places = real.nonzero().flatten()
    count = places.numel()
    return (int(places[0]), int(places[-1]) + 1, count) if count else (0, 0, 0)


def _unpacked(rows: list[Tensor], cu_seqlens: Any) -> list[Tensor]:
    if len(rows) != 1:
        raise ValueError(
            f"cu_seqlens need ids of one row, got {len(rows)} rows and cu_seqlens {arguments.shown(cu_seqlens)}"
        )
    offsets = arguments.offsets("cu_seqlens", cu_seqlens, tokens=rows[0].numel(), of="ids")
    return [rows[0][start:end] for start, end in zip(offsets, offsets[1:])]


def _check_words(rows: list[Tensor], vocabulary: int) -> None:
    ends = torch.stack([torch.stack(row.aminmax()).cpu() for row in rows])
    least, most = int(ends.min()), int(ends.max())
    if least < 0 or most >= vocabulary:
        wrong = least if least < 0 else most
        raise ValueError(f"ids must be of the model's {vocabulary} tokens, 0 to {vocabulary - 1}, got {wrong}")
