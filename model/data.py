"""Batches, the same ones for the same number and seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .train import Batch


def generator(seed: int, number: int) -> torch.Generator:
    """Random numbers that depend on these two alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def chosen(number: int, size: int, of: int, seed: int) -> list[int]:
    """The indices of the examples in a batch: every one of them once in each pass through all.

    >>> sorted(chosen(0, 2, 4, seed=0) + chosen(1, 2, 4, seed=0))
    [0, 1, 2, 3]
    """
    passes, first = divmod(number * size, of)
    order = torch.randperm(of, generator=generator(seed, passes)).tolist()
    while len(order) < first + size:
        passes += 1
        order += torch.randperm(of, generator=generator(seed, passes)).tolist()
    return order[first : first + size]


def pack(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (total,) one sequence behind the other, and lengths (batch,), as `Transformer.encode` takes them.

    >>> pack([[1, 2], [3]])
    (tensor([1, 2, 3]), tensor([2, 1]))
    """
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    return torch.tensor([token for tokens in sequences for token in tokens]), lengths


def windows(stream: Tensor, number: int, size: int, length: int, seed: int) -> Batch:
    """Pieces from anywhere of a long text; each token's target is the next."""
    if len(stream) <= length:
        raise ValueError(f"a text must have more tokens than the context of {length}, got {len(stream)}")
    firsts = torch.randint(0, len(stream) - length, (size, 1), generator=generator(seed, number))
    pieces = stream[firsts + torch.arange(length + 1)]
    return Batch(dict(tokens=pieces[:, :-1]), pieces[:, 1:])
