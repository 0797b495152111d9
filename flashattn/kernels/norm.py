"""LayerNorm and RMSNorm, forward and backward, with dropout and the residual addition fused in.

    h    = residual + dropout(x), rounded to the dtype of hidden, and normalised as rounded
    xhat = (h - mean) * rstd,  rstd = 1 / sqrt(mean((h - mean)^2) + eps)       (RMSNorm: mean = 0)
    y    = xhat * (weight + weight_offset) + bias

    g      = grad_y * (weight + weight_offset)
    grad_h = (g - mean(g) - xhat * mean(g * xhat)) * rstd + grad_hidden  (RMSNorm: no mean(g))

Ba et al., "Layer Normalization" (2016), arXiv:1607.06450; Zhang and Sennrich, "Root Mean Square Layer
Normalization" (2019), arXiv:1910.07467.

A weight may be per head: row r then uses weight[r % heads]. The programs of one head visit its rows only, so that a
program reads one weight row and sums one weight gradient.

Memory traffic (`bench/ptx/norm_bytes.py` counts it): a row of at most `norm_configs.NORM_COLS` is SINGLE, read once and
kept in registers. They set the limit: a thread of 32 warps has 64, of which 32,768 columns take 32 forward. Backward a
column takes four or five, for two sums over rows, xhat, g and the weight, and 8,192 columns fill the 128 of 16 warps. A
wider row is read in chunks: forward all but the last one twice; backward grad_y and hidden twice, once for their means
and once for the gradients. A cluster of programs could hold such a row, but Triton sums across one only from 3.8 on.

Backward, as many programs as run at a time, by the multiprocessors of the card, share the rows, and each writes a row
of partial sums of the parameters' gradients. They are added in a fixed order: the same bits every run, on a card with
as many multiprocessors.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .compiler import kernel
from .dropout import DropoutArgs, apply_dropout
from .tiles import rounded_product

# Triton must not specialise on these (see scores.py). It must on the width, whose divisibility makes loads wide.
NO_SPECIALIZE = ["row_count", "heads"]


class RowView(NamedTuple):
    """A tensor of up to three leading dimensions, any strides, seen as rows; the last dimension is contiguous."""

    ptr: tl.tensor
    size_1: tl.tensor
    size_2: tl.tensor
    stride_0: tl.tensor
    stride_1: tl.tensor
    stride_2: tl.tensor


class Rows(NamedTuple):
    """Some rows of one head: their numbers, and which of them exist."""

    index: tl.tensor
    exist: tl.tensor
    head: tl.tensor
    width: tl.tensor


class Chunk(NamedTuple):
    """Some columns of some rows, and which of the elements exist."""

    rows: tl.tensor
    cols: tl.tensor
    mask: tl.tensor


class Source(NamedTuple):
    """The terms of h, or of its tangent, each None where it is 0."""

    x: RowView | None
    residual: RowView | None
    drop: DropoutArgs | None


class Affine(NamedTuple):
    weight: tl.tensor | None
    bias: tl.tensor | None
    weight_offset: tl.tensor


class Moments(NamedTuple):
    """Mean and sum of squared deviations of the columns so far; without CENTER 0 and the sum of squares."""

    mean: tl.tensor
    squares: tl.tensor


class NormStats(NamedTuple):
    mean: tl.tensor
    rstd: tl.tensor


class NormShape(NamedTuple):
    CENTER: tl.constexpr
    HIDDEN: tl.constexpr  # dtype of h
    BLOCK_ROWS: tl.constexpr
    BLOCK_COLS: tl.constexpr


@triton.jit
def select_rows(tile, row_count, head, heads, width, BLOCK_ROWS: tl.constexpr):
    """Tile number `tile` of a head's rows: row r has weight[r % heads]."""
    index = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)) * heads + head
    return Rows(index, index < row_count, head, width)


@triton.jit
def select_chunk(rows, cols):
    return Chunk(rows.index, cols, rows.exist[:, None] & (cols < rows.width)[None, :])


