"""Batches, the same ones for the same number and seed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """What the model is called with, and what its logits are held against, as `heads.loss` has it."""

    inputs: dict[str, Tensor]
    targets: Tensor

    @property
    def tokens(self) -> int:
        """That the model reads: of an encoder-decoder, on both sides."""
        return sum(self.inputs[name].numel() for name in ("tokens", "targets") if name in self.inputs)


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


def windows(stream: Tensor, number: int, size: int, length: int, seed: int) -> Batch:
    """Pieces from anywhere of a long text; each token's target is the next."""
    if len(stream) <= length:
        raise ValueError(f"a text must have more tokens than the context of {length}, got {len(stream)}")
    firsts = torch.randint(0, len(stream) - length, (size, 1), generator=generator(seed, number))
    pieces = stream[firsts + torch.arange(length + 1)]
    return Batch(dict(tokens=pieces[:, :-1]), pieces[:, 1:])
