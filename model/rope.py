"""Rotary frequencies, and their scaling to a longer context than a model was trained for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def compute_frequencies(theta: float, head_dim: int, device: torch.device | None = None) -> Tensor:
    """(head_dim / 2,) radians per position: theta^(-2i / head_dim).

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), arXiv:2104.09864.
    """
    i = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    return theta ** (-i / head_dim)


@dataclass(frozen=True)
class Scaling:
    """How frequencies are scaled. `scale(theta, head_dim, length, device)` returns those of a sequence of this length,
    (head_dim / 2,), and the factor of cosine and sine."""

    factor: float

    def __post_init__(self):
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor of the rotary frequencies must be over 0, got {self.factor}")

    def fixed_context(self, context: int) -> int:
        """The length up to which frequencies do not depend on the length, in a model of this context."""
        return context

    def check(self, head_dim: int) -> None:
        """Raises ValueError if it does not fit heads of this size."""


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """All positions divided by the factor. Chen et al., "Extending Context Window of Large Language Models via
    Positional Interpolation" (2023), arXiv:2306.15595."""

    def scale(self, theta: float, head_dim: int, length: int, device: torch.device) -> tuple[Tensor, float]:
        return compute_frequencies(theta, head_dim, device) / self.factor, 1.0


@dataclass(frozen=True)
class DynamicScaling(Scaling):
    """Dynamic NTK: for sequences past the original context, a theta that grows with their length (Peng et al.,
    "YaRN", appendix A.1)."""

    original_context: int

    def scale(self, theta: float, head_dim: int, length: int, device: torch.device) -> tuple[Tensor, float]:
        stretch = self.factor * max(length, self.original_context) / self.original_context - (self.factor - 1)
        return compute_frequencies(theta * stretch ** (head_dim / (head_dim - 2)), head_dim, device), 1.0

    def fixed_context(self, context: int) -> int:
        return min(self.original_context, context)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Low frequencies divided by the factor, high ones kept, those between interpolated. Grattafiori et al., "The Llama
    3 Herd of Models" (2024), arXiv:2407.21783."""

    original_context: int
    low_freq_factor: float  # turns in the original context: below, divided by the whole factor
    high_freq_factor: float  # above, kept

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor must be over 0 and below high_freq_factor {self.high_freq_factor}, "
                f"got {self.low_freq_factor}"
            )

    def scale(self, theta: float, head_dim: int, length: int, device: torch.device) -> tuple[Tensor, float]:
        unscaled = compute_frequencies(theta, head_dim, device)
        turns = self.original_context * unscaled / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return unscaled * kept + unscaled / self.factor * (1 - kept), 1.0


@dataclass(frozen=True)
class LongRope(Scaling):
    """Each frequency divided by its own factor, found by search; with other factors past the original context. Ding et
    al., "LongRoPE" (2024), arXiv:2402.13753."""

    original_context: int
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float | None = None  # of cosine and sine; None: sqrt(1 + ln(factor) / ln(original_context))

    def scale(self, theta: float, head_dim: int, length: int, device: torch.device) -> tuple[Tensor, float]:
        factors = self.long_factors if length > self.original_context else self.short_factors
        divisors = torch.tensor(factors, dtype=torch.float32, device=device)
        return compute_frequencies(theta, head_dim, device) / divisors, self.amplitude

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(max(self.factor, 1)) / math.log(self.original_context))

    def check(self, head_dim: int) -> None:
        for factors in (self.short_factors, self.long_factors):
            if len(factors) != head_dim // 2 or min(factors) <= 0:
                raise ValueError(f"factors of the rotary frequencies must be {head_dim // 2} over 0, got {factors}")

    def fixed_context(self, context: int) -> int:
        return context if self.short_factors == self.long_factors else min(self.original_context, context)


@dataclass(frozen=True)
class Yarn(Scaling):
    """Low frequencies divided by the factor, high ones kept, and larger scores. Peng et al., "YaRN: Efficient
    Context Window Extension of Large Language Models" (2023), arXiv:2309.00071."""

    original_context: int
    beta_fast: float = 32.0  # dimensions with more turns than this in the original context are kept
    beta_slow: float = 1.0  # those with fewer turns are divided by the whole factor
    truncate: bool = True  # round the bounds between them to integers
    attention_factor: float | None = None  # of cosine and sine; None: 0.1 ln(factor) + 1

    def scale(self, theta: float, head_dim: int, length: int, device: torch.device) -> tuple[Tensor, float]:
        unscaled = compute_frequencies(theta, head_dim, device)
        low, high = (self.dimension(turns, theta, head_dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        i = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
        stretched = ((i - low) / max(high - low, 0.001)).clamp(0, 1)  # weight of the divided frequency
        return unscaled / self.factor * stretched + unscaled * (1 - stretched), self.amplitude

    def dimension(self, turns: float, theta: float, head_dim: int) -> float:
        """The dimension with so many turns in the original context."""
        return head_dim * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(theta) / 2

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return compute_yarn_amplitude(self.factor)


def compute_yarn_amplitude(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
