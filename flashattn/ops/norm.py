"""The operators of the norms. A tensor that a call does not produce is returned empty, of size (0,)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import tracing
from ..backends import BACKENDS
from ..protocol import SavedNorm
from ..score import Norm, write_operator_schema
from ..tensors import find_accumulation_dtype, replace_none
from .register import implement

torch.library.define(
    "flashattn::norm_forward",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, ScalarType hidden_dtype, bool keep_hidden, "
    f"{write_operator_schema(Norm)}, str backend) -> (Tensor y, Tensor hidden, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "flashattn::norm_backward",
    "(Tensor grad_y, Tensor? grad_hidden, Tensor hidden, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    f"ScalarType x_dtype, ScalarType? residual_dtype, {write_operator_schema(Norm)}, str backend) "
    "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
)
FIELDS = len(Norm._fields)


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden_dtype: torch.dtype,
    keep_hidden: bool, settings: Norm, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, hidden), differentiable in x, residual, weight and bias; hidden is empty without keep_hidden."""
    must_dispatch, requires_grad = tracing.choose_path(x, residual, weight, bias)
    args = (x, residual, weight, bias, hidden_dtype, keep_hidden)
    if must_dispatch:
        tracing.refuse_onnx("norm_forward")
        return torch.ops.flashattn.norm_forward.default(*args, *settings, backend)[:2]
    if requires_grad:
        return FusedNorm.apply(*args, settings, backend)[:2]
    return run_forward(*args, settings, backend)[:2]


class FusedNorm(torch.autograd.Function):
    """The operator's shortcut past the dispatcher."""

    @staticmethod
    def forward(ctx, *args):
        output = run_forward(*args)
        set_up_context(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        return *differentiate(ctx, *grads), None, None, None, None


def run_forward(x, residual, weight, bias, hidden_dtype, keep_hidden, norm, backend):
    results = BACKENDS[backend].norm_forward(x, residual, weight, bias, hidden_dtype, keep_hidden, norm)
    return fill_forward(*results, hidden_dtype)


def fill_forward(y, hidden, mean, rstd, hidden_dtype):
    hidden = y.new_empty(0, dtype=hidden_dtype) if hidden is None else hidden
    return y, hidden, replace_none(mean, rstd), rstd


def set_up_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, _, ctx.kept, ctx.norm, ctx.backend = inputs
    _, hidden, mean, rstd = output
    fused = residual is not None or ctx.norm.dropout_p > 0
    # The parameters are saved for their shape and dtype too, so bias is among them. So is the seed: autograd notices
    # then where it is changed between forward and backward.
    ctx.save_for_backward(hidden if fused else x, weight, bias, mean, rstd, ctx.norm.seed)
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)


def differentiate(ctx, grad_y, grad_hidden, *_) -> tuple[Tensor | None, ...]:
    """The gradients of x, residual, weight and bias."""
    hidden, weight, bias, mean, rstd, _ = ctx.saved_tensors
    if not ctx.kept:
        grad_hidden = None  # of an output that was returned empty
    if grad_y is None and grad_hidden is None:
        return (None,) * 4
    check_hidden(hidden, rstd)
    if grad_y is None:
        grad_y = torch.zeros(hidden.shape, dtype=ctx.x_dtype, device=hidden.device)
    # Without dropout or a change of dtype the two gradients are one tensor.
    same = ctx.norm.dropout_p == 0 and ctx.residual_dtype in (None, ctx.x_dtype)
    saved = SavedNorm(hidden, weight, bias, mean, rstd)
    grad_x, grad_residual, grad_weight, grad_bias = norm_backward(
        grad_y, grad_hidden, saved, ctx.x_dtype, None if same else ctx.residual_dtype, ctx.norm, ctx.backend
    )
    if same:
        grad_residual = grad_x
    return (
        grad_x,
        None if ctx.residual_dtype is None else grad_residual,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
    )


def check_hidden(hidden: Tensor, rstd: Tensor) -> None:
    if hidden.numel() == 0 and rstd.numel() != 0:
        raise RuntimeError("flashattn::norm_forward was called without keep_hidden, so backward has no h to read")


def norm_backward(
    grad_y: Tensor, grad_hidden: Tensor | None, saved: SavedNorm, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, norm: Norm, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    # Gradients are computed with gradients enabled only to be differentiated again, by the operator's rule.
    dispatched = tracing.choose_path(grad_y)[0] or any(map(tracing.is_legacy_batched, (grad_y, grad_hidden)))
    if dispatched or torch.is_grad_enabled():
        return torch.ops.flashattn.norm_backward.default(
            grad_y, grad_hidden, *saved, x_dtype, residual_dtype, *norm, backend
        )
    return run_backward(grad_y, grad_hidden, saved, x_dtype, residual_dtype, norm, backend)


def run_backward(grad_y, grad_hidden, saved, x_dtype, residual_dtype, norm, backend) -> tuple[Tensor, ...]:
    gradients = BACKENDS[backend].norm_backward(grad_y, grad_hidden, saved, x_dtype, residual_dtype, norm)
    return tuple(replace_none(gradient, saved.rstd) for gradient in gradients)


# ------------------------------------------------------------------------------------------------ operators


@implement("norm_forward")
def _(x, residual, weight, bias, hidden_dtype, keep_hidden, *flat):
    return run_forward(x, residual, weight, bias, hidden_dtype, keep_hidden, Norm(*flat[:FIELDS]), flat[FIELDS])


@torch.library.register_fake("flashattn::norm_forward")
def fake_forward(x, residual, weight, bias, hidden_dtype, keep_hidden, center, *_):
    rows = math.prod(x.shape[:-1])  # Size.numel() would specialise a SymInt
    hidden = x.new_empty(x.shape if keep_hidden else 0, dtype=hidden_dtype)
    mean = x.new_empty(rows if center else 0, dtype=find_accumulation_dtype(x))
    return x.new_empty(x.shape), hidden, mean, x.new_empty(rows, dtype=find_accumulation_dtype(x))


@implement("norm_backward")
def _(grad_y, grad_hidden, hidden, weight, bias, mean, rstd, x_dtype, residual_dtype, *flat):
    saved = SavedNorm(hidden, weight, bias, mean, rstd)
    return run_backward(grad_y, grad_hidden, saved, x_dtype, residual_dtype, Norm(*flat[:FIELDS]), flat[FIELDS])


@torch.library.register_fake("flashattn::norm_backward")
def fake_backward(grad_y, grad_hidden, hidden, weight, bias, mean, rstd, x_dtype, residual_dtype, *_):
    return (
        hidden.new_empty(hidden.shape, dtype=x_dtype),
        rstd.new_empty(0) if residual_dtype is None else hidden.new_empty(hidden.shape, dtype=residual_dtype),
        *(rstd.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias)),
    )
