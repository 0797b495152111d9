"""`layer_norm` and `rms_norm`: check the arguments, build the call."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from . import arguments, autocast, backends, nested, ops
from .score import Norm


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ..., residual: Tensor | None = ...,
    dropout_p: float = ..., seed: int | Tensor | None = ..., prenorm: Literal[False] = ..., weight_offset: float = ...,
    residual_in_fp32: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ..., residual: Tensor | None = ...,
    dropout_p: float = ..., seed: int | Tensor | None = ..., *, prenorm: Literal[True], weight_offset: float = ...,
    residual_in_fp32: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ..., residual: Tensor | None = ...,
    dropout_p: float = ..., seed: int | Tensor | None = ..., prenorm: bool = ..., weight_offset: float = ...,
    residual_in_fp32: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    prenorm: bool = False,
    weight_offset: float = 0.0,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension, with dropout and the residual addition fused in:

        h = residual + dropout(x), rounded to its dtype
        y = (h - mean(h)) / sqrt(var(h) + eps) * (weight + weight_offset) + bias

    Args:
        x: (..., width), or (..., heads, width) with per-head parameters; float32, bfloat16 or float16 (float64 on
            the reference backend). Any strides; a last dimension that is not contiguous is copied once. Or nested
            (batch, seq, ..., width), along seq, and residual too.
        weight, bias: (width,), or (heads, width) for parameters of each head.
        eps: added to the variance.
        residual: x's shape, any floating dtype.
        dropout_p: probability in [0, 1) that an element of x is dropped before the addition.
        seed: int, or an int64 tensor of one element on x's device. The same seed drops the same elements on every
            backend; None draws one from PyTorch's generator.
        prenorm: also return h, for the next layer's residual.
        weight_offset: added to the weight (1.0 for weights stored around zero).
        residual_in_fp32: where no residual is given, keep h in float32.

    Returns:
        y with x's shape and dtype; with `prenorm` (y, h), h in residual's dtype, else float32 if residual_in_fp32,
        else x's. Gradients flow through both. Under autocast on a GPU the inputs are cast to float32, as those of
        PyTorch's own norms.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.

    >>> import torch, flashattn
    >>> flashattn.layer_norm(torch.tensor([[1.0, 2.0, 3.0]]), eps=0.0)
    tensor([[-1.2247,  0.0000,  1.2247]])
    """
    return _norm(x, weight, bias, residual, True, eps, weight_offset, dropout_p, seed, prenorm, residual_in_fp32)


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., eps: float = ..., residual: Tensor | None = ...,
    dropout_p: float = ..., seed: int | Tensor | None = ..., prenorm: Literal[False] = ..., weight_offset: float = ...,
    residual_in_fp32: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., eps: float = ..., residual: Tensor | None = ...,
    dropout_p: float = ..., seed: int | Tensor | None = ..., *, prenorm: Literal[True], weight_offset: float = ...,
    residual_in_fp32: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., eps: float = ..., residual: Tensor | None = ...,
    dropout_p: float = ..., seed: int | Tensor | None = ..., prenorm: bool = ..., weight_offset: float = ...,
    residual_in_fp32: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    prenorm: bool = False,
    weight_offset: float = 0.0,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension: h = residual + dropout(x); y = h / sqrt(mean(h^2) + eps) * (weight + offset).

    Arguments, results and errors as in `layer_norm`; weight is (width,) or, per head, (heads, width).

    >>> import torch, flashattn
    >>> flashattn.rms_norm(torch.tensor([[3.0, 4.0]]), eps=0.0)
    tensor([[0.8485, 1.1314]])
    """
    return _norm(x, weight, None, residual, False, eps, weight_offset, dropout_p, seed, prenorm, residual_in_fp32)


def _norm(x, weight, bias, residual, center, eps, weight_offset, dropout_p, seed, prenorm, residual_in_fp32):
    if nested.is_nested(x):
        rest = (center, eps, weight_offset, dropout_p, seed, prenorm, residual_in_fp32)
        return _nested(x, residual, lambda x, residual: _norm(x, weight, bias, residual, *rest))
    x, weight, bias, residual = autocast.cast_norm_inputs(x, weight, bias, residual)
    _check(x, weight, bias, residual, eps, dropout_p)
    seed = arguments.make_seed(seed, x.device) if dropout_p > 0 else None
    hidden_dtype = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    # Without residual, dropout or a change of dtype, h is x itself: nothing to write, and autograd adds its gradients.
    fused = residual is not None or dropout_p > 0 or (prenorm and hidden_dtype != x.dtype)
    differentiated = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, residual)
    )
    differentiated = differentiated or torch._C._are_functorch_transforms_active()  # which hide what needs a gradient
    dtypes = [t.dtype for t in (x, residual, weight, bias) if t is not None]
    keep = fused and (prenorm or differentiated)  # backward reads h, so it is written for it too
    settings = Norm(center, float(eps), float(weight_offset), float(dropout_p), seed)
    backend = backends.choose(x.device, *dtypes)
    y, hidden = ops.norm.norm(x, residual, weight, bias, hidden_dtype if fused else x.dtype, keep, settings, backend)
    if not prenorm:
        return y
    return y, hidden if fused else x


def _nested(x: Tensor, residual: Tensor | None, run) -> Tensor | tuple[Tensor, ...]:
    """Of nested (batch, seq, ..., width), all rows at once. `run`: (rows, residual's) to one or several results."""
    nested.check_nested("x", x, x.dim(), "(batch, seq, ..., width), jagged along seq")
    (rows, starts), residual_rows = nested.pack(x), None
    if residual is not None:
        nested.check_nested("residual", residual, x.dim(), "as x is")
        residual_rows, residual_starts = nested.pack(residual)
        nested.check_same_lengths("residual", residual_starts, "x", starts)
    results = run(rows, residual_rows)
    if isinstance(results, tuple):
        return tuple(nested.unpack(y, starts, x.layout) for y in results)
    return nested.unpack(results, starts, x.layout)


def _check(x, weight, bias, residual, eps, dropout_p):
    arguments.check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., width) with width at least 1, got shape {tuple(x.shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is None:
            continue
        arguments.check_floating(name, p)
        arguments.check_device(name, p, "x", x.device)
        if p.shape != x.shape[-1:] and not (p.dim() == 2 and p.shape == x.shape[-2:]):
            raise ValueError(
                f"{name} must be (width,) or, per head, (heads, width) where x is (..., heads, width); "
                f"got shape {tuple(p.shape)} for x of shape {tuple(x.shape)}"
            )
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise ValueError(f"bias must have weight's shape {tuple(weight.shape)}, got {tuple(bias.shape)}")
    if residual is not None:
        arguments.check_floating("residual", residual)
        arguments.check_device("residual", residual, "x", x.device)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if not -math.inf < eps < math.inf:  # math.isfinite cannot be compiled
        raise ValueError(f"eps must be a finite number, got {eps}")
    arguments.check_probability("dropout_p", dropout_p)
