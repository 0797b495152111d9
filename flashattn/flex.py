"""Attention with a `score_mod` or a `block_mask`, which do not go through PyTorch's operators: they hold callables.

On a GPU the kernels take Triton functions generated from the callables. On the CPU the scores are formed by blocks of
queries, in PyTorch's own operations, forward and backward, so that memory stays linear. Blocks of keys that a mask
leaves out are never looked at. Gradients of captured tensors are always summed by blocks, in one order: a kernel would
have to add them atomically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, ops
from .backends import BACKENDS, reference
from .score import Score


@torch.compiler.disable
def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, score: Score, backend: str
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable in q, k, v, bias, sinks and what the score_mod captured."""
    captured = () if score.score_mod is None else score.score_mod.captured
    checks.refuse_tangents(q, k, v, bias, sinks, *captured)
    if backend != "triton" or (torch.is_grad_enabled() and any(x.requires_grad for x in captured)):
        name = "block_mask" if score.score_mod is None else "score_mod"
        checks.refuse_capture(name, "only the triton kernels can be, which sum no gradients of captured tensors")
    return Flex.apply(q, k, v, bias, sinks, score, backend, *captured)


class Flex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, score, backend, *captured):
        score = ops.whole(score, bias, sinks)
        out, lse, rest = BACKENDS[backend].forward(q, k, v, score)
        ctx.score, ctx.backend = score._replace(bias=None, sinks=None), backend
        ctx.captured = len(captured)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse, rest, *captured, *score.tensors())
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, bias, sinks, out, lse, rest, *captured = ctx.saved_tensors[: 8 + ctx.captured]
        checks.refuse_tangents(grad_out, grad_lse)
        if grad_out is None and grad_lse is None:
            return (None,) * (7 + len(captured))
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        score = ops.whole(ctx.score, bias, sinks)
        with_grad_bias = bias is not None and ctx.needs_input_grad[3]
        sums = [
            torch.zeros_like(x, dtype=lse.dtype) if needed else None
            for x, needed in zip(captured, ctx.needs_input_grad[7:], strict=True)
        ]
        sums_captured = any(x is not None for x in sums)
        if sums_captured:
            *gradients, grad_bias = reference.dense_backward(
                grad_out, grad_lse, q, k, v, score, with_grad_bias, grad_captured=sums
            )
        if not sums_captured or ctx.backend == "triton":
            *gradients, grad_bias = BACKENDS[ctx.backend].backward(
                grad_out, grad_lse, q, k, v, out, lse, rest, score, with_grad_bias
            )
        grad_bias = grad_bias.to(bias.dtype) if with_grad_bias else None
        grad_sinks = None if sinks is None else ops.sink_gradient(grad_out, grad_lse, out, lse, rest, score)
        sums = [None if total is None else total.to(x.dtype) for total, x in zip(sums, captured, strict=True)]
        return *gradients, grad_bias, grad_sinks, None, None, *sums
