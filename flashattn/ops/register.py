"""How operators get their implementation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from .. import tracing


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
            tracing.refuse_tangents(*args)
            if torch.is_inference_mode_enabled():  # which has no autograd to bring back
                return run(*args)
            keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
            with contextlib.ExitStack() as enabled:
                for key in keys:
                    enabled.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
                return run(*args)

        implement(operator)(implementation)

    return register


def raise_double_backward(ctx, *_):
    raise RuntimeError("flashattn's gradients cannot be differentiated: a second derivative is not implemented")
