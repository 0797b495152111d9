"""The operators of attention's further derivatives, and the rules of all: forward mode, and second derivatives.

Of a call's inputs x, with the loss L = sum(grad_out * out) + sum(grad_lse * lse) of constant grad_out and grad_lse,
attention_jvp computes J t and attention_hvp H t, for tangents t of x; J is the derivative of (out, lse), H the Hessian
of L. attention_backward computes J^T g. Every rule is made of these three (`kernels/README.md`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..protocol import Saved, Tangents
from ..score import Score
from ..tensors import replace_none
from . import attention
from .attention import BIAS, CAPTURED, SCORE, SINKS
from .register import (
    Rules,
    implement_with_autograd,
    refuse_third_derivative,
    register_derivatives,
    restore,
    save,
)

TANGENTS = (
    "Tensor? tangent_q, Tensor? tangent_k, Tensor? tangent_v, Tensor? tangent_bias, Tensor? tangent_sinks, "
    "Tensor[] tangent_captured"  # a captured tensor without a tangent has an empty one
)
torch.library.define(
    "flashattn::attention_jvp",
    f"(Tensor q, Tensor k, Tensor v, {TANGENTS}, {SCORE}) "
    "-> (Tensor out, Tensor lse, Tensor rest, Tensor tangent_out, Tensor tangent_lse)",
)
torch.library.define(
    "flashattn::attention_hvp",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rest, "
    f"bool with_grad_bias, bool[] with_grad_captured, {TANGENTS}, Tensor tangent_out, Tensor tangent_lse, {SCORE}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_sinks, Tensor[] grad_captured)",
)
ATTENTION_TANGENTS = len(Tangents._fields)
BACKWARD_INPUTS = 10  # of attention_backward before the score: grad_out .. rest, with_grad_bias, with_grad_captured
ops = torch.ops.flashattn


def read_tangents(flat: Sequence, score: Score) -> Tangents:
    """Those of an operator's arguments."""
    *fields, moved = flat
    captured = () if score.score_mod is None else score.score_mod.captured
    return Tangents(*fields, tuple(t if t.shape == x.shape else None for t, x in zip(moved, captured, strict=True)))


# ------------------------------------------------------------------------------------------------ implementations


@implement_with_autograd("attention_jvp")
def _(q, k, v, *flat):
    score, backend = attention.unflatten(flat[ATTENTION_TANGENTS:])
    tangents = read_tangents(flat[:ATTENTION_TANGENTS], score)
    out, lse, rest, *tangents_out = BACKENDS[backend].jvp(q, k, v, score, tangents)
    return out, lse, replace_none(rest, lse), *tangents_out


@torch.library.register_fake("flashattn::attention_jvp")
def _(q, k, v, *flat):
    out, lse, rest = attention.fake_forward(q, k, v, *flat[ATTENTION_TANGENTS:])
    return out, lse, rest, torch.empty_like(out), torch.empty_like(lse)


@implement_with_autograd("attention_hvp")
def _(grad_out, grad_lse, q, k, v, out, lse, rest, with_grad_bias, with_grad_captured, *flat):
    *tangents, tangent_out, tangent_lse = flat[: ATTENTION_TANGENTS + 2]
    score, backend = attention.unflatten(flat[ATTENTION_TANGENTS + 2 :])
    tangents = read_tangents(tangents, score)
    saved, captured = attention.make_saved(q, k, v, out, lse, rest), () if score.score_mod is None else flat[CAPTURED]
    totals = attention.new_totals(captured, with_grad_captured, lse.dtype)
    *gradients, grad_bias = BACKENDS[backend].hvp(
        grad_out, grad_lse, saved, score, tangents, tangent_out, tangent_lse, with_grad_bias, totals
    )
    grad_sinks = None
    if score.sinks is not None:
        grad_sinks = compute_sink_hvp(grad_out, grad_lse, saved, score.sinks, tangents.sinks, tangent_out, tangent_lse)
    grad_captured = attention.cast_totals(totals, captured)
    return attention.fill_unneeded(*gradients, grad_bias, grad_sinks, grad_captured, like=lse)


def compute_sink_hvp(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, sinks: Tensor, tangent: Tensor | None, tangent_out: Tensor,
    tangent_lse: Tensor,
) -> Tensor:  # fmt: skip
    """The tangent of a sink's ds = -p delta."""
    p, delta = attention.compute_sink_weights(grad_out, grad_lse, saved, sinks)
    tangent_delta = (grad_out.to(delta.dtype) * tangent_out).sum(-1)
    moved = -tangent_lse if tangent is None else tangent.to(delta.dtype)[:, None] - tangent_lse
    return (-p * (moved * delta + tangent_delta)).sum((0, 2)).to(sinks.dtype)


@torch.library.register_fake("flashattn::attention_hvp")
def _(*args):
    return attention.fake_gradients(*args[:BACKWARD_INPUTS], *args[BACKWARD_INPUTS + ATTENTION_TANGENTS + 2 :])


