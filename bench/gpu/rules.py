"""The rules by which figures are made: floating-point operations, bytes, errors. Stated once, printed with results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TEXT = """\
FLOP: attention forward 4 x batch x heads x pairs x head_dim, pairs = seq_q x seq_k, half of them causal (of packed
  sequences: summed over sequences); backward 2.5 x forward, whatever is recomputed. A matrix product: 2 x M x N x K.
bytes: what a call must read and write once. decode: keys and values up to each length, q, out. Norms: forward x and y,
  backward grad_y, x and grad_x; parameters are left out. A copy: read and written.
time: CUDA events around batches of launches; calls below 100 us, and those that the host takes longer to queue than the
  GPU to run, as a CUDA graph of the batch. Variants of a case take turns; median and quartiles of the rounds. Inputs
  are copies in turn that exceed three times the L2, but for rows that say warm. Ratio: the other's time / ours, round
  by round; ~ where its quartiles are further apart than it is from 1.
data: random, normal, the same in each copy; never zeros. share: of the ceiling measured in this run.
error: root mean square against float64 on batch row 0 and its first key/value head (norms: the first rows; features:
  all heads, without the gradients of their own tensors), before timing into memory filled with NaN and again after
  timing. Wrong: more than twice the error of PyTorch's operations (the reference backend) in the same dtype plus one
  unit in the last place; or a single element off by ten times their largest error; or other bits after timing than
  before."""


def attention_flops(heads: int, head_dim: int, pairs: float, causal: bool, backward: bool) -> float:
    """pairs: of a query and a key, of all sequences of the batch, as if nothing were masked."""
    return 4.0 * heads * head_dim * pairs * (0.5 if causal else 1) * (2.5 if backward else 1)


class Truth(NamedTuple):
    """What the checked part of the results must be."""

    exact: list[Tensor]  # computed in float64
    theirs: list[Tensor]  # by PyTorch's operations in the inputs' dtype


class Verdict(NamedTuple):
    error: float  # root mean square; of the result where it is largest beside what is allowed
    allowed: float
    correct: bool


def judge(results: list[Tensor], truth: Truth) -> Verdict:
    """The error rule, for each result; the worst of them."""
    verdicts = [judge_one(*x) for x in zip(results, truth.theirs, truth.exact, strict=True)]
    return max(verdicts, key=lambda v: (not v.correct, v.error / v.allowed if v.allowed else 0.0))


def judge_one(x: Tensor, theirs: Tensor, exact: Tensor) -> Verdict:
    eps = torch.finfo(x.dtype).eps
    ours, theirs = x.double() - exact, theirs.double() - exact
    error, allowed = rms(ours), 2 * rms(theirs) + eps * rms(exact)
    largest = 10 * largest_of(theirs) + eps * largest_of(exact)
    # A comparison with NaN is false, so NaN is wrong.
    return Verdict(error, allowed, bool(error <= allowed and largest_of(ours) <= largest))


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def largest_of(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