@triton.jit
def find_last_chunk(width, SINGLE: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The first column of the chunk that stays in registers."""
    if SINGLE:
        return 0
    else:
        return (width - 1) // BLOCK_COLS * BLOCK_COLS


@triton.jit
def row_pointers(x, chunk):
    """Pointers to a chunk: row r of the flattened view is [r // (n1 n2), r // n2 % n1, r % n2]."""
    inner = chunk.rows % x.size_2
    outer = chunk.rows // x.size_2
    offsets = (
        inner.to(tl.int64) * x.stride_2
        + (outer % x.size_1).to(tl.int64) * x.stride_1
        + (outer // x.size_1).to(tl.int64) * x.stride_0
    )
    return x.ptr + offsets[:, None] + chunk.cols[None, :]


@triton.jit
def load_chunk(x, chunk):
    return tl.load(row_pointers(x, chunk), mask=chunk.mask, other=0.0).to(tl.float32)


@triton.jit
def store_chunk(x, value, chunk):
    tl.store(row_pointers(x, chunk), value.to(x.ptr.dtype.element_ty), mask=chunk.mask)


@triton.jit
def load_hidden(source, chunk, HIDDEN: tl.constexpr):
    """h = residual + dropout(x), rounded to the dtype HIDDEN, as float32."""
    if source.x is None:
        h = tl.zeros(chunk.mask.shape, tl.float32)
    else:
        h = load_chunk(source.x, chunk)
        if source.drop is not None:
            h = apply_dropout(h, source.drop, chunk.rows[:, None], chunk.cols[None, :])
    if source.residual is not None:
        h += load_chunk(source.residual, chunk)
    return h.to(HIDDEN).to(tl.float32)


@triton.jit
def load_parameter(parameter, head, width, cols):
    """One row of a weight or bias, as float32."""
    return tl.load(parameter + head * width + cols, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def normalize(h, stats, CENTER: tl.constexpr):
    """xhat."""
    if CENTER:
        h -= stats.mean[:, None]
    return h * stats.rstd[:, None]


@triton.jit
def update_moments(moments, h, mask, count, width, CENTER: tl.constexpr):
    """Fold a chunk into the moments of the `count` columns before it. The deviations of a chunk are taken from its own
    mean, so nothing cancels, and their mean corrects both moments for the rounding error of that mean: the mean of
    equal numbers is that number. Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), the
    corrected two-pass algorithm, and how to update it.
    """
    mean, squares = moments
    if CENTER:
        chunk = tl.minimum(width - count, h.shape[1]).to(tl.float32)
        chunk_mean = tl.sum(h, 1) / chunk
        deviation = tl.where(mask, h - chunk_mean[:, None], 0.0)
        lost = tl.sum(deviation, 1) / chunk
        chunk_squares = tl.sum(rounded_product(deviation, deviation), 1) - lost * lost * chunk
        delta = chunk_mean + lost - mean
        share = chunk / (count + chunk)
        mean += delta * share
        squares += tl.maximum(chunk_squares, 0.0) + delta * delta * (count * share)
    else:
        squares += tl.sum(rounded_product(h, h), 1)
    return Moments(mean, squares)


@triton.jit
def read_chunk(moments, source, hidden, rows, start, norm: tl.constexpr):
    """(h, moments): one chunk of h, stored to `hidden` unless that is None, and folded into the moments."""
    chunk = select_chunk(rows, start + tl.arange(0, norm.BLOCK_COLS))
    h = load_hidden(source, chunk, norm.HIDDEN)
    if hidden is not None:
        store_chunk(hidden, h, chunk)
    return h, update_moments(moments, h, chunk.mask, start, rows.width, norm.CENTER)


@triton.jit
def read_rows(source, hidden, rows, last, eps, SINGLE: tl.constexpr, norm: tl.constexpr):
    """(h, stats): the last chunk of h, and the NormStats of the rows."""
    moments = Moments(tl.zeros((norm.BLOCK_ROWS,), tl.float32), tl.zeros((norm.BLOCK_ROWS,), tl.float32))
    if not SINGLE:
        for start in range(0, last, norm.BLOCK_COLS):
            _, moments = read_chunk(moments, source, hidden, rows, start, norm)
    h, moments = read_chunk(moments, source, hidden, rows, last, norm)
    return h, NormStats(moments.mean, 1.0 / tl.sqrt(moments.squares / rows.width + eps))


@triton.jit
def write_chunk(y, h, stats, affine, rows, start, norm: tl.constexpr):
    """One chunk of y = xhat * (weight + weight_offset) + bias."""
    chunk = select_chunk(rows, start + tl.arange(0, norm.BLOCK_COLS))
    value = normalize(h, stats, norm.CENTER)
    if affine.weight is not None:
        value *= load_parameter(affine.weight, rows.head, rows.width, chunk.cols)[None, :] + affine.weight_offset
    if affine.bias is not None:
        value += load_parameter(affine.bias, rows.head, rows.width, chunk.cols)[None, :]
    store_chunk(y, value, chunk)


@kernel(do_not_specialize=NO_SPECIALIZE)
def norm_forward(
    x, residual, weight, bias, y, hidden, mean, rstd, drop, row_count, width, heads, eps, weight_offset,
    CENTER: tl.constexpr, HIDDEN: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y and, if asked for, hidden = h. Grid: (row tiles, heads). A program owns BLOCK_ROWS rows of one head.

    The last chunk of columns stays in registers; the others, of a row that is not SINGLE, are read again.
    """
    norm: tl.constexpr = NormShape(CENTER, HIDDEN, BLOCK_ROWS, BLOCK_COLS)
    rows = select_rows(tl.program_id(0), row_count, tl.program_id(1), heads, width, BLOCK_ROWS)
    source = Source(x, residual, drop)
    affine = Affine(weight, bias, weight_offset)
    last = find_last_chunk(width, SINGLE, BLOCK_COLS)
    h, stats = read_rows(source, hidden, rows, last, eps, SINGLE, norm)
    write_chunk(y, h, stats, affine, rows, last, norm)
    if not SINGLE:
        for start in range(0, last, BLOCK_COLS):
            h = load_hidden(source, select_chunk(rows, start + tl.arange(0, BLOCK_COLS)), HIDDEN)
            write_chunk(y, h, stats, affine, rows, start, norm)
    store_norm_stats(mean, rstd, stats, rows, CENTER)


@triton.jit
def store_norm_stats(mean, rstd, stats, rows, CENTER: tl.constexpr):
    if CENTER:
        tl.store(mean + rows.index, stats.mean, mask=rows.exist)
    tl.store(rstd + rows.index, stats.rstd, mask=rows.exist)


@triton.jit
def load_norm_stats(mean, rstd, rows, CENTER: tl.constexpr):
    """The NormStats of some rows; the mean of an RMSNorm is 0."""
    row_rstd = tl.load(rstd + rows.index, mask=rows.exist, other=0.0)
    row_mean = tl.zeros_like(row_rstd)
    if CENTER:
        row_mean = tl.load(mean + rows.index, mask=rows.exist, other=0.0)
    return NormStats(row_mean, row_rstd)


@kernel(do_not_specialize=NO_SPECIALIZE)
def norm_backward_means(
    grad_y, hidden, weight, mean, rstd, mean_g, mean_gx, row_count, width, heads, weight_offset,
    CENTER: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """mean(g) and mean(g * xhat) of rows that are not SINGLE. Grid: as `norm_forward`."""
    rows = select_rows(tl.program_id(0), row_count, tl.program_id(1), heads, width, BLOCK_ROWS)
    stats = load_norm_stats(mean, rstd, rows, CENTER)
    sum_g = tl.zeros((BLOCK_ROWS,), tl.float32)
    sum_gx = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, width, BLOCK_COLS):
        chunk = select_chunk(rows, start + tl.arange(0, BLOCK_COLS))
        xhat = normalize(load_chunk(hidden, chunk), stats, CENTER)
        g = load_chunk(grad_y, chunk)
        if weight is not None:
            g *= load_parameter(weight, rows.head, width, chunk.cols)[None, :] + weight_offset
        sum_g += tl.sum(g, 1)
        sum_gx += tl.sum(rounded_product(g, xhat), 1)
    if CENTER:
        tl.store(mean_g + rows.index, sum_g / width, mask=rows.exist)
    tl.store(mean_gx + rows.index, sum_gx / width, mask=rows.exist)


@triton.jit
def store_gradient(grad_x, grad_residual, drop, grad, chunk):
    """Those of x and the residual from that of h."""
    if grad_residual is not None:
        store_chunk(grad_residual, grad, chunk)
    if drop is not None:
        grad = apply_dropout(grad, drop, chunk.rows[:, None], chunk.cols[None, :])
    store_chunk(grad_x, grad, chunk)


@kernel(do_not_specialize=NO_SPECIALIZE)
def norm_backward(
    grad_y, grad_hidden, hidden, weight, mean, rstd, mean_g, mean_gx, grad_x, grad_residual, weight_parts,
    bias_parts, drop, row_count, width, heads, weight_offset,
    CENTER: tl.constexpr, SINGLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """grad_x and grad_residual, and partial sums of the gradients of weight and bias.

    Grid: (programs, heads, chunks of columns). A program visits every programs-th tile of BLOCK_ROWS rows of its head,
    in order, and owns its chunk of row (program, head) of weight_parts and bias_parts (programs, heads, width): no
    atomics. mean_g and mean_gx come from `norm_backward_means`, for rows that are not SINGLE. With STAGES of 2 the next
    tile is loaded by asynchronous copies, so that memory is busy while a row is summed.
    """
    head = tl.program_id(1)
    cols = tl.program_id(2) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    if weight is not None:
        factor = load_parameter(weight, head, width, cols)[None, :] + weight_offset
    sum_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    sum_bias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    tiles = tl.cdiv(tl.cdiv(row_count - head, heads), BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        rows = select_rows(tile, row_count, head, heads, width, BLOCK_ROWS)
        chunk = select_chunk(rows, cols)
        stats = load_norm_stats(mean, rstd, rows, CENTER)
        xhat = normalize(load_chunk(hidden, chunk), stats, CENTER)
        g = load_chunk(grad_y, chunk)
        if weight_parts is not None:
            sum_weight += rounded_product(g, xhat)
        if bias_parts is not None:
            sum_bias += g
        if weight is not None:
            g *= factor
        if SINGLE:
            row_mean_gx = tl.sum(rounded_product(g, xhat), 1) / width
        else:
            row_mean_gx = tl.load(mean_gx + rows.index, mask=rows.exist, other=0.0)
        grad = g - xhat * row_mean_gx[:, None]
        if CENTER:
            if SINGLE:
                grad -= (tl.sum(g, 1) / width)[:, None]
            else:
                grad -= tl.load(mean_g + rows.index, mask=rows.exist, other=0.0)[:, None]
        grad *= stats.rstd[:, None]
        if grad_hidden is not None:
            grad += load_chunk(grad_hidden, chunk)
        store_gradient(grad_x, grad_residual, drop, grad, chunk)
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