# ------------------------------------------------------------------------------------------------ rules


class Trained(NamedTuple):
    """What belongs to each input that has a derivative: its gradient, its tangent, or whether one is needed."""

    q: Any
    k: Any
    v: Any
    bias: Any
    sinks: Any
    captured: Any  # a list

    @property
    def is_empty(self) -> bool:
        return not any(x is not None and x is not False for x in (*self[:5], *self.captured))

    def as_inputs(self, settings: Sequence) -> tuple:
        """In the places of q, k, v and the score's arguments, None in others."""
        of_settings: list = [[None] * len(x) if isinstance(x, list) else None for x in settings]
        of_settings[BIAS], of_settings[SINKS] = self.bias, self.sinks
        if self.captured:
            of_settings[CAPTURED] = list(self.captured)
        return *self[:3], *of_settings


def select_trained(inputs: Sequence) -> Trained:
    """From what is in those places."""
    q, k, v, *settings = inputs
    return Trained(q, k, v, settings[BIAS], settings[SINKS], settings[CAPTURED])


NOTHING = Trained(None, None, None, None, None, [])


def add(a: Trained, b: Trained) -> Trained:
    """Two sums of gradients; None is 0."""

    def plus(x, y):
        return x if y is None else y if x is None else x + y

    captured = [plus(x, y) for x, y in itertools.zip_longest(a.captured, b.captured)]
    return Trained(*map(plus, a[:5], b[:5]), captured)


