"""Attention against PyTorch's scaled_dot_product_attention: error, time, ratio."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

import flashattn

from .measure import Pair, max_error, pair


class Case(NamedTuple):
    batch: int
    heads: int
    seq: int
    head_dim: int
    dtype: str
    causal: bool
    backward: bool

    @property
    def command(self) -> str:
        flags = " --causal" * self.causal + " --backward" * self.backward
        shape = f"{self.batch},{self.heads},{self.seq},{self.head_dim}"
        return f"python -m bench attention --shape {shape} --dtype {self.dtype}{flags}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of the matrix products; 2.5 times as many backward, where S is recomputed."""
        forward = 4 * self.batch * self.heads * self.seq**2 * self.head_dim * (0.5 if self.causal else 1)
        return forward * (2.5 if self.backward else 1)


class Result(NamedTuple):
    case: Case
    backend: str
    error: float  # against float64
    their_error: float
    last_place: float  # one unit in the last place of the largest value
    times: Pair

    @property
    def correct(self) -> bool:
        """The error rule: at most twice PyTorch's own error in the same dtype, plus one unit in the last place."""
        return self.error <= 2 * self.their_error + self.last_place


QUICK = [
    Case(1, 8, seq, 64, dtype, causal, False)
    for dtype in ("float32", "bfloat16")
    for seq, causal in ((64, False), (512, True), (1024, False), (1024, True))
] + [Case(1, 8, 512, 64, dtype, True, True) for dtype in ("float32", "bfloat16")]

FULL = [
    Case(1, 8, seq, head_dim, dtype, causal, backward)
    for backward in (False, True)
    for dtype in ("float32", "bfloat16", "float16")
    for seq, head_dim in ((64, 64), (512, 64), (2048, 64), (2048, 128))
    for causal in (False, True)
]


def run(case: Case, device: torch.device, seconds: float) -> Result:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    shape = (case.batch, case.heads, case.seq, case.head_dim)
    q, k, v, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    if not case.backward:
        with torch.no_grad():
            return forward(case, q, k, v, device, seconds)
    return backward(case, q, k, v, grad, device, seconds)


def backend_of(q: torch.Tensor) -> str:
    return flashattn.backends.choose(q.device, q.dtype, head_dim=q.shape[-1])


def compare(case: Case, q, ours, theirs, truth, times: Pair) -> Result:
    """The largest errors of all results, beside their times."""
    error, their_error = (max(map(max_error, results, truth)) for results in (ours, theirs))
    last_place = torch.finfo(q.dtype).eps * max(t.abs().max().item() for t in truth)
    return Result(case, backend_of(q), error, their_error, last_place, times)


def forward(case: Case, q, k, v, device, seconds: float) -> Result:
    def ours():
        return flashattn.attention(q, k, v, causal=case.causal)

    def theirs():
        return scaled_dot_product_attention(q, k, v, is_causal=case.causal)

    with flashattn.use_backend("reference"):
        truth = flashattn.attention(q.double(), k.double(), v.double(), causal=case.causal)
    return compare(case, q, [ours()], [theirs()], [truth], pair(ours, theirs, device, seconds))


def backward(case: Case, q, k, v, grad, device, seconds: float) -> Result:
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = flashattn.attention(*inputs, causal=case.causal)
    their_out = scaled_dot_product_attention(*inputs, is_causal=case.causal)

    def ours():
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    def theirs():
        return torch.autograd.grad(their_out, inputs, grad, retain_graph=True)

    with flashattn.use_backend("reference"):
        exact = [x.detach().double().requires_grad_() for x in inputs]
        truth = torch.autograd.grad(flashattn.attention(*exact, causal=case.causal), exact, grad.double())
    return compare(case, q, ours(), theirs(), truth, pair(ours, theirs, device, seconds))
