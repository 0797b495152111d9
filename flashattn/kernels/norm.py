"""LayerNorm and RMSNorm, forward and backward, with dropout and the residual addition fused in.

    h    = residual + dropout(x), rounded to its dtype: what is kept of h is what was normalised
    xhat = (h - mean) * rstd,  rstd = 1 / sqrt(mean((h - mean)^2) + eps)       (RMSNorm: mean = 0)
    y    = xhat * (weight + weight_offset) + bias

    g      = grad_y * (weight + weight_offset)
    grad_h = (g - mean(g) - xhat * mean(g * xhat)) * rstd + grad_residual_out  (RMSNorm: no mean(g))

Ba et al., "Layer Normalization" (2016), arXiv:1607.06450; Zhang and Sennrich, "Root Mean Square Layer
Normalization" (2019), arXiv:1910.07467.

A weight may be per head: row r then uses weight[r % heads]. The programs of one head visit its rows only, so that a
program reads one weight row and sums one weight gradient. A row of at most BLOCK_COLS is SINGLE: read once and kept
in registers. A wider one is read in chunks, several times.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .compiler import kernel
from .dropout import dropout
from .tiles import rounded_product

# Not specialised on: see scores.py. The width is, since its divisibility is what makes loads wide.
SIZES = ["row_count", "heads"]


class RowView(NamedTuple):
    """A tensor of up to three leading dimensions, any strides, seen as rows; the last dimension is contiguous."""

    ptr: tl.tensor
    size_1: tl.tensor
    size_2: tl.tensor
    stride_0: tl.tensor
    stride_1: tl.tensor
    stride_2: tl.tensor


@triton.jit
def row_pointers(x, rows, cols):
    """Pointers to (rows, cols): row r of the flattened view is [r // (n1 n2), r // n2 % n1, r % n2]."""
    inner = rows % x.size_2
    outer = rows // x.size_2
    offsets = (
        inner.to(tl.int64) * x.stride_2
        + (outer % x.size_1).to(tl.int64) * x.stride_1
        + (outer // x.size_1).to(tl.int64) * x.stride_0
    )
    return x.ptr + offsets[:, None] + cols[None, :]


@triton.jit
def load_rows(x, rows, cols, mask):
    return tl.load(row_pointers(x, rows, cols), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, value, rows, cols, mask):
    tl.store(row_pointers(x, rows, cols), value.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_hidden(x, residual, drop, rows, cols, mask, HIDDEN: tl.constexpr):
    """h = residual + dropout(x), rounded to the dtype HIDDEN, as float32."""
    hidden = load_rows(x, rows, cols, mask)
    if drop is not None:
        hidden = dropout(hidden, drop, rows[:, None], cols[None, :])
    if residual is not None:
        hidden += load_rows(residual, rows, cols, mask)
    return hidden.to(HIDDEN).to(tl.float32)


@triton.jit
def scaled(value, weight, weight_offset, head, width, cols):
    """value * (weight[head] + weight_offset), or value where there is no weight."""
    if weight is not None:
        row = tl.load(weight + head * width + cols, mask=cols < width, other=0.0).to(tl.float32)
        value = value * (row + weight_offset)[None, :]
    return value


@triton.jit
def normalized(hidden, mean, rstd, mask, CENTER: tl.constexpr):
    if CENTER:
        hidden = tl.where(mask, hidden - mean[:, None], 0.0)
    return hidden * rstd[:, None]


@triton.jit
def statistics(hidden, mask, count, width, mean, squares, CENTER: tl.constexpr):
    """Fold a chunk into (mean, sum of squared deviations) of `count` columns seen so far. Chan et al. (1979):
    the deviations of a chunk are taken from its own mean, so nothing cancels."""
    if CENTER:
        chunk = tl.minimum(width - count, hidden.shape[1]).to(tl.float32)
        chunk_mean = tl.sum(hidden, 1) / chunk
        deviation = tl.where(mask, hidden - chunk_mean[:, None], 0.0)
        shift = chunk_mean - mean
        share = chunk / (count + chunk)
        mean += shift * share
        squares += tl.sum(rounded_product(deviation, deviation), 1) + shift * shift * (count * share)
    else:
        squares += tl.sum(rounded_product(hidden, hidden), 1)
    return mean, squares


@triton.jit
def read_chunk(
    x, residual, residual_out, drop, rows, row_mask, start, width, mean, squares,
    CENTER: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One chunk of h, kept in residual_out where asked, and folded into the statistics."""
    cols = start + tl.arange(0, BLOCK_COLS)
    mask = row_mask[:, None] & (cols < width)[None, :]
    hidden = load_hidden(x, residual, drop, rows, cols, mask, HIDDEN)
    if residual_out is not None:
        store_rows(residual_out, hidden, rows, cols, mask)
    mean, squares = statistics(hidden, mask, start, width, mean, squares, CENTER)
    return hidden, mean, squares


@triton.jit
def write_chunk(
    y, hidden, mean, rstd, weight, bias, weight_offset, head, rows, row_mask, start, width,
    CENTER: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One chunk of y = xhat * (weight + weight_offset) + bias."""
    cols = start + tl.arange(0, BLOCK_COLS)
    mask = row_mask[:, None] & (cols < width)[None, :]
    value = scaled(normalized(hidden, mean, rstd, mask, CENTER), weight, weight_offset, head, width, cols)
    if bias is not None:
        value += tl.load(bias + head * width + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    store_rows(y, value, rows, cols, mask)


@kernel(do_not_specialize=SIZES)
def norm_forward(
    x, residual, weight, bias, y, residual_out, mean, rstd, drop, row_count, width, heads, eps, weight_offset,
    CENTER: tl.constexpr, HIDDEN: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y, and where asked residual_out = h. Grid: (row tiles, heads). A program owns BLOCK_ROWS rows of one head."""
    head = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)) * heads + head
    row_mask = rows < row_count
    row_mean = tl.zeros((BLOCK_ROWS,), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    if SINGLE:
        hidden, row_mean, squares = read_chunk(
            x, residual, residual_out, drop, rows, row_mask, 0, width, row_mean, squares,
            CENTER, HIDDEN, BLOCK_COLS,
        )  # fmt: skip
        row_rstd = 1.0 / tl.sqrt(squares / width + eps)
        write_chunk(
            y, hidden, row_mean, row_rstd, weight, bias, weight_offset, head, rows, row_mask, 0, width,
            CENTER, BLOCK_COLS,
        )  # fmt: skip
    else:
        for start in range(0, width, BLOCK_COLS):
            _, row_mean, squares = read_chunk(
                x, residual, residual_out, drop, rows, row_mask, start, width, row_mean, squares,
                CENTER, HIDDEN, BLOCK_COLS,
            )  # fmt: skip
        row_rstd = 1.0 / tl.sqrt(squares / width + eps)
        for start in range(0, width, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            mask = row_mask[:, None] & (cols < width)[None, :]
            hidden = load_hidden(x, residual, drop, rows, cols, mask, HIDDEN)
            write_chunk(
                y, hidden, row_mean, row_rstd, weight, bias, weight_offset, head, rows, row_mask, start, width,
                CENTER, BLOCK_COLS,
            )  # fmt: skip
    if CENTER:
        tl.store(mean + rows, row_mean, mask=row_mask)
    tl.store(rstd + rows, row_rstd, mask=row_mask)


@triton.jit
def load_statistics(mean, rstd, rows, row_mask, CENTER: tl.constexpr):
    """(mean, rstd) of some rows; the mean of an RMSNorm is 0."""
    row_rstd = tl.load(rstd + rows, mask=row_mask, other=0.0)
    row_mean = tl.zeros_like(row_rstd)
    if CENTER:
        row_mean = tl.load(mean + rows, mask=row_mask, other=0.0)
    return row_mean, row_rstd


@triton.jit
def load_gradients(
    hidden, grad_y, mean, rstd, weight, weight_offset, head, rows, row_mask, start, width,
    CENTER: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One chunk of (grad_y, xhat, g)."""
    cols = start + tl.arange(0, BLOCK_COLS)
    mask = row_mask[:, None] & (cols < width)[None, :]
    grad = load_rows(grad_y, rows, cols, mask)
    xhat = normalized(load_rows(hidden, rows, cols, mask), mean, rstd, mask, CENTER)
    return grad, xhat, scaled(grad, weight, weight_offset, head, width, cols)


@triton.jit
def store_gradients(
    grad_x, grad_residual, grad_residual_out, drop, g, xhat, mean_g, mean_gx, rstd, rows, row_mask, start, width,
    CENTER: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One chunk of grad_h, and of grad_x, which differs from it by the dropout."""
    cols = start + tl.arange(0, BLOCK_COLS)
    mask = row_mask[:, None] & (cols < width)[None, :]
    grad = g - xhat * mean_gx[:, None]
    if CENTER:
        grad -= mean_g[:, None]
    grad *= rstd[:, None]
    if grad_residual_out is not None:
        grad += load_rows(grad_residual_out, rows, cols, mask)
    if grad_residual is not None:
        store_rows(grad_residual, grad, rows, cols, mask)
    if drop is not None:
        grad = dropout(grad, drop, rows[:, None], cols[None, :])
    store_rows(grad_x, grad, rows, cols, mask)


@kernel(do_not_specialize=SIZES)
def norm_backward(
    grad_y, grad_residual_out, hidden, weight, mean, rstd, grad_x, grad_residual, weight_parts, bias_parts,
    drop, row_count, width, heads, weight_offset,
    CENTER: tl.constexpr, SINGLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """grad_x and grad_residual; in a SINGLE row also this program's share of the weight and bias gradients.

    Grid: (programs, heads). A program visits every programs-th tile of BLOCK_ROWS rows of its head, in order, and
    owns row (program, head) of weight_parts and bias_parts (programs, heads, width): no atomics.
    """
    head = tl.program_id(1)
    sum_weight = tl.zeros((BLOCK_COLS,), tl.float32)
    sum_bias = tl.zeros((BLOCK_COLS,), tl.float32)
    tiles = tl.cdiv(tl.cdiv(row_count - head, heads), BLOCK_ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)) * heads + head
        row_mask = rows < row_count
        row_mean, row_rstd = load_statistics(mean, rstd, rows, row_mask, CENTER)
        if SINGLE:
            grad, xhat, g = load_gradients(
                hidden, grad_y, row_mean, row_rstd, weight, weight_offset, head, rows, row_mask, 0, width,
                CENTER, BLOCK_COLS,
            )  # fmt: skip
            store_gradients(
                grad_x, grad_residual, grad_residual_out, drop, g, xhat, tl.sum(g, 1) / width,
                tl.sum(rounded_product(g, xhat), 1) / width, row_rstd, rows, row_mask, 0, width, CENTER, BLOCK_COLS,
            )  # fmt: skip
            sum_weight += tl.sum(rounded_product(grad, xhat), 0)
            sum_bias += tl.sum(grad, 0)
        else:
            sum_g = tl.zeros((BLOCK_ROWS,), tl.float32)
            sum_gx = tl.zeros((BLOCK_ROWS,), tl.float32)
            for start in range(0, width, BLOCK_COLS):
                grad, xhat, g = load_gradients(
                    hidden, grad_y, row_mean, row_rstd, weight, weight_offset, head, rows, row_mask, start, width,
                    CENTER, BLOCK_COLS,
                )  # fmt: skip
                sum_g += tl.sum(g, 1)
                sum_gx += tl.sum(rounded_product(g, xhat), 1)
            for start in range(0, width, BLOCK_COLS):
                grad, xhat, g = load_gradients(
                    hidden, grad_y, row_mean, row_rstd, weight, weight_offset, head, rows, row_mask, start, width,
                    CENTER, BLOCK_COLS,
                )  # fmt: skip
                store_gradients(
                    grad_x, grad_residual, grad_residual_out, drop, g, xhat, sum_g / width, sum_gx / width,
                    row_rstd, rows, row_mask, start, width, CENTER, BLOCK_COLS,
                )  # fmt: skip
    if SINGLE:
        store_parts(weight_parts, bias_parts, sum_weight, sum_bias, head, heads, 0, width, BLOCK_COLS)


@kernel(do_not_specialize=SIZES)
def norm_backward_weights(
    grad_y, hidden, mean, rstd, weight_parts, bias_parts, row_count, width, heads,
    CENTER: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The weight and bias gradients of rows that are not SINGLE, one chunk of columns a program.

    Grid: (programs, heads, chunks of columns). Rows are shared out as in `norm_backward`.
    """
    head = tl.program_id(1)
    start = tl.program_id(2) * BLOCK_COLS
    sum_weight = tl.zeros((BLOCK_COLS,), tl.float32)
    sum_bias = tl.zeros((BLOCK_COLS,), tl.float32)
    tiles = tl.cdiv(tl.cdiv(row_count - head, heads), BLOCK_ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)) * heads + head
        row_mask = rows < row_count
        row_mean, row_rstd = load_statistics(mean, rstd, rows, row_mask, CENTER)
        grad, xhat, _ = load_gradients(
            hidden, grad_y, row_mean, row_rstd, None, 0.0, head, rows, row_mask, start, width, CENTER, BLOCK_COLS
        )
        sum_weight += tl.sum(rounded_product(grad, xhat), 0)
        sum_bias += tl.sum(grad, 0)
    store_parts(weight_parts, bias_parts, sum_weight, sum_bias, head, heads, start, width, BLOCK_COLS)


@triton.jit
def store_parts(weight_parts, bias_parts, sum_weight, sum_bias, head, heads, start, width, BLOCK_COLS: tl.constexpr):
    """This program's share of the parameter gradients."""
    cols = start + tl.arange(0, BLOCK_COLS)
    offsets = (tl.program_id(0) * heads + head).to(tl.int64) * width + cols
    if weight_parts is not None:
        tl.store(weight_parts + offsets, sum_weight, mask=cols < width)
    if bias_parts is not None:
        tl.store(bias_parts + offsets, sum_bias, mask=cols < width)
