"""Calls that launch the project's kernels on CPU tensors, to compile or execute them without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import flashattn
from flashattn.cache import KVCache, Rotary


class Work(NamedTuple):
    """A call and its truth in float64, with their results by name."""

    text: str
    run: Callable[[], dict[str, torch.Tensor]]
    truth: Callable[[], dict[str, torch.Tensor]]


def make_attention(shape, dtype=torch.bfloat16, causal=False, backward=False) -> Work:
    batch, heads, seq, head_dim = shape
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(batch, heads, seq, head_dim).to(dtype) for _ in range(4))

    def run(kind=None):
        inputs = [x.detach().to(kind or dtype).requires_grad_(backward) for x in (q, k, v)]
        out = flashattn.attention(*inputs, causal=causal)
        results = {"out": out.detach()}
        if backward:
            gradients = torch.autograd.grad(out, inputs, grad.to(out))
            results |= dict(zip(("grad_q", "grad_k", "grad_v"), gradients, strict=True))
        return results

    text = f"attention of ({', '.join(map(str, shape))}), {name_dtype(dtype)}{', causal' if causal else ''}"
    return Work(text, run, lambda: run(torch.float64))


def make_norm(shape, dtype=torch.bfloat16, backward=False, rms=False) -> Work:
    rows, cols = shape
    torch.manual_seed(0)
    x, weight, grad = torch.randn(rows, cols).to(dtype), torch.randn(cols).to(dtype), torch.randn(rows, cols).to(dtype)

    def run(kind=None):
        inputs = [t.detach().to(kind or dtype).requires_grad_(backward) for t in (x, weight)]
        y = (flashattn.rms_norm if rms else flashattn.layer_norm)(*inputs)
        results = {"y": y.detach()}
        if backward:
            results |= dict(zip(("grad_x", "grad_weight"), torch.autograd.grad(y, inputs, grad.to(y)), strict=True))
        return results

    text = f"{'rms_norm' if rms else 'layer_norm'} of ({rows}, {cols}), {name_dtype(dtype)}"
    return Work(text, run, lambda: run(torch.float64))


def make_decode(shape, dtype=torch.bfloat16) -> Work:
    """One new token of each sequence against a cache of `seq`, rotated."""
    batch, heads, seq, head_dim = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, n, head_dim).to(dtype) for n in (1, seq, seq))
    angles = torch.rand(seq, head_dim // 2) * 6

    def run(kind=None):
        kind = kind or dtype
        cache = KVCache(batch, heads, seq, head_dim, dtype=kind)
        table = torch.float64 if kind == torch.float64 else torch.float32
        rotary = Rotary(angles.cos().to(table), angles.sin().to(table))
        with flashattn.use_backend("reference"):  # the earlier tokens: not what is measured
            before = torch.zeros(batch, heads, seq - 1, head_dim, dtype=kind)
            flashattn.decode(before, cache, k[:, :, :-1].to(kind), v[:, :, :-1].to(kind), rotary)
        out = flashattn.decode(q.to(kind), cache, k[:, :, -1:].to(kind), v[:, :, -1:].to(kind), rotary)
        return {"out": out}

    return Work(f"decode of ({', '.join(map(str, shape))}), {name_dtype(dtype)}", run, lambda: run(torch.float64))


def name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
