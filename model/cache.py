"""Keys and values kept between generation steps, and what one step needs to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config


@dataclass
class Step:
    """One forward pass: which positions its tokens have, and which keys they see."""

    positions: Tensor  # (batch, seq)
    causal: bool
    kv_lengths: Tensor | None  # (batch,) int32: how many keys each sequence has
    rotary: tuple[Tensor, Tensor] | None = None
    cache: Cache | None = None


class Cache:
    """Contiguous keys and values, (batch, kv_heads, capacity, head_dim) a layer. Sequences may differ in length: each
    is written from its own end on."""

    def __init__(self, config: Config, batch: int, capacity: int, like: Tensor):
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.k = like.new_empty(shape)
        self.v = like.new_empty(shape)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=like.device)
        self.longest = 0  # of `lengths`, kept here so that no step has to ask the device

    def begin(self, seq: int, lengths: Tensor | None) -> Step:
        """A step that appends `seq` tokens: the whole prompts, padded on the right to one length, when the cache is
        empty; one token a sequence afterwards."""
        batch = self.lengths.shape[0]
        if self.longest == 0:
            new = torch.full_like(self.lengths, seq) if lengths is None else lengths.to(self.lengths)
            positions = torch.arange(seq, device=new.device).expand(batch, seq)
        elif seq == 1:
            new = self.lengths + 1
            positions = self.lengths[:, None].long()
        else:
            raise ValueError(f"seq must be 1 once the cache holds keys, got {seq}")
        self.longest += seq
        if self.longest > self.k.shape[3]:
            raise ValueError(f"the cache has room for {self.k.shape[3]} tokens, got {self.longest}")
        self.lengths = new
        return Step(positions, causal=seq > 1, kv_lengths=new, cache=self)

    def append(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a step; returns all of the layer's, as views."""
        if step.causal:
            self.k[layer, :, :, : k.shape[2]] = k
            self.v[layer, :, :, : v.shape[2]] = v
        else:
            each = torch.arange(k.shape[0], device=k.device)
            self.k[layer, each, :, step.positions[:, 0]] = k[:, :, 0]
            self.v[layer, each, :, step.positions[:, 0]] = v[:, :, 0]
        return self.k[layer, :, :, : self.longest], self.v[layer, :, :, : self.longest]
