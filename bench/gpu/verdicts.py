"""The error rule: results against float64, and against the error of PyTorch's operations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Truth(NamedTuple):
    """The expected values of the checked part of the results."""

    exact: list[Tensor]  # computed in float64
    theirs: list[Tensor]  # by PyTorch's operations in the inputs' dtype


class Verdict(NamedTuple):
    error: float  # root mean square, of the result where error / allowed is largest
    allowed: float
    correct: bool


def judge(results: list[Tensor], truth: Truth) -> Verdict:
    """The error rule, for each result; the worst of them."""
    verdicts = [judge_one(*x) for x in zip(results, truth.theirs, truth.exact, strict=True)]
    return max(verdicts, key=lambda v: (not v.correct, v.error / v.allowed if v.allowed else 0.0))


def judge_one(x: Tensor, theirs: Tensor, exact: Tensor) -> Verdict:
    eps = torch.finfo(x.dtype).eps
    ours, theirs = x.double() - exact, theirs.double() - exact
    error, allowed = compute_rms(ours), 2 * compute_rms(theirs) + eps * compute_rms(exact)
    largest = 10 * find_max_abs(theirs) + eps * find_max_abs(exact)
    # A comparison with NaN is false, so NaN is wrong.
    return Verdict(error, allowed, bool(error <= allowed and find_max_abs(ours) <= largest))


def compute_rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def find_max_abs(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
