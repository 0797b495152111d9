"""Keys and values kept between generation steps, and what one step needs to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import flashattn

from .config import Config


def make_step(tokens: Tensor, causal: bool, lengths: Tensor | None, cache: Cache | None = None, **more) -> Step:
    """Of tokens (batch, seq), which follow those that a cache holds."""
    if cache is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    else:
        positions = cache.positions(tokens.shape[1])
        lengths = None if lengths is None else lengths.cpu()  # once, and not in every layer
    return Step(positions, causal, lengths, cache=cache, **more)


@dataclass
class Step:
    """One forward pass: which positions its tokens have, and which of them exist."""

    positions: Tensor  # (batch, seq)
    causal: bool
    lengths: Tensor | None  # (batch,) int: how many of its tokens each sequence has
    rotary: tuple[Tensor, Tensor] | None = None
    cache: Cache | None = None
    bias: Tensor | None = None  # of the scores, by relative positions
    memory: Tensor | None = None  # (batch, seq, width) of an encoder that a decoder attends to
    memory_lengths: Tensor | None = None


class Cache:
    """A `flashattn.KVCache` for each layer, and the rotary table they share. Sequences may differ in length: each is
    written from its own end on."""

    def __init__(self, config: Config, batch: int, capacity: int, like: Tensor, rotary: tuple[Tensor, Tensor] | None):
        sizes = (batch, config.kv_heads, capacity, config.head_dim)
        layers = config.decoder_layers or config.layers
        self.layers = [flashattn.KVCache(*sizes, dtype=like.dtype, device=like.device) for _ in range(layers)]
        self.rotary = None if rotary is None else flashattn.Rotary(*(x[0, 0] for x in rotary))
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values of an encoder's output

    @property
    def lengths(self) -> list[int]:
        return self.layers[0].lengths

    def positions(self, seq: int) -> Tensor:
        """(batch, seq) of the next tokens."""
        device = self.layers[0].k.device
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(seq, device=device)
