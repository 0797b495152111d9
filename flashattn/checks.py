"""Argument checks that attention and the norms share. Each names the argument, what it got and what it takes. And what
a GPU asks of Python: numbers reach it without a wait, and nothing is read back while a CUDA graph is captured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def overrides(x: Tensor) -> bool:
    """Whether x is of a subclass that PyTorch asks before it calls a function."""
    if type(x) is Tensor or type(x) is torch.nn.Parameter:
        return False
    return type(x).__torch_function__ is not torch._C._disabled_torch_function_impl


def has_own_operations(x: Tensor) -> bool:
    """Whether that subclass, such as PyTorch's CausalBias, answers in another way than Tensor's: then its memory may
    not be what it stands for."""
    own, usual = type(x).__torch_function__, Tensor.__torch_function__
    return overrides(x) and getattr(own, "__func__", None) is not usual.__func__


def refuse_own_operations(name: str, x: Tensor) -> None:
    if has_own_operations(x):
        raise TypeError(f"{name} must be a plain tensor, got {type(x).__name__}, which has operations of its own")


def floating(name: str, x) -> None:
    if not isinstance(x, Tensor):
        tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    on_device(name, x, other_name, other.device)


def on_device(name: str, x: Tensor, owner: str, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on {owner}'s device {device}, got {x.device}")


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {x.dtype}")


def probability(name: str, p) -> float:
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"{name} must be a float, got {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), got {p}")
    return float(p)


def is_traced() -> bool:
    """Whether this thread traces a graph. PyTorch's own flag is up for every thread while one of them does."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def is_forward_mode() -> bool:
    """Whether forward-mode derivatives are computed: somebody is in `forward_ad.dual_level` or `torch.func.jvp`."""
    return forward_ad._current_level >= 0


def refuse_tangents(*tensors) -> None:
    """Say that forward-mode derivatives are not implemented, where PyTorch would take them to be 0."""
    if is_forward_mode():
        _refuse_tangents(tensors)


@torch.compiler.disable  # a graph would hide the tangents
def _refuse_tangents(tensors: Sequence) -> None:
    # In a graph that was compiled none are left.
    compiled = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.ADInplaceOrView)
    if not compiled and any(isinstance(x, Tensor) and _has_tangent(x) for x in tensors):
        raise NotImplementedError(
            "flashattn has no forward-mode derivatives (torch.func.jvp, jacfwd, dual tensors): an argument carries a "
            "tangent; use reverse mode (backward, torch.autograd.grad)"
        )


def _has_tangent(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(x) or forward_ad.unpack_dual(x, level=0).tangent is None:
        if not functorch.is_functorch_wrapped_tensor(x):
            return False
        x = functorch.get_unwrapped(x)  # the tangent may be that of what a transform has wrapped
    return True


def has_data(x: Tensor) -> bool:
    """Whether x's numbers can be read: not where a graph is compiled, nor those of a meta or a fake tensor."""
    return not (is_traced() or x.is_meta or type(x).__name__ == "FakeTensor")


def refuse_onnx(operator: str) -> None:
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            f"flashattn::{operator} has no form in ONNX: export the model with PyTorch's own attention and norms "
            "(flashattn.compat.sdpa exports as PyTorch's own by itself)"
        )


def is_capturing() -> bool:
    """Whether launches go into a CUDA graph now: then nothing can be read back, nor copied from the CPU's memory."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(name: str, why: str) -> None:
    """Say so, where CUDA would break off the capture without a name."""
    if is_capturing():
        raise ValueError(f"{name} cannot be captured in a CUDA graph: {why}")


def int32_on(device: torch.device, numbers: Sequence) -> Tensor:
    """Python's numbers as a tensor on the device. A GPU gets them out of pinned memory, so that nobody waits for it."""
    on_cpu = torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    return on_cpu.to(device, non_blocking=True)


def seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed of a dropout as the kernels read it: an int64 on the device; None draws one."""
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed must be an int or an int64 tensor of one element on {device}, "
                f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            )
        return seed
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int in [0, 2**63), got {seed!r}")
    return torch.full((), seed, dtype=torch.int64, device=device)
