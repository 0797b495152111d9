"""Attention with a `score_mod` or a `block_mask`, which do not go through PyTorch's operators: they hold callables.

The scores are formed by blocks of queries, in PyTorch's own operations, forward and backward, so that memory stays
linear; blocks of keys that the mask leaves out are never looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .backends import reference
from .score import Score


def captured_of(score: Score) -> tuple[Tensor, ...]:
    return () if score.score_mod is None else score.score_mod.captured


@torch.compiler.disable
def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, score: Score
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable in q, k, v, bias, sinks and what the score_mod captured."""
    return Flex.apply(q, k, v, bias, sinks, score, *captured_of(score))


class Flex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, score, *captured):
        score = ops.whole(score, bias, sinks)
        out, lse = reference.dense_forward(q, k, v, score)
        ctx.score = score._replace(bias=None, sinks=None)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse, *captured)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, bias, sinks, out, lse, *captured = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * (6 + len(captured))
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        score = ops.whole(ctx.score, bias, sinks)
        with_grad_bias = bias is not None and ctx.needs_input_grad[3]
        sums = [
            torch.zeros_like(x, dtype=lse.dtype) if needed else None
            for x, needed in zip(captured, ctx.needs_input_grad[6:], strict=True)
        ]
        *gradients, grad_bias = reference.dense_backward(
            grad_out, grad_lse, q, k, v, lse, score, with_grad_bias, grad_captured=sums
        )
        grad_bias = grad_bias.to(bias.dtype) if with_grad_bias else None
        grad_sinks = None if sinks is None else ops.sink_gradient(grad_out, grad_lse, out, lse, score)
        sums = [None if total is None else total.to(x.dtype) for total, x in zip(sums, captured, strict=True)]
        return *gradients, grad_bias, grad_sinks, None, *sums
