"""The torch.library operators: schema, implementation, fake and autograd of each.

They take a Score or a Norm field by field, and the backend by name, so that forward and backward use the same one and
a compiled graph says which. A tensor that a call does not produce is returned empty, of size (0,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import checks, norm_settings
from . import score as score_settings
from .backends import BACKENDS
from .backends.common import result_like
from .norm_settings import Norm
from .score import Score

torch.library.define(
    "flashattn::attention_forward",
    f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, {score_settings.SCHEMA}, str backend) "
    "-> (Tensor out, Tensor lse, Tensor rest)",
)
torch.library.define(
    "flashattn::attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor out, "
    f"Tensor lse, Tensor rest, bool with_grad_bias, {score_settings.SCHEMA}, str backend) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_sinks)",
)
torch.library.define(
    "flashattn::norm_forward",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, ScalarType hidden_dtype, bool keep_hidden, "
    f"{norm_settings.SCHEMA}, str backend) -> (Tensor y, Tensor hidden, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "flashattn::norm_backward",
    "(Tensor grad_y, Tensor? grad_hidden, Tensor hidden, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    f"ScalarType x_dtype, ScalarType? residual_dtype, {norm_settings.SCHEMA}, str backend) "
    "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
)


def implement(operator: str) -> Callable:
    """Register the implementation of an operator. Dynamo comes upon its frame where a graph has broken off around the
    operator; it must leave it alone, since the engine's own operators, which it calls, have no fakes."""
    register = torch.library.impl(f"flashattn::{operator}", "CompositeExplicitAutograd")
    return lambda run: register(torch.compiler.disable(run))


def empty_if_none(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def is_watched() -> bool:
    """Whether something traces, transforms or watches calls."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or checks.is_forward_mode()
    )


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether none of them is of a subclass, which may have ideas of its own."""
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


def fields_of(settings: type) -> int:
    """How many fields of a Score or a Norm an operator takes one by one."""
    schema = score_settings.SCHEMA if settings is Score else norm_settings.SCHEMA
    return schema.count(",") + 1


def differentiable(name: str, settings: type, run: Callable, context: Callable, gradients: Callable) -> Callable:
    """Give the operator `name` its implementation and its autograd, and return the shortest way to call it:
    call(*inputs, settings, backend), settings a Score or a Norm, which the operator takes field by field.

    The dispatcher and the autograd of an operator cost several times what a kernel launch does. So a call that nothing
    watches runs the implementation itself, under an autograd function of the same formulas where it needs a gradient.

    Forward mode is refused: where only a forward pass is needed, PyTorch would drop the tangents without a word.

    Args:
        run: (*inputs, settings, backend) to the outputs.
        context: (ctx, (*inputs, settings, backend), outputs), as `setup_context` of an autograd function.
        gradients: (ctx, *gradients of the outputs) to those of the inputs.
    """
    fields = fields_of(settings)

    def pack(flat):
        checks.refuse_tangents(*flat)
        return (*flat[: -1 - fields], settings(*flat[-1 - fields : -1]), flat[-1])

    implement(name)(lambda *flat: run(*pack(flat)))
    torch.library.register_autograd(
        f"flashattn::{name}",
        lambda ctx, *grads: (*gradients(ctx, *grads), *[None] * (fields + 1)),
        setup_context=lambda ctx, inputs, output: context(ctx, pack(inputs), output),
    )
    operator = getattr(torch.ops.flashattn, name).default

    def forward(ctx, *args):
        output = run(*args)
        context(ctx, args, output)
        return output

    def backward(ctx, *grads):
        return (*gradients(ctx, *grads), None, None)

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), body)

    def call(*args):
        requires_grad, plain = False, not (is_watched() or args[0].is_meta)
        for x in args[:-2]:  # a loop: this is the path that is counted in microseconds
            if x is None:
                continue
            kind = type(x)
            if kind is Tensor or kind is torch.nn.Parameter:
                requires_grad = requires_grad or x.requires_grad
            elif isinstance(x, Tensor):
                plain = False  # a subclass may have ideas of its own
        if not plain:
            checks.refuse_tangents(*args[:-2])
            checks.refuse_onnx(name)
            return operator(*args[:-2], *args[-2][:fields], args[-1])
        if requires_grad and torch.is_grad_enabled():
            return function.apply(*args)
        return run(*args)

    return call