class Forward(NamedTuple):
    """A call of attention and its results, as the operators of its derivatives take them."""

    inputs: tuple  # q, k, v, then the score's arguments
    results: tuple  # out, lse, rest

    @property
    def settings(self) -> tuple:
        return self.inputs[3:]

    def list_flags(self, needed: Trained) -> tuple[bool, list[bool]]:
        """with_grad_bias and with_grad_captured."""
        return self.settings[BIAS] is not None and bool(needed.bias), [bool(x) for x in needed.captured]

    def vjp(self, grad_out: Tensor | None, grad_lse: Tensor | None, needed: Trained) -> Trained:
        """J^T g."""
        flags = self.list_flags(needed)
        given = *self.read_gradients(grad_out, grad_lse), *self.inputs[:3], *self.results
        gradients = ops.attention_backward.default(*given, *flags, *self.settings)
        return self.read(gradients, *flags)

    def hvp(self, grad_out: Tensor | None, grad_lse: Tensor | None, tangents: Trained, moved: tuple, needed: Trained):
        """H t. moved: the tangents of out and lse."""
        flags = self.list_flags(needed)
        given = *self.read_gradients(grad_out, grad_lse), *self.inputs[:3], *self.results
        gradients = ops.attention_hvp.default(*given, *flags, *self.flatten(tangents), *moved, *self.settings)
        return self.read(gradients, *flags)

    def jvp(self, tangents: Trained) -> tuple[Tensor, ...]:
        """out, lse, rest and J t."""
        return ops.attention_jvp.default(*self.inputs[:3], *self.flatten(tangents), *self.settings)

    def read_gradients(self, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(self.results[0]) if grad_out is None else grad_out, grad_lse

    def read(self, gradients: tuple, with_grad_bias: bool, with_grad_captured: list[bool]) -> Trained:
        has_sinks = self.settings[SINKS] is not None
        return Trained(*attention.drop_unneeded(gradients, with_grad_bias, has_sinks, with_grad_captured))

    def flatten(self, tangents: Trained) -> tuple:
        """Tangents as operators take them."""
        moved = itertools.zip_longest(tangents.captured, self.settings[CAPTURED])
        return *tangents[:5], [x.new_empty(0) if t is None else t for t, x in moved]


# attention_forward: (q, k, v, the score's arguments) to (out, lse, rest).


def forward_set_up(ctx, inputs, outputs) -> None:
    save(ctx, inputs, outputs)
    ctx.mark_non_differentiable(outputs[2])


def forward_backward(ctx, grad_out, grad_lse, _):
    call = Forward(*restore(ctx))
    if grad_out is None and grad_lse is None:
        return NOTHING.as_inputs(call.settings)
    return call.vjp(grad_out, grad_lse, select_trained(ctx.needed)).as_inputs(call.settings)


def forward_jvp(inputs, tangents):
    *results, tangent_out, tangent_lse = Forward(inputs, ()).jvp(select_trained(tangents))
    return tuple(results), (tangent_out, tangent_lse, None)


# attention_backward: (grad_out, grad_lse, q, k, v, out, lse, rest, two flags, the score's arguments) to the gradients.
# out, lse and rest are functions of the others, through which these are differentiated.


def split_backward(inputs: Sequence) -> tuple[tuple, Sequence, Forward]:
    """((grad_out, grad_lse), (with_grad_bias, with_grad_captured), the call) of its inputs."""
    settings = inputs[BACKWARD_INPUTS:]
    return tuple(inputs[:2]), inputs[8:BACKWARD_INPUTS], Forward((*inputs[2:5], *settings), tuple(inputs[5:8]))


def place_backward(gradients: Sequence, of_inputs: Trained, inputs: Sequence) -> tuple:
    """Of grad_out, grad_lse and the call's inputs, in the places of attention_backward's inputs."""
    of_qkv_and_score = of_inputs.as_inputs(inputs[BACKWARD_INPUTS:])
    flags = None, [None] * len(inputs[BACKWARD_INPUTS - 1])
    return *gradients, *of_qkv_and_score[:3], None, None, None, *flags, *of_qkv_and_score[3:]


def backward_set_up(ctx, inputs, outputs) -> None:
    save(ctx, inputs, ())


def backward_backward(ctx, *gradients):
    """Of S = sum(grad * gradients), the derivative of L along tangents t = grad: J t by grad_out and grad_lse, and H t
    by the others."""
    inputs, _ = restore(ctx)
    given, (with_grad_bias, with_grad_captured), call = split_backward(inputs)
    has_sinks = call.settings[SINKS] is not None
    tangents = Trained(*attention.drop_unneeded(gradients, with_grad_bias, has_sinks, with_grad_captured))
    if tangents.is_empty:
        return place_backward((None, None), NOTHING, inputs)
    moved = call.jvp(tangents)[3:]
    needed = select_trained((*ctx.needed[2:5], *ctx.needed[BACKWARD_INPUTS:]))
    of_inputs = NOTHING if needed.is_empty else call.hvp(*given, tangents, moved, needed)
    return place_backward((moved[0], None if given[1] is None else moved[1]), of_inputs, inputs)


def backward_jvp(inputs, tangents):
    """The tangents of J^T g: H t + J^T (tangent of g)."""
    outputs = ops.attention_backward.default(*inputs)
    given, (with_grad_bias, with_grad_captured), call = split_backward(inputs)
    moved_given, _, moved = split_backward(tangents)
    needed = Trained(True, True, True, with_grad_bias, True, with_grad_captured)
    total, of_inputs = NOTHING, select_trained(moved.inputs)
    if not of_inputs.is_empty:
        of_results = moved.results[:2]
        if any(x is None for x in of_results):
            of_results = call.jvp(of_inputs)[3:]
        total = call.hvp(*given, of_inputs, of_results, needed)
    if any(x is not None for x in moved_given):
        total = add(total, call.vjp(*moved_given, needed))
    return outputs, (*total[:5], [*total.captured])


# attention_jvp: (q, k, v, their tangents, the score's arguments) to (out, lse, rest, tangent_out, tangent_lse).


def split_jvp(inputs: Sequence) -> tuple[tuple, Trained]:
    """(q, k, v and the score's arguments, tangents)."""
    *fields, captured = inputs[3 : 3 + ATTENTION_TANGENTS]
    moved = [None if t.numel() == 0 else t for t in captured]
    return (*inputs[:3], *inputs[3 + ATTENTION_TANGENTS :]), Trained(*fields, moved)


def jvp_set_up(ctx, inputs, outputs) -> None:
    save(ctx, inputs, outputs)
    ctx.mark_non_differentiable(outputs[2])


def jvp_backward(ctx, grad_out, grad_lse, _, of_tangent_out, of_tangent_lse):
    """J^T g by the tangents, where g are the gradients of the tangents of out and lse; by the inputs H t of these g,
    and J^T of the gradients of out and lse."""
    inputs, (*results, tangent_out, tangent_lse) = restore(ctx)
    primals, tangents = split_jvp(inputs)
    call = Forward(primals, tuple(results))
    needed = select_trained((*ctx.needed[:3], *ctx.needed[3 + ATTENTION_TANGENTS :]))
    of_inputs, of_tangents = NOTHING, NOTHING
    if grad_out is not None or grad_lse is not None:
        of_inputs = call.vjp(grad_out, grad_lse, needed)
    if of_tangent_out is not None or of_tangent_lse is not None:
        g = of_tangent_out, of_tangent_lse
        of_inputs = add(of_inputs, call.hvp(*g, tangents, (tangent_out, tangent_lse), needed))
        of_tangents = call.vjp(*g, Trained(*ctx.needed[3 : 3 + ATTENTION_TANGENTS]))
    given = [x if t is not None else None for x, t in zip(of_tangents[:5], tangents[:5], strict=True)]
    captured = list(of_tangents.captured) or [None] * len(tangents.captured)
    q, k, v, *of_settings = of_inputs.as_inputs(call.settings)
    return q, k, v, *given, captured, *of_settings


def unused_set_up(ctx, inputs, outputs) -> None:
    pass


register_derivatives("attention_forward", Rules(forward_set_up, forward_backward, forward_jvp))
register_derivatives("attention_backward", Rules(backward_set_up, backward_backward, backward_jvp))
register_derivatives("attention_jvp", Rules(jvp_set_up, jvp_backward, refuse_third_derivative))
register_derivatives("attention_hvp", Rules(unused_set_up, refuse_third_derivative, refuse_third_derivative))
