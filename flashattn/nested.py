"""Nested tensors, of both of PyTorch's layouts, as packed rows and back."""

from __future__ import annotations

from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from . import arguments, tracing


class Jagged(Protocol):
    """The members of a tensor in PyTorch's jagged layout."""

    _ragged_idx: int

    def values(self) -> Tensor: ...
    def offsets(self) -> Tensor: ...
    def lengths(self) -> Tensor | None: ...


def is_nested(x) -> bool:
    return isinstance(x, Tensor) and x.is_nested


def is_jagged(x: Tensor) -> TypeGuard[Jagged]:
    return x.layout == torch.jagged


def check_nested(name: str, x, dims: int, shape: str) -> None:
    """Check that x is nested (batch, seq, ...) with `dims` dimensions, ragged along seq only."""
    arguments.check_floating(name, x)
    if not x.is_nested or x.dim() != dims or not _is_ragged_by_token(x):
        raise ValueError(f"{name} must be nested, {shape}")


def _is_ragged_by_token(x: Tensor) -> bool:
    if is_jagged(x):
        return x._ragged_idx == 1
    return len({part.shape[1:] for part in x.unbind()}) == 1


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows (total, ...), where sequences start and end (batch + 1,)) of a nested (batch, seq, ...)."""
    if is_jagged(x) and x.lengths() is None:  # no gaps between sequences
        return x.values(), x.offsets()
    parts = x.unbind()
    return torch.cat(parts), torch.tensor([0, *(part.shape[0] for part in parts)], device=x.device).cumsum(0)


def bound_longest(rows: Tensor) -> int | None:
    """An upper bound of the longest sequence in a graph, where lengths are not read; else None."""
    return rows.shape[0] if tracing.is_traced() else None


def check_same_lengths(name: str, starts: Tensor, other_name: str, other: Tensor) -> None:
    """Check that the sequences of two nested tensors have equal lengths."""
    if starts is not other and not torch.equal(starts, other):
        raise ValueError(
            f"{name} must have {other_name}'s lengths, {other.diff().tolist()}, got {starts.diff().tolist()}"
        )


def unpack(rows: Tensor, starts: Tensor, layout: torch.layout) -> Tensor:
    """Nested (batch, seq, ...) from rows (total, ...)."""
    if layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(rows, starts)
    return torch.nested.as_nested_tensor(list(rows.split(starts.diff().tolist())), layout=layout)
