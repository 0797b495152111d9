"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, checked; they apply in this order.

    >>> import torch
    >>> Sampling().choose(torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([1])
    """

    repetition_penalty: float = 1.0  # positive logits of seen tokens are divided by it, negative ones multiplied
    temperature: float = 0.0  # 0 takes the most likely token; else the logits are divided by it
    top_k: int | None = None  # sample among the k most likely tokens
    top_p: float | None = None  # among the most likely tokens that together reach probability p
    min_p: float | None = None  # among those at least p times as likely as the most likely one

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, and finite, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be over 0, and finite, got {self.repetition_penalty}")

    def choose(self, logits: Tensor, seen: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """One token (batch,) from logits (batch, vocab_size). seen: (batch, vocab_size) bool, the tokens before."""
        if seen is not None and self.repetition_penalty != 1:
            logits = penalise(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), -1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            probabilities = filter_top_p(probabilities, self.top_p)
        if self.min_p is not None:
            threshold = self.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < threshold, 0)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Keskar et al., "CTRL" (2019), arXiv:1909.05858, section 4.1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens that reaches top_p. Holtzman et al. (2019), arXiv:1904.09751."""
    ordered, order = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p, 0)
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)
