"""Pooling of packed hidden states: (total, width) and lengths (batch,) to one vector a text, (batch, width)."""

from __future__ import annotations

import torch
from torch import Tensor

from .step import Packed


def first_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - lengths]


def last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - 1]


def max_over_tokens(hidden: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "max", lengths=lengths)


def mean_over_tokens(hidden: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "mean", lengths=lengths)


def mean_sqrt_length(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The sum, divided by the square root of the length."""
    return mean_over_tokens(hidden, lengths) * lengths.sqrt()[:, None]


def weighted_mean(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The i-th token has weight i. Muennighoff, "SGPT" (2022), arXiv:2202.08904."""
    weights = Packed.from_lengths(lengths).positions()[0, :, None] + 1.0
    return mean_over_tokens(hidden * weights, lengths) / mean_over_tokens(weights, lengths)


# By the names of sentence-transformers, in the order in which it concatenates several.
POOLINGS = {
    "cls": first_token, "max": max_over_tokens, "mean": mean_over_tokens, "mean_sqrt_len_tokens": mean_sqrt_length,
    "weightedmean": weighted_mean, "lasttoken": last_token,
}  # fmt: skip


def pool(hidden: Tensor, lengths: Tensor, modes: tuple[str, ...]) -> Tensor:
    """(batch, modes * width), in hidden's dtype, summed in float32."""
    parts = [POOLINGS[mode](hidden.float(), lengths) for mode in modes]
    return torch.cat(parts, dim=-1).to(hidden.dtype)
