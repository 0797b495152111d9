"""The reference's norms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..protocol import SavedNorm
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


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden_dtype: torch.dtype,
    keep_hidden: bool, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """h = residual + dropout(x); y = (h - mean) * rstd * (weight + offset) + bias."""
    dtype, width = find_accumulation_dtype(x), x.shape[-1]
    hidden = dropout(x.reshape(-1, width).to(dtype), norm)
    rows = hidden.shape[0]
    if residual is not None:
        hidden = hidden + residual.reshape(-1, width).to(dtype)
    hidden = hidden.to(hidden_dtype).to(dtype)  # the rounded h is normalised
    mean, rstd = compute_norm_stats(hidden, norm)
    y = (hidden if mean is None else hidden - mean[:, None]) * rstd[:, None]
    if weight is not None:
        y = y * (broadcast_parameter(weight, rows).to(dtype) + norm.weight_offset)
    if bias is not None:
        y = y + broadcast_parameter(bias, rows).to(dtype)
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
    rows = grad.shape[0]
    xhat = hidden.reshape(-1, width).to(dtype)
    if norm.center:
        xhat = xhat - mean[:, None]
    xhat = xhat * rstd[:, None]
    g = grad if weight is None else grad * (broadcast_parameter(weight, rows).to(dtype) + norm.weight_offset)
    grad_h = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if norm.center:
        grad_h = grad_h - g.mean(-1, keepdim=True)
    grad_h = grad_h * rstd[:, None]
    if grad_hidden is not None:
        grad_h = grad_h + grad_hidden.reshape(-1, width).to(dtype)
    grad_x = dropout(grad_h, norm).to(x_dtype).view(shape)
    grad_residual = None if residual_dtype is None else grad_h.to(residual_dtype).view(shape)
    return grad_x, grad_residual, sum_rows(grad * xhat, weight), sum_rows(grad, bias)


def sum_rows(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """The gradient of a (width,) or (heads, width) parameter from the (rows, width) one of each row."""
    if parameter is None:
        return None
    return gradient.view(-1, *parameter.shape).sum(0).to(parameter.dtype)