def not_twice(ctx, *_):
    raise RuntimeError("flashattn's gradients cannot be differentiated: a second derivative is not implemented")


def gradient(name: str, settings: type, run: Callable) -> Callable:
    """Give the operator `name`, which computes gradients, its implementation, and return the shortest way to call it:
    call(*inputs, settings, backend), as in `differentiable`. Differentiating it raises an error."""
    fields = fields_of(settings)

    implement(name)(lambda *flat: run(*flat[: -1 - fields], settings(*flat[-1 - fields : -1]), flat[-1]))
    torch.library.register_autograd(f"flashattn::{name}", not_twice)
    operator = getattr(torch.ops.flashattn, name).default

    def call(grad, *args):
        # Gradients are computed with gradients enabled only where they shall be differentiated: not_twice says no.
        if torch.is_grad_enabled() or is_watched() or grad.is_meta or not are_plain(grad):
            checks.refuse_tangents(grad, *args[:-2])
            return operator(grad, *args[:-2], *args[-2][:fields], args[-1])
        return run(grad, *args)

    return call


# ------------------------------------------------------------------------------------------------ attention


def whole(score: Score, bias: Tensor | None, sinks: Tensor | None) -> Score:
    return score._replace(bias=bias, sinks=sinks)


def _attention_forward(q, k, v, bias, sinks, score, backend):
    if bias is not None or sinks is not None:
        score = whole(score, bias, sinks)
    out, lse, rest = BACKENDS[backend].forward(q, k, v, score)
    return out, lse, empty_if_none(rest, lse)


CU_SEQLENS = (
    fields_of(Score) - Score._fields.index("cu_seqlens") + 1
)  # its place in an operator's arguments, from the end


@torch.library.register_fake("flashattn::attention_forward")
def fake_forward(q, k, v, *settings):
    packed = settings[-CU_SEQLENS] is not None
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q))
    score = whole(Score(*settings[2:-1]), *settings[:2])
    raw = settings[-1] == "triton" and BACKENDS["triton"].stays_raw(q, score)
    return result_like(q, v.shape[-1], packed), lse, lse.new_empty(0 if raw else q.shape[:3])


def _attention_backward(grad_out, grad_lse, q, k, v, bias, sinks, out, lse, rest, with_grad_bias, score, backend):
    score = whole(score, bias, sinks)
    rest = rest if rest.shape == lse.shape else None
    *gradients, grad_bias = BACKENDS[backend].backward(
        grad_out, grad_lse, q, k, v, out, lse, rest, score, with_grad_bias
    )
    grad_sinks = None if sinks is None else sink_gradient(grad_out, grad_lse, out, lse, rest, score)
    return *gradients, empty_if_none(grad_bias, lse), empty_if_none(grad_sinks, lse)


def sink_gradient(grad_out, grad_lse, out, lse, rest, score: Score) -> Tensor:
    """A sink is a key of value 0 that every query sees, so its ds is p (0 - delta) with p = exp(sink - lse - rest)."""
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    exponent = score.sinks.to(lse.dtype)[:, None] - lse
    p = torch.exp(exponent if rest is None else exponent - rest)
    ds = torch.where(lse == -math.inf, 0, -p * delta)  # a row with nothing to attend to has no gradient
    return ds.sum((0, 2)).to(score.sinks.dtype)


@torch.library.register_fake("flashattn::attention_backward")
def fake_backward(grad_out, grad_lse, q, k, v, bias, sinks, out, lse, rest, with_grad_bias, *settings):
    packed = settings[-CU_SEQLENS] is not None
    others = (
        lse.new_empty(0) if x is None else x.new_empty(x.shape) for x in (bias if with_grad_bias else None, sinks)
    )
    return *(result_like(x, x.shape[-1], packed) for x in (q, k, v)), *others


def _attention_context(ctx, inputs, output):
    q, k, v, bias, sinks, ctx.score, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, bias, sinks, *output, *ctx.score.tensors())
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _attention_gradients(ctx, grad_out, grad_lse, grad_rest):
    q, k, v, bias, sinks, out, lse, rest, *_ = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 5
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    with_grad_bias = bias is not None and ctx.needs_input_grad[3]
    *gradients, grad_bias, grad_sinks = attention_backward(
        grad_out, grad_lse, q, k, v, bias, sinks, out, lse, rest, with_grad_bias, ctx.score, ctx.backend
    )
    return *gradients, grad_bias if with_grad_bias else None, None if sinks is None else grad_sinks


