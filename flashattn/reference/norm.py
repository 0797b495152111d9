"""The reference's norms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..protocol import NormTangents, SavedNorm
from ..score import Norm
from ..tensors import dropout_threshold, find_accumulation_dtype
from .philox import philox


def dropout(x: Tensor, norm: Norm) -> Tensor:
    """x (rows, width) with elements dropped where 31 random bits are below p * 2**31, the others scaled up."""
    if norm.dropout_p == 0:
        return x
    assert norm.seed is not None
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    cols = torch.arange(x.shape[1], device=x.device)[None, :]
    keep = philox(norm.seed.view(()), cols, rows)[0] >> 1 >= dropout_threshold(norm.dropout_p)
    return torch.where(keep, x / (1 - norm.dropout_p), 0)


def broadcast_parameter(p: Tensor, rows: int) -> Tensor:
    """A parameter as (rows, width) or (1, width): row r of per-head weights is weight[r % heads]."""
    return p.repeat(rows // p.shape[0], 1) if p.dim() == 2 else p[None, :]


def compute_norm_stats(hidden: Tensor, norm: Norm) -> tuple[Tensor | None, Tensor]:
    """(mean, rstd) of the rows of h (rows, width); mean of LayerNorm."""
    mean = None
    if norm.center:
        mean = hidden.mean(-1)
        mean = mean + (hidden - mean[:, None]).mean(-1)  # corrects a rounded sum: the mean of equal numbers is theirs
        hidden = hidden - mean[:, None]
    return mean, torch.rsqrt(hidden.square().mean(-1) + norm.eps)


def compute_hidden(
    x: Tensor | None, residual: Tensor | None, like: Tensor, hidden_dtype: torch.dtype, norm: Norm
) -> Tensor:
    """h = residual + dropout(x) as (rows, width), or its tangent, rounded to hidden_dtype; None is 0. like: x."""
    dtype, width = find_accumulation_dtype(like), like.shape[-1]
    if x is None:
        x = torch.zeros_like(like)
    hidden = dropout(x.reshape(-1, width).to(dtype), norm)
    if residual is not None:
        hidden = hidden + residual.reshape(-1, width).to(dtype)
    return hidden.to(hidden_dtype).to(dtype)  # the rounded h is normalised


def normalize(hidden: Tensor, mean: Tensor | None, rstd: Tensor, norm: Norm) -> Tensor:
    """xhat of h (rows, width)."""
    if norm.center:
        assert mean is not None
        hidden = hidden - mean[:, None]
    return hidden * rstd[:, None]


def apply_weight(x: Tensor, weight: Tensor | None, norm: Norm) -> Tensor:
    if weight is None:
        return x
    return x * (broadcast_parameter(weight, x.shape[0]).to(x.dtype) + norm.weight_offset)


def center(x: Tensor, norm: Norm) -> Tensor:
    """x less its mean; twice, since a mean far from 0 is rounded."""
    for _ in range(2 * norm.center):
        x = x - x.mean(-1, keepdim=True)
    return x


def mean_product(x: Tensor, xhat: Tensor, norm: Norm) -> Tensor:
    """mean(x * xhat) as (rows, 1). LayerNorm's xhat, or its tangent, has a mean of 0 but for rounding, which a large
    mean of x would multiply."""
    return (center(x, norm) * xhat).mean(-1, keepdim=True)


def project(x: Tensor, xhat: Tensor, norm: Norm) -> Tensor:
    """x - mean(x) - xhat mean(x xhat): the derivative of xhat, which is symmetric, times x / rstd."""
    return center(x, norm) - xhat * mean_product(x, xhat, norm)


def sum_rows(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """The gradient of a (width,) or (heads, width) parameter from the (rows, width) one of each row."""
    if parameter is None:
        return None
    return gradient.view(-1, *parameter.shape).sum(0).to(parameter.dtype)


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden_dtype: torch.dtype,
    keep_hidden: bool, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """h = residual + dropout(x); y = (h - mean) * rstd * (weight + offset) + bias."""
    hidden = compute_hidden(x, residual, x, hidden_dtype, norm)
    mean, rstd = compute_norm_stats(hidden, norm)
    y = apply_weight(normalize(hidden, mean, rstd, norm), weight, norm)
    if bias is not None:
        y = y + broadcast_parameter(bias, y.shape[0]).to(y.dtype)
    kept = hidden.to(hidden_dtype).view(x.shape) if keep_hidden else None
    return y.to(x.dtype).view(x.shape), kept, mean, rstd


def norm_backward(
    grad_y: Tensor, grad_hidden: Tensor | None, saved: SavedNorm, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """With g = grad_y * (weight + offset): grad_h = (g - mean(g) - xhat * mean(g * xhat)) * rstd + grad_hidden."""
    hidden, weight, bias, mean, rstd = saved
    dtype, shape, width = rstd.dtype, hidden.shape, hidden.shape[-1]
    grad = grad_y.reshape(-1, width).to(dtype)
    xhat = normalize(hidden.reshape(-1, width).to(dtype), mean, rstd, norm)
    grad_h = project(apply_weight(grad, weight, norm), xhat, norm) * rstd[:, None]
    if grad_hidden is not None:
        grad_h = grad_h + grad_hidden.reshape(-1, width).to(dtype)
    grad_x = dropout(grad_h, norm).to(x_dtype).view(shape)
    grad_residual = None if residual_dtype is None else grad_h.to(residual_dtype).view(shape)
    return grad_x, grad_residual, sum_rows(grad * xhat, weight), sum_rows(grad, bias)


# ------------------------------------------------------------------------------------------------ tangents


def norm_jvp(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, tangents: NormTangents,
    hidden_dtype: torch.dtype, keep_hidden: bool, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """With the tangent t of h: xhat' = (t - mean(t) - xhat * mean(t * xhat)) * rstd; y' = xhat' * (weight + offset) +
    xhat * weight' + bias'."""
    y, kept, mean, rstd = norm_forward(x, residual, weight, bias, hidden_dtype, keep_hidden, norm)
    hidden = compute_hidden(x, residual, x, hidden_dtype, norm)
    t = compute_hidden(tangents.x, tangents.residual, x, hidden_dtype, norm)
    xhat, rows = normalize(hidden, mean, rstd, norm), hidden.shape[0]
    moved = apply_weight(project(t, xhat, norm) * rstd[:, None], weight, norm)
    if tangents.weight is not None:
        moved = moved + xhat * broadcast_parameter(tangents.weight, rows).to(xhat.dtype)
    if tangents.bias is not None:
        moved = moved + broadcast_parameter(tangents.bias, rows).to(xhat.dtype)
    kept_t = t.to(hidden_dtype, copy=True).view(x.shape) if keep_hidden else None
    return y, kept, mean, rstd, moved.to(x.dtype).view(x.shape), kept_t


def norm_hvp(
    grad_y: Tensor, saved: SavedNorm, tangent_hidden: Tensor, tangent_weight: Tensor | None, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """With g as in norm_backward, its tangent u = grad_y * weight', t and xhat' as in norm_jvp, p = mean(g * xhat):
    grad_h' = (u - mean(u) - xhat * mean(u * xhat) - xhat' * p - xhat * mean(g * xhat') - grad_h * mean(t * xhat)) *
    rstd, since rstd' = -rstd^2 * mean(t * xhat)."""
    hidden, weight, _, mean, rstd = saved
    dtype, shape, width = rstd.dtype, hidden.shape, hidden.shape[-1]
    grad, t = (x.reshape(-1, width).to(dtype) for x in (grad_y, tangent_hidden))
    xhat, scale = normalize(hidden.reshape(-1, width).to(dtype), mean, rstd, norm), rstd[:, None]
    moved, g = project(t, xhat, norm) * scale, apply_weight(grad, weight, norm)
    total = -moved * mean_product(g, xhat, norm) - xhat * mean_product(g, moved, norm)
    total = total - project(g, xhat, norm) * scale * mean_product(t, xhat, norm)
    if tangent_weight is not None:
        total = total + project(grad * broadcast_parameter(tangent_weight, grad.shape[0]).to(dtype), xhat, norm)
    total = total * scale
    grad_x = dropout(total, norm).to(x_dtype).view(shape)
    grad_residual = None if residual_dtype is None else total.to(residual_dtype).view(shape)
    return grad_x, grad_residual, sum_rows(grad * moved, weight)
