"""How well a language model predicts a text."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..transformer import Transformer


@torch.no_grad()
def measure_bits(model: Transformer, tokens: Tensor, context: int) -> float:
    """The bits that the model needs for tokens (total,), without the first. Windows overlap by half: every token,
    except in the first half window, has at least half a context before it."""
    half, total = context // 2, 0.0
    for first in range(0, len(tokens) - 1, half):
        piece = tokens[max(0, first - half) : first + half + 1]
        new = min(half, len(tokens) - 1 - first)
        logits = model(piece[None, :-1])[0, -new:].float()
        total += F.cross_entropy(logits, piece[-new:], reduction="sum").item()
    return total / math.log(2)
