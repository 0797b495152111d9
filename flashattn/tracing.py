"""Graphs, transforms, dispatch modes and captures: whether a call may read its tensors, must pass through the
dispatcher, or must be refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import VmapInterpreter
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable)


def is_traced() -> bool:
    """Whether this thread traces a graph. PyTorch's own flag is up for every thread while one of them does."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def must_dispatch() -> bool:
    """True under torch.compile, functorch transforms, forward mode or a TorchDispatchMode: a call must pass through
    PyTorch's dispatcher, and not take the shortcut past it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or is_forward_mode()
    )


def has_no_subclass(*tensors: Tensor | None) -> bool:
    """Whether all are plain tensors. A subclass may override dispatch."""
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


def choose_path(*inputs: Tensor | None) -> tuple[bool, bool]:
    """(whether a call on these must pass through the dispatcher, whether it needs a gradient otherwise). The first
    input must not be None."""
    first = inputs[0]
    assert first is not None
    dispatched, requires_grad = must_dispatch() or first.is_meta, False
    for x in inputs:  # a loop: this is the path that is counted in microseconds
        if x is None:
            continue
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            requires_grad = requires_grad or x.requires_grad
        else:
            dispatched = True  # a subclass may override dispatch
    return dispatched, requires_grad and torch.is_grad_enabled()


def is_legacy_batched(x) -> bool:
    """Whether x is a batch of `torch.autograd.grad(is_grads_batched=True)`, whose vmap is older than functorch."""
    return isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x)


def has_data(x: Tensor) -> bool:
    """Whether x's values can be read: not while a graph is compiled, nor of a meta or fake tensor, nor of one that a
    transform has wrapped."""
    if is_traced() or x.is_meta or type(x).__name__ == "FakeTensor":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def keep_from_dynamo(function: Callable) -> Callable:
    """`torch.compiler.disable`, which imports torch._dynamo (seconds) where it decorates. This imports it in the first
    call; only calls that must dispatch come here."""
    return _disable_dynamo(function)


def mark_constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result` without its import of torch._dynamo: a graph holds the result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # which Dynamo looks for
    return function


# ------------------------------------------------------------------------------------------------ forward mode


def is_forward_mode() -> bool:
    """Whether forward-mode derivatives are computed, in `forward_ad.dual_level` or `torch.func.jvp`."""
    return forward_ad._current_level >= 0


def has_tangents_here() -> bool:
    """Whether tensors may have tangents at the level of transforms that the dispatcher is at, where it is at one."""
    if not torch._C._is_fwd_grad_enabled():
        return False
    innermost = torch._C._functorch.peek_interpreter_stack()
    # A compiled graph enters forward mode without Python's count of its levels.
    in_jvp = innermost is not None and innermost.key() == torch._C._functorch.TransformType.Jvp
    return in_jvp or is_forward_mode()


def get_tangent(x) -> Tensor | None:
    """x's tangent at that level; None of what has none."""
    return forward_ad.unpack_dual(x, level=0).tangent if isinstance(x, Tensor) else None


def is_transformed() -> bool:
    """Whether functorch's transforms or forward mode are on."""
    return torch._C._are_functorch_transforms_active() or is_forward_mode()


def find_vmap() -> VmapInterpreter | None:
    """functorch's vmap, where it is the innermost transform and nothing else needs the dispatcher before it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    innermost = torch._C._functorch.peek_interpreter_stack()
    if innermost is None or innermost.key() != torch._C._functorch.TransformType.Vmap:
        return None
    return VmapInterpreter(innermost)


def is_wrapped(x: Tensor) -> bool:
    """Whether a transform has wrapped x, or it carries a tangent."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or (is_forward_mode() and _has_tangent(x))


def refuse_tangents(what: str, *tensors) -> None:
    """Raise for a tensor with a tangent, which PyTorch would drop: `what` has no derivative."""
    if is_forward_mode():
        _refuse_tangents(what, tensors)


@keep_from_dynamo  # a graph would hide the tangents
def _refuse_tangents(what: str, tensors: Sequence) -> None:
    # In a compiled graph no tangents are left.
    compiled = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.ADInplaceOrView)
    if not compiled and any(isinstance(x, Tensor) and _has_tangent(x) for x in tensors):
        raise NotImplementedError(f"{what} has no derivative, in forward mode either (torch.func.jvp, dual tensors)")


def _has_tangent(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(x) or forward_ad.unpack_dual(x, level=0).tangent is None:
        if not functorch.is_functorch_wrapped_tensor(x):
            return False
        x = functorch.get_unwrapped(x)  # the tensor inside a transform's wrapper may have the tangent
    return True


# ------------------------------------------------------------------------------------------------ exports, captures


def refuse_onnx(operator: str) -> None:
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            f"flashattn::{operator} has no form in ONNX: export the model with PyTorch's own attention and norms "
            "(flashattn.compat.sdpa exports as PyTorch's own by itself)"
        )


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing can be read back from the GPU, nor copied from the CPU."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(name: str, why: str) -> None:
    """Raise by name where CUDA would break off a capture without one."""
    if is_capturing():
        raise ValueError(f"{name} cannot be captured in a CUDA graph: {why}")
