"""The positions and lengths of the tokens of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .caches import LayerCaches


class Packed(NamedTuple):
    """Sequences packed back to back, without padding, for `flashattn.attention_varlen`."""

    cu_seqlens: Tensor  # (batch + 1,) int32: sequence b is cu_seqlens[b] .. cu_seqlens[b + 1]
    max_seqlen: int

    @classmethod
    def from_lengths(cls, lengths: Tensor) -> Packed:
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        starts[1:] = lengths.cumsum(0)
        return cls(starts, int(lengths.max()))

    def positions(self) -> Tensor:
        """(1, total): the position of each token in its sequence."""
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff()
        return torch.arange(int(self.cu_seqlens[-1]), device=lengths.device)[None] - starts.repeat_interleave(lengths)


def pack(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Concatenate sequences: tokens (total,) and lengths (batch,), as `Transformer.encode` takes them.

    >>> pack([[1, 2], [3]])
    (tensor([1, 2, 3]), tensor([2, 1]))
    """
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    return torch.tensor([token for tokens in sequences for token in tokens]), lengths


@dataclass
class Step:
    """One forward pass: the positions and lengths of its tokens, and what its layers share."""

    positions: Tensor  # (batch, seq)
    causal: bool
    lengths: Tensor | None  # (batch,) int: the tokens of each sequence that are no padding
    packed: Packed | None = None  # then batch is 1, and lengths are those of the packed sequences
    rotary: tuple[Tensor, Tensor] | None = None
    cache: LayerCaches | None = None
    bias: Tensor | None = None  # of the scores, by relative positions
    memory: Tensor | None = None  # (batch, seq, width): an encoder's output that a decoder attends to
    memory_lengths: Tensor | None = None
    memory_packed: Packed | None = None
    observe: Callable[[int, Tensor, Tensor, dict], None] | None = None  # model/inference/attention_maps.py

    def max_length(self, tokens: Tensor) -> int:
        """The length of the longest sequence, these tokens included."""
        if self.packed is not None:
            return self.packed.max_seqlen
        return tokens.shape[1] + (0 if self.cache is None else max(self.cache.lengths, default=0))


def make_step(tokens: Tensor, causal: bool, lengths: Tensor | None, cache: LayerCaches | None = None, **more) -> Step:
    """For tokens (batch, seq), which follow those of a cache, or packed tokens (total,) of these lengths."""
    if tokens.dim() == 1:
        packed = check_packed(tokens, lengths, cache)
        return Step(packed.positions(), causal, lengths, packed, **more)
    if cache is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    else:
        positions = cache.positions(tokens.shape[1])
        lengths = None if lengths is None else lengths.cpu()  # once, and not in every layer
    return Step(positions, causal, lengths, cache=cache, **more)


def check_packed(tokens: Tensor, lengths: Tensor | None, cache: LayerCaches | None) -> Packed:
    if lengths is None or cache is not None:
        raise ValueError("tokens of one dimension are packed sequences: they need lengths, and go without a cache")
    if int(lengths.sum()) != len(tokens):
        raise ValueError(f"lengths must sum to the {len(tokens)} packed tokens, got {int(lengths.sum())}")
    return Packed.from_lengths(lengths)