attention_backward = gradient("attention_backward", Score, _attention_backward)
attention = differentiable("attention_forward", Score, _attention_forward, _attention_context, _attention_gradients)


# ------------------------------------------------------------------------------------------------ norms


def _norm_forward(x, residual, weight, bias, hidden_dtype, keep_hidden, norm, backend):
    y, hidden, mean, rstd = BACKENDS[backend].norm_forward(x, residual, weight, bias, hidden_dtype, keep_hidden, norm)
    hidden = x.new_empty(0, dtype=hidden_dtype) if hidden is None else hidden
    return y, hidden, empty_if_none(mean, rstd), rstd


@torch.library.register_fake("flashattn::norm_forward")
def _(x, residual, weight, bias, hidden_dtype, keep_hidden, center, *_):
    rows = math.prod(x.shape[:-1])  # Size.numel would make a number of a symbol
    hidden = x.new_empty(x.shape if keep_hidden else 0, dtype=hidden_dtype)
    statistics = lse_dtype(x)
    mean = x.new_empty(rows if center else 0, dtype=statistics)
    return x.new_empty(x.shape), hidden, mean, x.new_empty(rows, dtype=statistics)


def _norm_backward(grad_y, grad_hidden, hidden, weight, bias, mean, rstd, x_dtype, residual_dtype, norm, backend):
    gradients = BACKENDS[backend].norm_backward(
        grad_y, grad_hidden, hidden, weight, bias, mean, rstd, x_dtype, residual_dtype, norm
    )
    return tuple(empty_if_none(g, rstd) for g in gradients)


@torch.library.register_fake("flashattn::norm_backward")
def _(grad_y, grad_hidden, hidden, weight, bias, mean, rstd, x_dtype, residual_dtype, *_):
    return (
        hidden.new_empty(hidden.shape, dtype=x_dtype),
        rstd.new_empty(0) if residual_dtype is None else hidden.new_empty(hidden.shape, dtype=residual_dtype),
        *(rstd.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias)),
    )


def _norm_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.kept, ctx.norm, ctx.backend = inputs
    _, hidden, mean, rstd = output
    fused = residual is not None or ctx.norm.dropout_p > 0
    # The parameters are saved for their shape and dtype too, so bias is among them.
    # So is the seed: autograd notices then where it is changed between forward and backward.
    ctx.save_for_backward(hidden if fused else x, weight, bias, mean, rstd, ctx.norm.seed)
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)


def _norm_gradients(ctx, grad_y, grad_hidden, grad_mean, grad_rstd):
    hidden, weight, bias, mean, rstd, _ = ctx.saved_tensors
    if not ctx.kept:
        grad_hidden = None  # of an output that was returned empty
    if grad_y is None and grad_hidden is None:
        return (None,) * 6
    if hidden.numel() == 0 and rstd.numel() != 0:
        raise RuntimeError("flashattn::norm_forward was called without keep_hidden, so h is not there for backward")
    if grad_y is None:
        grad_y = torch.zeros(hidden.shape, dtype=ctx.x_dtype, device=hidden.device)
    # Without dropout or a change of dtype the two gradients are one tensor.
    same = ctx.norm.dropout_p == 0 and ctx.residual_dtype in (None, ctx.x_dtype)
    grad_x, grad_residual, grad_weight, grad_bias = norm_backward(
        grad_y, grad_hidden, hidden, weight, bias, mean, rstd, ctx.x_dtype, None if same else ctx.residual_dtype,
        ctx.norm, ctx.backend,
    )  # fmt: skip
    if ctx.residual_dtype is None:
        grad_residual = None
    elif same:
        grad_residual = grad_x
    grad_weight = None if weight is None else grad_weight
    grad_bias = None if bias is None else grad_bias
    return grad_x, grad_residual, grad_weight, grad_bias, None, None


norm_backward = gradient("norm_backward", Norm, _norm_backward)
norm = differentiable("norm_forward", Norm, _norm_forward, _norm_context, _norm_gradients)
