"""Keys and values kept between generation steps."""

from __future__ import annotations

import torch
from torch import Tensor

import flashattn

from .config import Config


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

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was. All rows are as long, and have the same encoder's output."""
        for layer in self.layers:
            length = max(layer.lengths)
            layer.k[:, :, :length], layer.v[:, :, :length] = layer.k[rows, :, :length], layer.v[rows, :, :length]

    def truncate(self, lengths: list[int]) -> None:
        """Forget what lies at and past these lengths."""
        for layer in self.layers:
            layer.truncate(lengths)
