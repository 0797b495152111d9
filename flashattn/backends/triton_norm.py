"""The Triton backend's norms: launches the kernels of `kernels/norm.py` and `kernels/norm_derivatives.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from ..kernels import configs, norm_configs
from ..kernels import norm as norm_kernels
from ..kernels import norm_derivatives as derivative_kernels
from ..kernels.dropout import dropout_arg
from ..kernels.norm import RowView
from ..kernels.norm_derivatives import Direction
from ..protocol import SavedNorm
from ..score import Norm
from ..tensors import as_rows, count_norm_heads, make_contiguous

if TYPE_CHECKING:
    from ..protocol import NormTangents


def row_arg(x: Tensor | None) -> RowView | None:
    if x is None:
        return None
    x = as_rows(x)
    return RowView(x, x.shape[1], x.shape[2], *x.stride()[:3])


def check_norm_heads(*parameters: Tensor | None) -> int:
    """The heads with parameters of their own: a dimension of the grid, which ends at 65,535."""
    heads = count_norm_heads(*parameters)
    if heads > 65535:
        raise ValueError(f"weight and bias must be of at most 65,535 heads on the triton backend, got {heads}")
    return heads


def choose_norm_meta(tile: norm_configs.NormTile, norm: Norm) -> dict:
    registers = {} if tile.registers is None else {"maxnreg": tile.registers}
    return dict(CENTER=norm.center, BLOCK_ROWS=tile.rows, BLOCK_COLS=tile.cols, num_warps=tile.warps, **registers)


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden_dtype: torch.dtype,
    keep_hidden: bool, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    width, row_count, device = x.shape[-1], x.shape[:-1].numel(), x.device
    y = torch.empty(x.shape, dtype=x.dtype, device=device)
    hidden = torch.empty(x.shape, dtype=hidden_dtype, device=device) if keep_hidden else None
    mean = torch.empty(row_count, dtype=torch.float32, device=device) if norm.center else None
    rstd = torch.empty(row_count, dtype=torch.float32, device=device)
    heads = check_norm_heads(weight, bias)
    tile = norm_configs.choose_norm_tile("forward", width, hidden_dtype != x.dtype, norm.dropout_p > 0)
    if row_count:
        norm_kernels.norm_forward[(configs.cdiv(row_count // heads, tile.rows), heads)](
            row_arg(x), row_arg(residual), make_contiguous(weight), make_contiguous(bias), row_arg(y), row_arg(hidden),
            mean, rstd, dropout_arg(norm.dropout_p, norm.seed), row_count, width, heads, norm.eps, norm.weight_offset,
            HIDDEN=getattr(tl, str(hidden_dtype).removeprefix("torch.")), SINGLE=tile.single,
            **choose_norm_meta(tile, norm),
        )  # fmt: skip
    return y, hidden, mean, rstd


def norm_backward(
    grad_y: Tensor, grad_hidden: Tensor | None, saved: SavedNorm, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    hidden, weight, bias, _, rstd = saved
    width, row_count, device = hidden.shape[-1], hidden.shape[:-1].numel(), hidden.device
    grad_x = torch.empty(hidden.shape, dtype=x_dtype, device=device)
    grad_residual = None if residual_dtype is None else torch.empty(hidden.shape, dtype=residual_dtype, device=device)
    heads = check_norm_heads(weight, bias)
    hidden_arg, grad_arg, weight_arg = row_arg(hidden), row_arg(grad_y), make_contiguous(weight)
    mean, tile = saved.mean if norm.center else None, norm_configs.choose_norm_tile("backward", width)
    means: tuple[Tensor | None, Tensor | None] = None, None
    if row_count and not tile.single:
        means = None if mean is None else torch.empty_like(mean), torch.empty_like(rstd)
        one_row = tile._replace(rows=1, cols=tile.rows * tile.cols)
        norm_kernels.norm_backward_means[(row_count // heads, heads)](
            grad_arg, hidden_arg, weight_arg, mean, rstd, *means, row_count, width, heads, norm.weight_offset,
            **choose_norm_meta(one_row, norm),
        )  # fmt: skip
    grid = choose_norm_grid(tile, row_count, heads, width, device)
    parts = new_parts(grid[0], weight, bias)
    if row_count:
        norm_kernels.norm_backward[grid](
            grad_arg, row_arg(grad_hidden), hidden_arg, weight_arg, mean, rstd, *means, row_arg(grad_x),
            row_arg(grad_residual), *parts, dropout_arg(norm.dropout_p, norm.seed), row_count, width, heads,
            norm.weight_offset, SINGLE=tile.single, STAGES=norm_configs.NORM_STAGES, **choose_norm_meta(tile, norm),
        )  # fmt: skip
    grad_weight, grad_bias = sum_parts(parts, (weight, bias))
    return grad_x, grad_residual, grad_weight, grad_bias


def choose_norm_grid(
    tile: norm_configs.NormTile, row_count: int, heads: int, width: int, device: torch.device
) -> tuple[int, int, int]:
    """Of a pass backward: (programs that share the rows of a head, heads, chunks of columns)."""
    chunks = configs.cdiv(width, tile.cols)
    programs = norm_configs.count_norm_programs(configs.count_multiprocessors(device), tile, heads * chunks)
    return min(programs, configs.cdiv(row_count // heads, tile.rows)), heads, chunks


def new_parts(programs: int, *parameters: Tensor | None) -> list[Tensor | None]:
    """Memory for the partial sums of the programs, (programs, heads, width)."""
    return [
        None
        if p is None
        else torch.empty(programs, count_norm_heads(p), p.shape[-1], dtype=torch.float32, device=p.device)
        for p in parameters
    ]


def sum_parts(parts: list[Tensor | None], parameters: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    """The gradients of weight and bias from their (programs, heads, width) partial sums, added in a fixed order."""
    gradients = [None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    present = next((part for part in parts if part is not None), None)
    if present is not None:
        programs, heads, width = present.shape
        norm_kernels.norm_backward_parameters[(configs.cdiv(heads * width, 32),)](
            *parts, *gradients, programs, heads * width, BLOCK_PARTS=64, BLOCK_COLS=32, num_warps=4
        )
    return gradients


def norm_jvp(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, tangents: NormTangents,
    hidden_dtype: torch.dtype, keep_hidden: bool, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    width, row_count, device = x.shape[-1], x.shape[:-1].numel(), x.device
    y, tangent_y = (torch.empty(x.shape, dtype=x.dtype, device=device) for _ in range(2))
    hidden, tangent_hidden = (
        torch.empty(x.shape, dtype=hidden_dtype, device=device) if keep_hidden else None for _ in range(2)
    )
    mean = torch.empty(row_count, dtype=torch.float32, device=device) if norm.center else None
    rstd = torch.empty(row_count, dtype=torch.float32, device=device)
    heads, tile = check_norm_heads(weight, bias), norm_configs.choose_norm_tile("jvp", width)
    direction = Direction(*map(row_arg, tangents[:2]), *map(make_contiguous, tangents[2:]))
    if row_count:
        derivative_kernels.norm_jvp[(configs.cdiv(row_count // heads, tile.rows), heads)](
            row_arg(x), row_arg(residual), make_contiguous(weight), make_contiguous(bias), direction, row_arg(y),
            row_arg(hidden), mean, rstd, row_arg(tangent_y), row_arg(tangent_hidden),
            dropout_arg(norm.dropout_p, norm.seed), row_count, width, heads, norm.eps, norm.weight_offset,
            HIDDEN=getattr(tl, str(hidden_dtype).removeprefix("torch.")), SINGLE=tile.single,
            **choose_norm_meta(tile, norm),
        )  # fmt: skip
    return y, hidden, mean, rstd, tangent_y, tangent_hidden


def norm_hvp(
    grad_y: Tensor, saved: SavedNorm, tangent_hidden: Tensor, tangent_weight: Tensor | None, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    hidden, weight, _, _, rstd = saved
    width, row_count, device = hidden.shape[-1], hidden.shape[:-1].numel(), hidden.device
    grad_x = torch.empty(hidden.shape, dtype=x_dtype, device=device)
    grad_residual = None if residual_dtype is None else torch.empty(hidden.shape, dtype=residual_dtype, device=device)
    heads, tile = check_norm_heads(weight), norm_configs.choose_norm_tile("hvp", width)
    rows = row_arg(grad_y), row_arg(hidden), row_arg(tangent_hidden)
    given = *rows, *map(make_contiguous, (weight, tangent_weight)), saved.mean if norm.center else None, rstd
    means = None
    if row_count and not tile.single:
        means = torch.empty(row_count, derivative_kernels.MEANS.value, dtype=torch.float32, device=device)
        one_row = tile._replace(rows=1, cols=tile.rows * tile.cols)
        derivative_kernels.norm_hvp_means[(row_count // heads, heads)](
            *given, means, row_count, width, heads, norm.weight_offset, **choose_norm_meta(one_row, norm)
        )
    grid = choose_norm_grid(tile, row_count, heads, width, device)
    parts = new_parts(grid[0], weight, None)
    if row_count:
        derivative_kernels.norm_hvp[grid](
            *given, means, row_arg(grad_x), row_arg(grad_residual), parts[0], dropout_arg(norm.dropout_p, norm.seed),
            row_count, width, heads, norm.weight_offset, SINGLE=tile.single, STAGES=norm_configs.NORM_STAGES,
            **choose_norm_meta(tile, norm),
        )  # fmt: skip
    return grad_x, grad_residual, sum_parts(parts, (weight, None))[0]
