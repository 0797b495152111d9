"""One vector of a text's hidden states, for packed sequences: (total, width) and lengths (batch,) to (batch, width)."""

from __future__ import annotations

import torch
from torch import Tensor

from .step import Packed


def first(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - lengths]


def last(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - 1]


def largest(hidden: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "max", lengths=lengths)


def mean(hidden: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "mean", lengths=lengths)


def mean_by_root(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The sum over the root of the length."""
    return mean(hidden, lengths) * lengths.sqrt()[:, None]


def mean_by_position(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The i-th token weighs i. Muennighoff, "SGPT" (2022), arXiv:2202.08904."""
    weights = Packed.of(lengths).positions()[0, :, None] + 1.0
    return mean(hidden * weights, lengths) / mean(weights, lengths)


# By the names of sentence-transformers, in the order in which it lets several stand side by side.
POOLINGS = {
    "cls": first, "max": largest, "mean": mean, "mean_sqrt_len_tokens": mean_by_root,
    "weightedmean": mean_by_position, "lasttoken": last,
}  # fmt: skip


def pool(hidden: Tensor, lengths: Tensor, modes: tuple[str, ...]) -> Tensor:
    """(batch, modes * width), in hidden's dtype, summed in float32."""
    parts = [POOLINGS[mode](hidden.float(), lengths) for mode in modes]
    return torch.cat(parts, dim=-1).to(hidden.dtype)
