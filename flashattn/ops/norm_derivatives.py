"""The operators of the norms' further derivatives, and the rules of all: forward mode, and second derivatives.

Of a norm's inputs x, with the loss L = sum(grad_y * y) + sum(grad_hidden * h) of constant grad_y and grad_hidden,
norm_jvp computes J t and norm_hvp H t, for tangents t of x; J is the derivative of (y, h), H the Hessian of L.
norm_backward computes J^T g. Every rule is made of these three. What has none, third derivatives, are those of the
reference's formulas in PyTorch's operations, which are differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast, reference
from ..backends import BACKENDS
from ..protocol import Backend, NormTangents, SavedNorm
from ..score import Norm, write_operator_schema
from ..tensors import plus, replace_none
from . import norm
from .norm import FIELDS
from .register import Rules, implement, register_derivatives, restore, save, save_inputs

SETTINGS = f"{write_operator_schema(Norm)}, str backend"
torch.library.define(
    "flashattn::norm_jvp",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? tangent_x, Tensor? tangent_residual, "
    f"Tensor? tangent_weight, Tensor? tangent_bias, ScalarType hidden_dtype, bool keep_hidden, {SETTINGS}) "
    "-> (Tensor y, Tensor hidden, Tensor mean, Tensor rstd, Tensor tangent_y, Tensor tangent_hidden)",
)
torch.library.define(
    "flashattn::norm_hvp",
    "(Tensor grad_y, Tensor hidden, Tensor? weight, Tensor mean, Tensor rstd, Tensor tangent_hidden, "
    f"Tensor? tangent_weight, ScalarType x_dtype, ScalarType? residual_dtype, {SETTINGS}) "
    "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight)",
)
INPUTS = len(NormTangents._fields)
JVP_SETTINGS = INPUTS + 2  # where those begin in norm_jvp after the inputs: after their tangents and two flags
REFERENCE = BACKENDS["reference"]
ops = torch.ops.flashattn


# ------------------------------------------------------------------------------------------------ implementations


@implement("norm_jvp")
def _(x, residual, weight, bias, *flat):
    return run_jvp(BACKENDS[flat[-1]], x, residual, weight, bias, *flat)


def run_jvp(backend: Backend, x, residual, weight, bias, *flat):
    tangents, settings = NormTangents(*flat[:INPUTS]), Norm(*flat[JVP_SETTINGS:-1])
    hidden_dtype, keep_hidden = flat[INPUTS:JVP_SETTINGS]
    results = backend.norm_jvp(x, residual, weight, bias, tangents, hidden_dtype, keep_hidden, settings)
    y, hidden, mean, rstd, tangent_y, tangent_hidden = results
    forward = norm.fill_forward(y, hidden, mean, rstd, hidden_dtype)
    return *forward, tangent_y, replace_none(tangent_hidden, forward[1])


@torch.library.register_fake("flashattn::norm_jvp")
def _(x, residual, weight, bias, *flat):
    y, hidden, mean, rstd = norm.fake_forward(x, residual, weight, bias, *flat[INPUTS:])
    return y, hidden, mean, rstd, torch.empty_like(y), torch.empty_like(hidden)


@implement("norm_hvp")
def _(grad_y, hidden, weight, mean, rstd, *flat):
    return run_hvp(BACKENDS[flat[-1]], grad_y, SavedNorm(hidden, weight, None, mean, rstd), *flat[:-1])


def run_hvp(backend: Backend, grad_y, saved, tangent_hidden, tangent_weight, x_dtype, residual_dtype, *flat):
    moved = tangent_hidden, tangent_weight
    results = backend.norm_hvp(grad_y, saved, *moved, x_dtype, residual_dtype, Norm(*flat))
    return tuple(replace_none(x, saved.rstd) for x in results)


@torch.library.register_fake("flashattn::norm_hvp")
def _(grad_y, hidden, weight, mean, rstd, tangent_hidden, tangent_weight, *flat):
    return norm.fake_backward(grad_y, None, hidden, weight, None, mean, rstd, *flat)[:3]


# ------------------------------------------------------------------------------------------------ in operations


@autocast.disable
def jvp_in_operations(x, residual, weight, bias, *flat):
    y, hidden, mean, rstd, *moved = run_jvp(REFERENCE, x, residual, weight, bias, *flat)
    return y, hidden, mean.detach(), rstd.detach(), *moved


@autocast.disable
def hvp_in_operations(grad_y, hidden, weight, mean, rstd, *flat):
    """Of mean and rstd as the functions of h that they are."""
    settings = Norm(*flat[4:-1])
    mean, rstd = reference.compute_norm_stats(hidden.reshape(-1, hidden.shape[-1]).to(rstd.dtype), settings)
    saved = SavedNorm(hidden, weight, None, replace_none(mean, rstd), rstd)
    return run_hvp(REFERENCE, grad_y, saved, *flat[:-1])


# ------------------------------------------------------------------------------------------------ rules

NOTHING = NormTangents(None, None, None, None)  # here also gradients of the inputs


def add(a: NormTangents, b: NormTangents) -> NormTangents:
    """Two sums; None is 0."""
    return NormTangents(*map(plus, a, b))


class Forward(NamedTuple):
    """A forward pass and what it saved, as the operators of its derivatives take them."""

    saved: SavedNorm
    x_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    settings: tuple  # those of Norm, and the backend

    @property
    def gradient_dtypes(self) -> tuple[torch.dtype, torch.dtype | None]:
        """Those of x and of the residual; None where theirs are one tensor, without dropout or a change of dtype."""
        same = Norm(*self.settings[:FIELDS]).dropout_p == 0 and self.residual_dtype == self.x_dtype
        return self.x_dtype, None if same else self.residual_dtype

    def vjp(self, grad_y: Tensor | None, grad_hidden: Tensor | None) -> NormTangents:
        """J^T g."""
        if grad_y is None:
            grad_y = torch.zeros_like(self.saved.hidden, dtype=self.x_dtype)
        given = grad_y, grad_hidden, *self.saved, *self.gradient_dtypes
        return self.read(*ops.norm_backward.default(*given, *self.settings))

    def hvp(self, grad_y: Tensor, t: Tensor | None, tangent_weight: Tensor | None) -> NormTangents:
        """H t, of the tangent t of h."""
        hidden, weight, _, mean, rstd = self.saved
        t = torch.zeros_like(hidden) if t is None else t
        given = grad_y, hidden, weight, mean, rstd, t, tangent_weight, *self.gradient_dtypes
        return self.read(*ops.norm_hvp.default(*given, *self.settings))

    def read(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> NormTangents:
        """Gradients of the inputs that there are."""
        if self.residual_dtype is None or self.gradient_dtypes[1] is None:
            residual = x
        return NormTangents(
            x,
            None if self.residual_dtype is None else residual,
            None if self.saved.weight is None else weight,
            None if self.saved.bias is None else bias,
        )

    def of_hidden(self) -> Forward:
        """That of h as x."""
        settings = Norm(*self.settings[:FIELDS])._replace(dropout_p=0.0, seed=None)
        return Forward(self.saved, self.saved.hidden.dtype, None, (*settings, self.settings[FIELDS]))

    def jvp(self, t: Tensor | None, tangent_weight: Tensor | None, tangent_bias: Tensor | None) -> Tensor:
        """The tangent of y along those of x, where it is h, and of the parameters."""
        hidden, weight, bias, _, _ = self.saved
        moved = t, None, tangent_weight, tangent_bias
        return ops.norm_jvp.default(hidden, None, weight, bias, *moved, hidden.dtype, False, *self.settings)[4]

    def move_hidden(self, x: Tensor | None, residual: Tensor | None) -> Tensor | None:
        """The tangent of h along those of x and residual."""
        settings, dtype = Norm(*self.settings[:FIELDS]), self.saved.hidden.dtype
        if x is None or settings.dropout_p == 0:
            moved = plus(x, residual)
            return None if moved is None else moved.to(dtype)
        settings = settings._replace(eps=1.0)  # which keeps what is not used, y, finite
        given = x, residual, None, None, dtype, True
        return ops.norm_forward.default(*given, *settings, self.settings[FIELDS])[1]


# norm_forward: (x, residual, weight, bias, hidden_dtype, keep_hidden, settings) to (y, hidden, mean, rstd).


def forward_set_up(ctx, inputs, outputs) -> None:
    *settings, backend = inputs[INPUTS + 2 :]
    norm.set_up_context(ctx, (*inputs[: INPUTS + 2], Norm(*settings), backend), outputs)


def forward_backward(ctx, *gradients):
    return *norm.differentiate(ctx, *gradients), None, None, *[None] * (FIELDS + 1)


def forward_jvp(inputs, tangents):
    *results, tangent_y, tangent_hidden = ops.norm_jvp.default(*inputs[:INPUTS], *tangents[:INPUTS], *inputs[INPUTS:])
    return tuple(results), (tangent_y, tangent_hidden, None, None)


# norm_backward: (grad_y, grad_hidden, hidden, weight, bias, mean, rstd, two dtypes, settings) to the gradients. mean
# and rstd are functions of h, through which they are differentiated.


def split_backward(inputs: Sequence) -> tuple[Tensor, Tensor | None, Forward]:
    """(grad_y, grad_hidden, the forward pass)."""
    x_dtype, residual_dtype, *settings = inputs[7:]
    return inputs[0], inputs[1], Forward(SavedNorm(*inputs[2:7]), x_dtype, residual_dtype, tuple(settings))


def backward_backward(ctx, *gradients):
    """Of S = sum(grad * gradients), the derivative of L along tangents t = grad: J t by grad_y, t by grad_hidden, and
    H t by the others."""
    (inputs,) = restore(ctx)
    grad_y, grad_hidden, call = split_backward(inputs)
    of_x, of_residual, of_weight, of_bias = gradients
    t = call.move_hidden(of_x, None if call.residual_dtype is None else of_residual)
    of_weight = None if call.saved.weight is None else of_weight
    of_bias = None if call.saved.bias is None else of_bias
    call = call.of_hidden()
    of_grad_y, of_saved = None, NOTHING
    if ctx.needed[0] and any(x is not None for x in (t, of_weight, of_bias)):
        of_grad_y = call.jvp(t, of_weight, of_bias).to(grad_y.dtype)
    if (ctx.needed[2] or ctx.needed[3]) and (t is not None or of_weight is not None):
        of_saved = call.hvp(grad_y, t, of_weight)
    of_grad_hidden = None if grad_hidden is None else t
    return of_grad_y, of_grad_hidden, of_saved.x, of_saved.weight, *[None] * (len(inputs) - 4)


def backward_jvp(inputs, tangents):
    """The tangents of J^T g: H t + J^T (tangent of g)."""
    outputs = ops.norm_backward.default(*inputs)
    of_grad_y, of_grad_hidden, t, of_weight = tangents[:4]
    grad_y, hidden, weight, mean, rstd = (inputs[n] for n in (0, 2, 3, 5, 6))
    total = NOTHING
    if t is not None or of_weight is not None:
        given = grad_y, hidden, weight, mean, rstd, torch.zeros_like(hidden) if t is None else t, of_weight
        x, residual, weight = ops.norm_hvp.default(*given, *inputs[7:])
        total = NormTangents(x, residual, weight, None)
    if of_grad_y is not None or of_grad_hidden is not None:
        of_grad_y = torch.zeros_like(grad_y) if of_grad_y is None else of_grad_y
        total = add(total, NormTangents(*ops.norm_backward.default(of_grad_y, of_grad_hidden, *inputs[2:])))
    return outputs, tuple(total)


# norm_jvp: (x, residual, weight, bias, their tangents, hidden_dtype, keep_hidden, settings) to the results and tangents
# of y and hidden.


def jvp_set_up(ctx, inputs, outputs) -> None:
    _, hidden, mean, rstd, _, tangent_hidden = outputs
    save(ctx, inputs, (hidden, mean, rstd, tangent_hidden))
    ctx.mark_non_differentiable(mean, rstd)


def jvp_backward(ctx, grad_y, grad_hidden, _mean, _rstd, of_tangent_y, of_tangent_hidden):
    """J^T g by the tangents, where g are the gradients of the tangents of y and hidden; by the inputs H t of these g,
    and J^T of the gradients of y and hidden."""
    inputs, (hidden, mean, rstd, t) = restore(ctx)
    x, residual, weight, bias, *tangents = inputs[: 2 * INPUTS]
    kept, *settings = inputs[INPUTS + JVP_SETTINGS - 1 :]
    tangents = NormTangents(*tangents)
    if not kept:
        grad_hidden, of_tangent_hidden = None, None  # of outputs that were returned empty
    if residual is None and Norm(*settings[:FIELDS]).dropout_p == 0:
        hidden, t = x, tangents.x
    norm.check_hidden(hidden, rstd)
    residual_dtype = None if residual is None else residual.dtype
    call = Forward(SavedNorm(hidden, weight, bias, mean, rstd), x.dtype, residual_dtype, tuple(settings))
    of_inputs, of_tangents = NOTHING, NOTHING
    if grad_y is not None or grad_hidden is not None:
        of_inputs = call.vjp(grad_y, grad_hidden)
    if of_tangent_y is not None:
        of_inputs = add(of_inputs, call.hvp(of_tangent_y, t, tangents.weight))
    if of_tangent_y is not None or of_tangent_hidden is not None:
        of_tangents = call.vjp(of_tangent_y, of_tangent_hidden)
    of_given = (g if t is not None else None for g, t in zip(of_tangents, tangents, strict=True))
    return *of_inputs, *of_given, *[None] * (len(inputs) - 2 * INPUTS)


register_derivatives("norm_forward", Rules(forward_set_up, forward_backward, forward_jvp))
register_derivatives("norm_backward", Rules(save_inputs, backward_backward, backward_jvp))
register_derivatives("norm_jvp", Rules(jvp_set_up, jvp_backward, in_operations=jvp_in_operations))
register_derivatives("norm_hvp", Rules(in_operations=hvp_in_operations))
