"""Positions of tokens: rotary tables, sinusoids, and relative position biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import rope
from .config import Config
from .step import Step


def make_rotary_table(positions: Tensor, config: Config, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (batch, 1, seq, head_dim / 2) of the angles positions * frequencies, for sequences of up to
    `length` tokens."""
    if config.rope_scaling is None:
        frequencies, amplitude = rope.compute_frequencies(config.rope_theta, config.head_dim, positions.device), 1.0
    else:
        sizes = (config.rope_theta, config.head_dim, length)
        frequencies, amplitude = config.rope_scaling.scale(*sizes, positions.device)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim / 2]) of x (batch, heads, seq, head_dim)."""
    cos, sin = table
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def make_sinusoids(positions: Tensor, width: int) -> Tensor:
    """(batch, seq, width): sines of positions * 10000^(-2i / width) in the first half, their cosines in the second.

    Vaswani et al., "Attention Is All You Need" (2017), section 3.5, where the two alternate: the order of the
    dimensions does not matter to learned weights.
    """
    i = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * 10000.0 ** (-i / width)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class RelativeBias(nn.Module):
    """A learned bias of the scores for each head and bucket of distances: near ones have a bucket each, far ones share
    them, wider and wider up to `relative_max_distance`. Without a causal mask, later keys have half of the buckets.

    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2019),
    arXiv:1910.10683, section 2.1.
    """

    def __init__(self, config: Config, causal: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.relative_buckets, config.heads))
        self.distance, self.causal = config.relative_max_distance, causal

    def buckets(self, offset: Tensor) -> Tensor:
        """offset: the key's position minus the query's."""
        count = len(self.weight)
        if self.causal:
            first, distance = 0, (-offset).clamp(min=0)
        else:
            count //= 2
            first, distance = (offset > 0).long() * count, offset.abs()
        exact = count // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.distance / exact)
        far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        return first + torch.where(distance < exact, distance, far)

    def forward(self, step: Step) -> Tensor:
        """(batch or 1, heads, seq_q, keys) for the queries of a step and all keys, from position 0."""
        queries = step.positions
        keys = step.max_length(queries)
        if step.packed is not None:
            queries = torch.arange(keys, device=queries.device)[None]
        if (queries == queries[:1]).all():
            queries = queries[:1]
        offset = torch.arange(keys, device=queries.device) - queries[..., None]
        return self.weight[self.buckets(offset)].permute(0, 3, 1, 2)
