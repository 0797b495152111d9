"""LayerNorm and RMSNorm, forward and backward, with dropout and the residual addition fused in.

    h    = residual + dropout(x), rounded to its dtype: what is kept of h is what was normalised
    xhat = (h - mean) * rstd,  rstd = 1 / sqrt(mean((h - mean)^2) + eps)       (RMSNorm: mean = 0)
    y    = xhat * (weight + weight_offset) + bias

    g      = grad_y * (weight + weight_offset)
    grad_h = (g - mean(g) - xhat * mean(g * xhat)) * rstd + grad_residual_out  (RMSNorm: no mean(g))

Ba et al., "Layer Normalization" (2016), arXiv:1607.06450; Zhang and Sennrich, "Root Mean Square Layer
Normalization" (2019), arXiv:1910.07467.

A weight may be per head: row r then uses weight[r % heads]. The programs of one head visit its rows only, so that a
program reads one weight row and sums one weight gradient.

What is read how often (`bench/ptx/norm_bytes.py` counts it): a row of at most configs.NORM_COLS is SINGLE, read once
and kept in registers. Those end it. 32 warps have 64 each, of which 32,768 columns take 32 forward. Backward a column
takes four or five, for two sums over rows, xhat, g and the weight, and 8,192 columns fill the 128 of 16 warps. A wider
row is read in chunks: forward all but the last one twice; backward grad_y and hidden twice, once for their means and
once for what depends on those. A cluster of programs would hold such a row; Triton sums across one from 3.8 on only.

Backward, as many programs as run at a time share out the rows, by the multiprocessors of the card, and each writes a
row of partial sums of the parameters' gradients. They are added in a fixed order: the same bits every run, on a card of
as many multiprocessors.
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
def load_parameter(parameter, head, width, cols):
    """One row of a weight or bias, as float32."""
    return tl.load(parameter + head * width + cols, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def normalized(hidden, mean, rstd, CENTER: tl.constexpr):
    if CENTER:
        hidden -= mean[:, None]
    return hidden * rstd[:, None]


@triton.jit
def statistics(hidden, mask, count, width, mean, squares, CENTER: tl.constexpr):
    """Fold a chunk into (mean, sum of squared deviations) of `count` columns seen so far. The deviations of a chunk are
    taken from its own mean, so nothing cancels, and their mean corrects both for what rounding took from that mean: of
    equal numbers the mean is that number. Chan, Golub and LeVeque, "Algorithms for computing the sample variance"
    (1983), the corrected two-pass algorithm, and how to update it.
    """
    if CENTER:
        chunk = tl.minimum(width - count, hidden.shape[1]).to(tl.float32)
        chunk_mean = tl.sum(hidden, 1) / chunk
        deviation = tl.where(mask, hidden - chunk_mean[:, None], 0.0)
        lost = tl.sum(deviation, 1) / chunk
        chunk_squares = tl.sum(rounded_product(deviation, deviation), 1) - lost * lost * chunk
        shift = chunk_mean + lost - mean
        share = chunk / (count + chunk)
        mean += shift * share
        squares += tl.maximum(chunk_squares, 0.0) + shift * shift * (count * share)
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
    value = normalized(hidden, mean, rstd, CENTER)
    if weight is not None:
        value *= load_parameter(weight, head, width, cols)[None, :] + weight_offset
    if bias is not None:
        value += load_parameter(bias, head, width, cols)[None, :]
    store_rows(y, value, rows, cols, mask)


@kernel(do_not_specialize=SIZES)
def norm_forward(
    x, residual, weight, bias, y, residual_out, mean, rstd, drop, row_count, width, heads, eps, weight_offset,
    CENTER: tl.constexpr, HIDDEN: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y, and where asked residual_out = h. Grid: (row tiles, heads). A program owns BLOCK_ROWS rows of one head.

    The last chunk of columns stays in registers; the others, of a row that is not SINGLE, are read again.
    """
    head = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)) * heads + head
    row_mask = rows < row_count
    row_mean = tl.zeros((BLOCK_ROWS,), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    last = 0
    if not SINGLE:
        last = (width - 1) // BLOCK_COLS * BLOCK_COLS
        for start in range(0, last, BLOCK_COLS):
            _, row_mean, squares = read_chunk(
                x, residual, residual_out, drop, rows, row_mask, start, width, row_mean, squares,
                CENTER, HIDDEN, BLOCK_COLS,
            )  # fmt: skip
    hidden, row_mean, squares = read_chunk(
        x, residual, residual_out, drop, rows, row_mask, last, width, row_mean, squares, CENTER, HIDDEN, BLOCK_COLS
    )
    row_rstd = 1.0 / tl.sqrt(squares / width + eps)
    write_chunk(
        y, hidden, row_mean, row_rstd, weight, bias, weight_offset, head, rows, row_mask, last, width,
        CENTER, BLOCK_COLS,
    )  # fmt: skip
    if not SINGLE:
        for start in range(0, last, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            hidden = load_hidden(x, residual, drop, rows, cols, row_mask[:, None] & (cols < width)[None, :], HIDDEN)
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


@kernel(do_not_specialize=SIZES)
def norm_backward_means(
    grad_y, hidden, weight, mean, rstd, mean_g, mean_gx, row_count, width, heads, weight_offset,
    CENTER: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """mean(g) and mean(g * xhat) of rows that are not SINGLE. Grid: as `norm_forward`."""
    head = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)) * heads + head
    row_mask = rows < row_count
    row_mean, row_rstd = load_statistics(mean, rstd, rows, row_mask, CENTER)
    sum_g = tl.zeros((BLOCK_ROWS,), tl.float32)
    sum_gx = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, width, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = row_mask[:, None] & (cols < width)[None, :]
        xhat = normalized(load_rows(hidden, rows, cols, mask), row_mean, row_rstd, CENTER)
        g = load_rows(grad_y, rows, cols, mask)
        if weight is not None:
            g *= load_parameter(weight, head, width, cols)[None, :] + weight_offset
        sum_g += tl.sum(g, 1)
        sum_gx += tl.sum(rounded_product(g, xhat), 1)
    if CENTER:
        tl.store(mean_g + rows, sum_g / width, mask=row_mask)
    tl.store(mean_gx + rows, sum_gx / width, mask=row_mask)


@kernel(do_not_specialize=SIZES)
def norm_backward(
    grad_y, grad_residual_out, hidden, weight, mean, rstd, mean_g, mean_gx, grad_x, grad_residual, weight_parts,
    bias_parts, drop, row_count, width, heads, weight_offset,
    CENTER: tl.constexpr, SINGLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """grad_x and grad_residual, and this program's share of the weight and bias gradients.

    Grid: (programs, heads, chunks of columns). A program visits every programs-th tile of BLOCK_ROWS rows of its head,
    in order, and owns its chunk of row (program, head) of weight_parts and bias_parts (programs, heads, width): no
    atomics. mean_g, mean_gx: of `norm_backward_means`, where a row is not SINGLE. With STAGES of 2 the next
    tile's loads are asynchronous copies, so that memory is busy while a row is summed.
    """
    head = tl.program_id(1)
    cols = tl.program_id(2) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    if weight is not None:
        factor = load_parameter(weight, head, width, cols)[None, :] + weight_offset
    sum_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    sum_bias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    tiles = tl.cdiv(tl.cdiv(row_count - head, heads), BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        rows = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)) * heads + head
        row_mask = rows < row_count
        mask = row_mask[:, None] & (cols < width)[None, :]
        row_mean, row_rstd = load_statistics(mean, rstd, rows, row_mask, CENTER)
        xhat = normalized(load_rows(hidden, rows, cols, mask), row_mean, row_rstd, CENTER)
        g = load_rows(grad_y, rows, cols, mask)
        if weight_parts is not None:
            sum_weight += rounded_product(g, xhat)
        if bias_parts is not None:
            sum_bias += g
        if weight is not None:
            g *= factor
        if SINGLE:
            row_mean_gx = tl.sum(rounded_product(g, xhat), 1) / width
        else:
            row_mean_gx = tl.load(mean_gx + rows, mask=row_mask, other=0.0)
        grad = g - xhat * row_mean_gx[:, None]
        if CENTER:
            if SINGLE:
                grad -= (tl.sum(g, 1) / width)[:, None]
            else:
                grad -= tl.load(mean_g + rows, mask=row_mask, other=0.0)[:, None]
        grad *= row_rstd[:, None]
        if grad_residual_out is not None:
            grad += load_rows(grad_residual_out, rows, cols, mask)
        if grad_residual is not None:
            store_rows(grad_residual, grad, rows, cols, mask)
        if drop is not None:
            grad = dropout(grad, drop, rows[:, None], cols[None, :])
        store_rows(grad_x, grad, rows, cols, mask)
    offsets = (tl.program_id(0) * heads + head).to(tl.int64) * width + cols
    if weight_parts is not None:
        tl.store(weight_parts + offsets, tl.sum(sum_weight, 0), mask=cols < width)
    if bias_parts is not None:
        tl.store(bias_parts + offsets, tl.sum(sum_bias, 0), mask=cols < width)


@triton.jit
def sum_parts(parts, gradient, programs, size, cols, BLOCK_PARTS: tl.constexpr):
    """gradient[cols], the sum over the programs of parts (programs, size)."""
    total = tl.zeros((BLOCK_PARTS, cols.shape[0]), tl.float32)
    for start in range(0, programs, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        mask = (part < programs)[:, None] & (cols < size)[None, :]
        total += tl.load(parts + part.to(tl.int64)[:, None] * size + cols[None, :], mask=mask, other=0.0)
    tl.store(gradient + cols, tl.sum(total, 0).to(gradient.dtype.element_ty), mask=cols < size)


@kernel(do_not_specialize=["programs", "size"])
def norm_backward_parameters(
    weight_parts, bias_parts, grad_weight, grad_bias, programs, size,
    BLOCK_PARTS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias, the sums of the parts (programs, size) of `norm_backward` in a fixed order.
    size: heads * width. Grid: (chunks of columns,)."""
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    if weight_parts is not None:
        sum_parts(weight_parts, grad_weight, programs, size, cols, BLOCK_PARTS)
    if bias_parts is not None:
        sum_parts(bias_parts, grad_bias, programs, size, cols, BLOCK_PARTS)
