"""Key/value caches of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import flashattn

from .config import Config


class LayerCaches:
    """The batch of a decode step: the cache of each layer, for `flashattn.decode`, and the rotary table."""

    def __init__(self, layers: list, rotary: flashattn.Rotary | None):
        self.layers, self.rotary = layers, rotary
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values of an encoder's output

    @property
    def lengths(self) -> list[int]:
        return self.layers[0].lengths

    def positions(self, seq: int) -> Tensor:
        """(batch, seq) of the next tokens."""
        device = self.layers[0].k.device
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(seq, device=device)


class ModelCache(LayerCaches):
    """A `flashattn.KVCache` for each layer. Sequences may differ in length: each is appended to at its own end."""

    def __init__(self, config: Config, batch: int, capacity: int, like: Tensor, rotary: flashattn.Rotary | None):
        sizes = (batch, config.kv_heads, capacity, config.head_dim)
        count = config.decoder_layers or config.layers
        layers = [flashattn.KVCache(*sizes, dtype=like.dtype, device=like.device) for _ in range(count)]
        super().__init__(layers, rotary)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row rows[i]. All rows have the same length and the same encoder output."""
        for layer in self.layers:
            length = max(layer.lengths)
            layer.k[:, :, :length], layer.v[:, :, :length] = layer.k[rows, :, :length], layer.v[rows, :, :length]

    def truncate(self, lengths: list[int]) -> None:
        """Drop the tokens from these lengths on."""
        for layer in self.layers:
            layer.truncate(lengths)


class PagedModelCache:
    """A `flashattn.PagedKVCache` for each layer; a sequence has the same number, length and pages in all of them."""

    def __init__(self, config: Config, pages: int, page_size: int, like: Tensor, rotary: flashattn.Rotary | None):
        sizes = (pages, page_size, config.kv_heads, config.head_dim)
        self.page_size, self.rotary = page_size, rotary
        self.layers = [
            flashattn.PagedKVCache(*sizes, dtype=like.dtype, device=like.device) for _ in range(config.layers)
        ]

    @property
    def free_pages(self) -> int:
        return self.layers[0].free_pages

    def length(self, sequence: int) -> int:
        return self.layers[0].length(sequence)

    def count_pages(self, length: int) -> int:
        return -(-length // self.page_size)

    def add(self) -> int:
        return max([layer.add() for layer in self.layers])

    def fork(self, sequence: int, length: int) -> int:
        """A sequence that shares the first tokens of another."""
        number = max([layer.fork(sequence) for layer in self.layers])
        self.truncate(number, length)
        return number

    def truncate(self, sequence: int, length: int) -> None:
        """Drop the tokens from this length on."""
        for layer in self.layers:
            layer.truncate(sequence, length)

    def free(self, sequence: int) -> None:
        for layer in self.layers:
            layer.free(sequence)

    def select(self, sequences: Sequence[int]) -> LayerCaches:
        """These sequences as the batch of a decode step."""
        return LayerCaches([layer.select(sequences) for layer in self.layers], self.rotary)
