"""Batches that depend on their number and seed only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """The model's inputs, by name, and the targets of its logits, for `heads.compute_loss`."""

    inputs: dict[str, Tensor]
    targets: Tensor

    @property
    def tokens(self) -> int:
        """The number of tokens that the model reads; of an encoder-decoder, on both sides."""
        return sum(self.inputs[name].numel() for name in ("tokens", "targets") if name in self.inputs)


def make_generator(seed: int, number: int) -> torch.Generator:
    """A random generator that depends on these two only."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def sample_indices(number: int, size: int, total: int, seed: int) -> list[int]:
    """The indices of a batch of `total` examples; each epoch has every example once, in another order.

    >>> sorted(sample_indices(0, 2, 4, seed=0) + sample_indices(1, 2, 4, seed=0))
    [0, 1, 2, 3]
    """
    epoch, first = divmod(number * size, total)
    order = torch.randperm(total, generator=make_generator(seed, epoch)).tolist()
    while len(order) < first + size:
        epoch += 1
        order += torch.randperm(total, generator=make_generator(seed, epoch)).tolist()
    return order[first : first + size]


def random_windows(stream: Tensor, number: int, size: int, length: int, seed: int) -> Batch:
    """Windows at random places of a long text; each token's target is the next one."""
    if len(stream) <= length:
        raise ValueError(f"a text must have more tokens than the context of {length}, got {len(stream)}")
    firsts = torch.randint(0, len(stream) - length, (size, 1), generator=make_generator(seed, number))
    windows = stream[firsts + torch.arange(length + 1)]
    return Batch(dict(tokens=windows[:, :-1]), windows[:, 1:])
