"""How operators get their implementation and their derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from .. import tracing

library = torch.library.Library("flashattn", "FRAGMENT")  # torch.library.impl passes on no keyset


def implement(operator: str) -> Callable:
    """Register the implementation of an operator. Where a graph breaks off around the operator, Dynamo meets its frame
    and must leave it alone: the engine's own operators, which it calls, have no fakes."""
    register = torch.library.impl(f"flashattn::{operator}", "CompositeExplicitAutograd")
    return lambda run: register(tracing.keep_from_dynamo(run))


def implement_with_autograd(operator: str) -> Callable:
    """`implement` for an operator that may differentiate callables. The dispatcher runs it below autograd, where that
    would give zeros."""

    def register(run: Callable) -> None:
        def implementation(*args):
            if torch.is_inference_mode_enabled():  # which has no autograd to bring back
                return run(*args)
            keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
            with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False), contextlib.ExitStack() as enabled:
                for key in keys:
                    enabled.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
                return run(*args)

        implement(operator)(implementation)

    return register


# ------------------------------------------------------------------------------------------------ derivatives


class Rules(NamedTuple):
    """The derivatives of an operator. Inputs and outputs, their gradients and tangents are structured as the schema has
    them, with None for what has no gradient or tangent."""

    set_up_context: Callable[[Any, tuple, Any], None] | None = None  # (ctx, inputs, outputs)
    backward: Callable | None = None  # (ctx, *gradients of the outputs) to those of the inputs; ctx.needed: which
    jvp: Callable[[tuple, tuple], tuple] | None = None  # (inputs, tangents) to (outputs, their tangents)
    in_operations: Callable | None = None  # the operator in PyTorch's, in place of a rule that there is not


class Call(NamedTuple):
    """A call of an operator, beside the tensors of its arguments."""

    operator: torch._ops.OpOverload
    rules: Rules
    below: torch._C.DispatchKeySet
    structure: TreeSpec
    tensors: list[bool]  # which of the flat arguments are tensors
    moved: tuple[tuple, tuple] | None  # the inputs without tangents, and their tangents; None in reverse mode alone
    results: list  # gets the structure of the outputs


class Differentiated(_SingleLevelFunction):
    """An operator's autograd function, at one level of functorch's transforms: the dispatcher comes here once for each.
    In forward mode the outputs and their tangents are computed together, in one pass."""

    @staticmethod
    def forward(ctx, call: Call, *flat):
        ctx.call = call
        inputs = tree_unflatten(list(flat), call.structure)
        # autograd.Function disables these modes for all levels of transforms, those below too.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            if call.moved is None:
                outputs = call.operator.redispatch(call.below, *inputs)
            else:
                assert call.rules.jvp is not None
                outputs, ctx.tangents = call.rules.jvp(*call.moved)
        ctx.set_materialize_grads(False)
        assert call.rules.set_up_context is not None
        call.rules.set_up_context(ctx, inputs, outputs)
        flat_outputs, structure = tree_flatten(outputs)
        call.results.append(structure)
        constant = {id(x) for x in getattr(ctx, "non_differentiable", None) or ()}
        ctx.zeros = [None if id(x) in constant or call.moved is None else torch.zeros_like(x) for x in flat_outputs]
        return tuple(flat_outputs)

    @staticmethod
    def jvp(ctx, *_):
        """The tangents of the outputs; computed anew where they have to be differentiated at this level too."""
        tangents, moved = ctx.tangents, ctx.call.moved
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tree_flatten(moved)[0]):
            with forward_ad._set_fwd_grad_enabled(False):
                tangents = ctx.call.rules.jvp(*moved)[1]
        # PyTorch asks for a tangent of each output that has a derivative.
        filled = (zero if x is None else x for x, zero in zip(tree_flatten(tangents)[0], ctx.zeros, strict=True))
        ctx.tangents, ctx.zeros, ctx.call = None, None, ctx.call._replace(moved=None)
        return tuple(filled)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.needed = tree_unflatten(find_needed(ctx), ctx.call.structure)
        gradients = tree_unflatten(list(gradients), ctx.call.results[0])
        return None, *tree_flatten(ctx.call.rules.backward(ctx, *gradients))[0]


def find_needed(ctx) -> list[bool]:
    """Which inputs this backward pass takes a gradient of: of those that require one, not all have to be among the
    inputs that `torch.autograd.grad` was asked for. (PyTorch does not say it of leaves.)"""
    edges = iter(ctx.next_functions)  # one for each tensor
    needed = []
    for is_tensor, requires_grad in zip(ctx.call.tensors, ctx.needs_input_grad[1:], strict=True):
        node = next(edges)[0] if is_tensor else None
        is_leaf = node is not None and not node.next_functions
        needed.append(requires_grad and node is not None and (is_leaf or torch._C._will_engine_execute_node(node)))
    return needed


def register_derivatives(operator: str, rules: Rules) -> None:
    """Register the rules of an operator."""
    overload = getattr(torch.ops.flashattn, operator).default

    def differentiate(keyset, *inputs):
        below = keyset & torch._C._after_autograd_keyset
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        tangents = find_tangents(inputs)
        if not recorded and tangents is None:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(below, *inputs)
        if rules.backward is None or (tangents is not None and rules.jvp is None):
            assert rules.in_operations is not None
            return rules.in_operations(*inputs)
        flat, structure = tree_flatten(inputs)
        moved = None if tangents is None else (drop_tangents(inputs), tangents)
        call = Call(overload, rules, below, structure, [isinstance(x, Tensor) for x in flat], moved, [])
        with enable_single_level_autograd_function():
            outputs = Differentiated.apply(call, *flat)  # type: ignore[attr-defined]  # which C++ defines
        return tree_unflatten(list(outputs), call.results[0])

    library.impl(operator, differentiate, "Autograd", with_keyset=True)


def find_tangents(inputs: tuple) -> tuple | None:
    """The tangents of the inputs at this level of transforms, None for those without; None if there is none."""
    if not tracing.has_tangents_here():
        return None
    tangents = tree_map(tracing.get_tangent, inputs)
    return tangents if any(isinstance(x, Tensor) for x in tree_flatten(tangents)[0]) else None


def drop_tangents(inputs: tuple) -> tuple:
    return tree_map(lambda x: forward_ad.unpack_dual(x, level=0).primal if isinstance(x, Tensor) else x, inputs)


def save(ctx, *values) -> None:
    """Save values, structures of tensors and others, for `restore`. Autograd notices then where a tensor is changed in
    place between forward and backward; it cannot save tensors of inference mode."""
    flat, ctx.structure = tree_flatten(values)
    saved = [isinstance(x, Tensor) and not x.is_inference() for x in flat]
    ctx.others = [None if watched else x for x, watched in zip(flat, saved, strict=True)]
    ctx.save_for_backward(*(x if watched else None for x, watched in zip(flat, saved, strict=True)))


def save_inputs(ctx, inputs: tuple, outputs: tuple) -> None:
    """The `set_up_context` of an operator whose rules read its inputs alone."""
    save(ctx, inputs)


def restore(ctx) -> tuple:
    flat = [x if saved is None else saved for x, saved in zip(ctx.others, ctx.saved_tensors, strict=True)]
    return tree_unflatten(flat, ctx.structure)


def refuse_third_derivative(*_):
    raise NotImplementedError(
        "flashattn differentiates attention twice: a third derivative, or forward mode of forward mode "
        "(jacfwd of jacfwd; take jacfwd of jacrev), is not implemented"
    )
