"""What one forward pass needs to know of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .caches import CacheView


class Packed(NamedTuple):
    """Sequences that stand one behind the other without padding, as `flashattn.attention_varlen` takes them."""

    starts: Tensor  # (batch + 1,) int32: sequence b is starts[b] .. starts[b + 1]
    longest: int

    @classmethod
    def of(cls, lengths: Tensor) -> Packed:
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        starts[1:] = lengths.cumsum(0)
        return cls(starts, int(lengths.max()))

    def positions(self) -> Tensor:
        """(1, total): of each token in its sequence."""
        starts, lengths = self.starts[:-1].long(), self.starts.diff()
        return torch.arange(int(self.starts[-1]), device=lengths.device)[None] - starts.repeat_interleave(lengths)


def pack(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (total,) one sequence behind the other, and lengths (batch,), as `Transformer.encode` takes them.

    >>> pack([[1, 2], [3]])
    (tensor([1, 2, 3]), tensor([2, 1]))
    """
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    return torch.tensor([token for tokens in sequences for token in tokens]), lengths


@dataclass
class Step:
    """One forward pass: which positions its tokens have, and which of them exist."""

    positions: Tensor  # (batch, seq)
    causal: bool
    lengths: Tensor | None  # (batch,) int: how many of its tokens each sequence has
    packed: Packed | None = None  # then batch is 1, and lengths are those of the sequences packed
    rotary: tuple[Tensor, Tensor] | None = None
    cache: CacheView | None = None
    bias: Tensor | None = None  # of the scores, by relative positions
    memory: Tensor | None = None  # (batch, seq, width) of an encoder that a decoder attends to
    memory_lengths: Tensor | None = None
    memory_packed: Packed | None = None
    observe: Callable[[int, Tensor, Tensor, dict], None] | None = None  # model/inference/attention_maps.py

    def longest(self, tokens: Tensor) -> int:
        """How far the sequences reach with these tokens."""
        if self.packed is not None:
            return self.packed.longest
        return tokens.shape[1] + (0 if self.cache is None else max(self.cache.lengths, default=0))


def make_step(tokens: Tensor, causal: bool, lengths: Tensor | None, cache: CacheView | None = None, **more) -> Step:
    """Of tokens (batch, seq), which follow those that a cache holds, or of (total,): sequences of these lengths."""
    if tokens.dim() == 1:
        packed = check_packed(tokens, lengths, cache)
        return Step(packed.positions(), causal, lengths, packed, **more)
    if cache is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    else:
        positions = cache.positions(tokens.shape[1])
        lengths = None if lengths is None else lengths.cpu()  # once, and not in every layer
    return Step(positions, causal, lengths, cache=cache, **more)


def check_packed(tokens: Tensor, lengths: Tensor | None, cache: CacheView | None) -> Packed:
    if lengths is None or cache is not None:
        raise ValueError("tokens of one dimension are packed sequences: they need lengths, and go without a cache")
    if int(lengths.sum()) != len(tokens):
        raise ValueError(f"lengths must sum to the {len(tokens)} packed tokens, got {int(lengths.sum())}")
    return Packed.of(lengths)
