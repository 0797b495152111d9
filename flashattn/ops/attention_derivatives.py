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
from torch.utils._pytree import tree_flatten, tree_map

from ..backends import BACKENDS
from ..protocol import Saved, Tangents
from ..score import Score
from ..tensors import plus, replace_none
from . import attention
from .attention import BIAS, CAPTURED, SCORE, SINKS
from .register import (
    Rules,
    implement_with_autograd,
    refuse_third_derivative,
    register_derivatives,
    restore,
    save,
    save_inputs,
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
    q, k, v, bias, sinks, moved = flat
    captured = () if score.score_mod is None else score.score_mod.captured
    of_captured = tuple(t if t.shape == x.shape else None for t, x in zip(moved, captured, strict=True))
    return Tangents(q, k, v, bias, sinks, of_captured)


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
    *moved, tangent_out, tangent_lse = flat[: ATTENTION_TANGENTS + 2]
    score, backend = attention.unflatten(flat[ATTENTION_TANGENTS + 2 :])
    tangents = read_tangents(moved, score)
    saved, captured = attention.make_saved(q, k, v, out, lse, rest), () if score.score_mod is None else flat[CAPTURED]
    totals = attention.new_totals(captured, with_grad_captured, lse.dtype)
    grad_q, grad_k, grad_v, grad_bias = BACKENDS[backend].hvp(
        grad_out, grad_lse, saved, score, tangents, tangent_out, tangent_lse, with_grad_bias, totals
    )
    grad_sinks = None
    if score.sinks is not None:
        grad_sinks = compute_sink_hvp(grad_out, grad_lse, saved, score.sinks, tangents.sinks, tangent_out, tangent_lse)
    grad_captured = attention.cast_totals(totals, captured)
    return attention.fill_unneeded(grad_q, grad_k, grad_v, grad_bias, grad_sinks, grad_captured, like=lse)


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

    q: Any = None
    k: Any = None
    v: Any = None
    bias: Any = None
    sinks: Any = None
    captured: Sequence = ()

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


NOTHING = Trained()


def select_trained(inputs: Sequence) -> Trained:
    """From what is in those places."""
    q, k, v, *settings = inputs
    return Trained(q, k, v, settings[BIAS], settings[SINKS], settings[CAPTURED])


def add(a: Trained, b: Trained) -> Trained:
    """Two sums of gradients; None is 0."""
    captured = [plus(x, y) for x, y in itertools.zip_longest(a.captured, b.captured)]
    return Trained._make((*map(plus, a[:5], b[:5]), captured))


class OfResults(NamedTuple):
    """The gradients, or the tangents, of out and lse."""

    out: Tensor | None
    lse: Tensor | None

    @property
    def is_empty(self) -> bool:
        return self.out is None and self.lse is None


class Flags(NamedTuple):
    """Which gradients are computed, of those that take a pass of their own."""

    with_grad_bias: bool
    with_grad_captured: list[bool]


class Forward(NamedTuple):
    """A call of attention and its results, as the operators of its derivatives take them."""

    inputs: tuple  # q, k, v, then the score's arguments
    results: tuple  # out, lse, rest

    @property
    def settings(self) -> tuple:
        return self.inputs[3:]

    def choose_flags(self, needed: Trained) -> Flags:
        return Flags(self.settings[BIAS] is not None and bool(needed.bias), [bool(x) for x in needed.captured])

    def vjp(self, gradients: OfResults, needed: Trained) -> Trained:
        """J^T g."""
        flags = self.choose_flags(needed)
        found = ops.attention_backward.default(*self.list_backward_inputs(gradients), *flags, *self.settings)
        return self.read(found, flags)

    def hvp(self, gradients: OfResults, tangents: Trained, moved: OfResults, needed: Trained) -> Trained:
        """H t. moved: J t."""
        flags = self.choose_flags(needed)
        given = *self.list_backward_inputs(gradients), *flags, *self.flatten(tangents), *moved, *self.settings
        if torch.is_grad_enabled():  # views are no leaves: `find_needed` tells which gradients are asked for
            given = tree_map(lambda x: x.view_as(x) if isinstance(x, Tensor) else x, given)
        return self.read(ops.attention_hvp.default(*given), flags)

    def jvp(self, tangents: Trained) -> tuple[tuple, OfResults]:
        """(out, lse, rest), and J t."""
        *results, out, lse = ops.attention_jvp.default(*self.inputs[:3], *self.flatten(tangents), *self.settings)
        return tuple(results), OfResults(out, lse)

    def list_backward_inputs(self, gradients: OfResults) -> tuple:
        grad_out = torch.zeros_like(self.results[0]) if gradients.out is None else gradients.out
        return grad_out, gradients.lse, *self.inputs[:3], *self.results

    def read(self, gradients: Sequence, flags: Flags) -> Trained:
        """The gradients that there are, from the operators' results."""
        has_sinks = self.settings[SINKS] is not None
        *fields, captured = attention.drop_unneeded(
            tuple(gradients), flags.with_grad_bias, has_sinks, flags.with_grad_captured
        )
        return Trained._make((*fields, captured))

    def flatten(self, tangents: Trained) -> tuple:
        """Tangents as operators take them."""
        moved = itertools.zip_longest(tangents.captured, self.settings[CAPTURED])
        return *tangents[:5], [x.new_empty(0) if t is None else t for t, x in moved]


def unflatten_tangents(flat: Sequence) -> Trained:
    *fields, captured = flat
    return Trained._make((*fields, [None if t.numel() == 0 else t for t in captured]))


def place_tangents(gradients: Trained, tangents: Sequence) -> tuple:
    """The gradients of the tangents that an operator got, in their places."""
    *fields, captured = tangents
    of_fields = (g if t is not None else None for g, t in zip(gradients[:5], fields, strict=True))
    return *of_fields, list(gradients.captured) or [None] * len(captured)


def save_with_results(ctx, inputs, outputs) -> None:
    """`set_up_context` of the operators whose results begin with out, lse and rest."""
    save(ctx, inputs, outputs)
    ctx.mark_non_differentiable(outputs[2])


# attention_forward: (q, k, v, the score's arguments) to (out, lse, rest).


def forward_backward(ctx, grad_out, grad_lse, _):
    call, gradients = Forward(*restore(ctx)), OfResults(grad_out, grad_lse)
    found = NOTHING if gradients.is_empty else call.vjp(gradients, select_trained(ctx.needed))
    return found.as_inputs(call.settings)


def forward_jvp(inputs, tangents):
    results, moved = Forward(inputs, ()).jvp(select_trained(tangents))
    return results, (*moved, None)


# attention_backward: (grad_out, grad_lse, q, k, v, out, lse, rest, two flags, the score's arguments) to the gradients.
# out, lse and rest are functions of the others, through which these are differentiated.


class Backward(NamedTuple):
    """Its inputs, or what belongs to each of them."""

    gradients: OfResults
    call: Forward
    flags: Flags


def split_backward(inputs: Sequence) -> Backward:
    call = Forward((*inputs[2:5], *inputs[BACKWARD_INPUTS:]), tuple(inputs[5:8]))
    return Backward(OfResults(*inputs[:2]), call, Flags(*inputs[8:BACKWARD_INPUTS]))


def join_backward(gradients: OfResults, of_call: Trained, given: Backward) -> tuple:
    """The gradients of its inputs."""
    q, k, v, *of_settings = of_call.as_inputs(given.call.settings)
    flags = None, [None] * len(given.flags.with_grad_captured)
    return *gradients, q, k, v, None, None, None, *flags, *of_settings


def select_backward(inputs: Sequence) -> Trained:
    return select_trained((*inputs[2:5], *inputs[BACKWARD_INPUTS:]))


def backward_backward(ctx, *gradients):
    """The derivative of L along tangents t, which are the gradients here: J t by grad_out and grad_lse, H t by the
    others."""
    (inputs,) = restore(ctx)
    given = split_backward(inputs)
    tangents = given.call.read(gradients, given.flags)
    if tangents.is_empty:
        return join_backward(OfResults(None, None), NOTHING, given)
    _, moved = given.call.jvp(tangents)
    needed = select_backward(ctx.needed)
    of_call = NOTHING if needed.is_empty else given.call.hvp(given.gradients, tangents, moved, needed)
    return join_backward(moved if given.gradients.lse is not None else moved._replace(lse=None), of_call, given)


def backward_jvp(inputs, tangents):
    """The tangents of J^T g: H t + J^T (tangent of g)."""
    given, moved = split_backward(inputs), split_backward(tangents)
    needed = Trained(bias=given.flags.with_grad_bias, captured=given.flags.with_grad_captured)
    total, of_call = NOTHING, select_backward(tangents)
    if not of_call.is_empty:
        of_results = OfResults(*moved.call.results[:2])  # forward's, in the same direction
        if of_results.out is None or of_results.lse is None:
            _, of_results = given.call.jvp(of_call)
        total = given.call.hvp(given.gradients, of_call, of_results, needed)
    if not moved.gradients.is_empty:
        total = add(total, given.call.vjp(moved.gradients, needed))
    captured = list(total.captured) or [None] * len(given.flags.with_grad_captured)
    return ops.attention_backward.default(*inputs), (*total[:5], captured)


# attention_jvp: (q, k, v, their tangents, the score's arguments) to (out, lse, rest, tangent_out, tangent_lse).


def jvp_backward(ctx, grad_out, grad_lse, _, grad_tangent_out, grad_tangent_lse):
    """With the gradients g of the tangents of out and lse: J^T g by the tangents of the inputs; by the inputs H t of
    this g, and J^T of the gradients of out and lse."""
    inputs, (*results, tangent_out, tangent_lse) = restore(ctx)
    tangents_at = slice(3, 3 + ATTENTION_TANGENTS)
    call = Forward((*inputs[:3], *inputs[tangents_at.stop :]), tuple(results))
    needed = select_trained((*ctx.needed[:3], *ctx.needed[tangents_at.stop :]))
    gradients, g = OfResults(grad_out, grad_lse), OfResults(grad_tangent_out, grad_tangent_lse)
    of_call = NOTHING if gradients.is_empty else call.vjp(gradients, needed)
    of_tangents = NOTHING
    if not g.is_empty:
        moved = OfResults(tangent_out, tangent_lse)
        of_call = add(of_call, call.hvp(g, unflatten_tangents(inputs[tangents_at]), moved, needed))
        of_tangents = call.vjp(g, Trained(*ctx.needed[tangents_at]))
    q, k, v, *of_settings = of_call.as_inputs(call.settings)
    return q, k, v, *place_tangents(of_tangents, inputs[tangents_at]), *of_settings


# attention_hvp, of attention_backward's inputs with tangents and J t before the score's arguments, is linear in the
# tangents.


def hvp_backward(ctx, *gradients):
    """H u by the tangents, where u are the gradients, since H is symmetric (`torch.autograd.functional.hvp` asks for
    it). By the other inputs it is a third derivative."""
    (inputs,) = restore(ctx)
    tangents_at = slice(BACKWARD_INPUTS, BACKWARD_INPUTS + ATTENTION_TANGENTS)
    settings_from = tangents_at.stop + len(OfResults._fields)
    if any(tree_flatten((ctx.needed[:5], ctx.needed[settings_from:]))[0]):
        refuse_third_derivative()
    given = split_backward((*inputs[:BACKWARD_INPUTS], *inputs[settings_from:]))
    u, of_tangents = given.call.read(gradients, given.flags), NOTHING
    if not u.is_empty:
        _, moved = given.call.jvp(u)
        of_tangents = given.call.hvp(given.gradients, u, moved, Trained(*ctx.needed[tangents_at]))
    own = join_backward(OfResults(None, None), NOTHING, given)
    placed = place_tangents(of_tangents, inputs[tangents_at])
    return *own[:BACKWARD_INPUTS], *placed, None, None, *own[BACKWARD_INPUTS:]


register_derivatives("attention_forward", Rules(save_with_results, forward_backward, forward_jvp))
register_derivatives("attention_backward", Rules(save_inputs, backward_backward, backward_jvp))
register_derivatives("attention_jvp", Rules(save_with_results, jvp_backward, refuse_third_derivative))
register_derivatives("attention_hvp", Rules(save_inputs, hvp_backward, refuse_third_derivative))
