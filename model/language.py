"""A small language model of one's own: its config, and how well it knows a text."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import Config
from .layers import initialise
from .transformer import Transformer


def small_llama(vocab_size: int, layers: int, width: int, context: int, seed: int) -> Transformer:
    """Untrained; heads of 64."""
    if width % 64:
        raise ValueError(f"width must be a multiple of the heads' 64, got {width}")
    config = Config(
        "llama", vocab_size=vocab_size, width=width, layers=layers, heads=width // 64, kv_heads=width // 64,
        head_dim=64, hidden=width * 8 // 3 // 32 * 32, context=context, causal=True, norm="rms", norm_eps=1e-5,
        norm_first=True, activation="silu", gated=True, positions="rope", bias=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Transformer(config)
    initialise(model, layers)
    return model


@torch.no_grad()
def bits(model: Transformer, tokens: Tensor, context: int) -> float:
    """That the model needs for all tokens (total,) but the first. Each window begins in the middle of the one before:
    every token but those of the first half sees at least half a context."""
    half, total = context // 2, 0.0
    for first in range(0, len(tokens) - 1, half):
        piece = tokens[max(0, first - half) : first + half + 1]
        new = min(half, len(tokens) - 1 - first)
        logits = model(piece[None, :-1])[0, -new:].float()
        total += F.cross_entropy(logits, piece[-new:], reduction="sum").item()
    return total / math.log(2)
