"""The tangents of norms: forward mode, and the product of the Hessian with them.

Of `norm.py`'s formulas, with P(x) = x - mean(x) - xhat * mean(x * xhat) (RMSNorm: no mean(x)), grad_h = P(g) * rstd +
grad_hidden. Along a tangent t of h, of which rstd' = -rstd^2 * mean(t * xhat), and those of weight and bias:

    xhat'   = P(t) * rstd
    y'      = xhat' * (weight + weight_offset) + xhat * weight' + bias'
    u       = grad_y * weight', the tangent of g
    grad_h' = (P(u) - xhat' * mean(g * xhat) - xhat * mean(g * xhat') - P(g) * rstd * mean(t * xhat)) * rstd

A column takes twice as many registers as in `norm.py`, and some means are of what others make, so that a row too wide
for registers is read three times.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .compiler import kernel
from .norm import (
    NO_SPECIALIZE,
    Affine,
    NormShape,
    RowView,
    Source,
    find_last_chunk,
    load_chunk,
    load_hidden,
    load_norm_stats,
    load_parameter,
    normalize,
    read_rows,
    select_chunk,
    select_rows,
    store_chunk,
    store_gradient,
    store_norm_stats,
    write_chunk,
)
from .tiles import rounded_product


class Direction(NamedTuple):
    """The tangents of a norm's inputs, each None where it is 0."""

    x: RowView | None
    residual: RowView | None
    weight: tl.tensor | None
    bias: tl.tensor | None


class RowMeans(NamedTuple):
    """mean(x) and mean(x * xhat) of rows of x, which P(x) subtracts."""

    x: tl.tensor
    product: tl.tensor


@triton.jit
def subtract(x, mean, chunk, CENTER: tl.constexpr):
    """x - mean, of LayerNorm: its xhat has a mean of 0 but for rounding, which a large mean of x would multiply in
    mean(x * xhat)."""
    if CENTER:
        x = tl.where(chunk.mask, x - mean[:, None], 0.0)
    return x


@triton.jit
def add_means(means, x, xhat, width):
    """The RowMeans with these columns, of x less what `means.x` began with."""
    product = tl.sum(rounded_product(x, xhat), 1) / width
    return RowMeans(means.x + tl.sum(x, 1) / width, means.product + product)


@triton.jit
def start_means(first, width):
    """The RowMeans of no columns yet, which begin with a pilot, a number near the mean of each row: that of its first
    columns."""
    pilot = tl.sum(first, 1) / tl.minimum(width, first.shape[1])
    return RowMeans(pilot, tl.zeros_like(pilot))


@triton.jit
def find_means(x, xhat, chunk, width, CENTER: tl.constexpr):
    """The RowMeans of whole rows. The mean of x - mean(x) corrects the rounding of mean(x)."""
    mean = tl.sum(x, 1) / width
    return add_means(RowMeans(mean, tl.zeros_like(mean)), subtract(x, mean, chunk, CENTER), xhat, width)


@triton.jit
def project(x, xhat, means, CENTER: tl.constexpr):
    """P(x)."""
    projected = x - xhat * means.product[:, None]
    if CENTER:
        projected -= means.x[:, None]
    return projected


@triton.jit
def read_tangent(moving, tangent_hidden, chunk, HIDDEN: tl.constexpr):
    """A chunk of the tangent of h, stored to `tangent_hidden` unless that is None."""
    t = load_hidden(moving, chunk, HIDDEN)
    if tangent_hidden is not None:
        store_chunk(tangent_hidden, t, chunk)
    return t


@triton.jit
def load_xhat(source, stats, rows, start, norm: tl.constexpr):
    h = load_hidden(source, select_chunk(rows, start + tl.arange(0, norm.BLOCK_COLS)), norm.HIDDEN)
    return normalize(h, stats, norm.CENTER)


@triton.jit
def write_tangent(tangent_y, xhat, moved, affine, direction, rows, start, norm: tl.constexpr):
    """One chunk of y' = xhat' * (weight + weight_offset) + xhat * weight' + bias'."""
    chunk = select_chunk(rows, start + tl.arange(0, norm.BLOCK_COLS))
    if affine.weight is not None:
        moved *= load_parameter(affine.weight, rows.head, rows.width, chunk.cols)[None, :] + affine.weight_offset
    if direction.weight is not None:
        moved += xhat * load_parameter(direction.weight, rows.head, rows.width, chunk.cols)[None, :]
    if direction.bias is not None:
        moved += load_parameter(direction.bias, rows.head, rows.width, chunk.cols)[None, :]
    store_chunk(tangent_y, moved, chunk)


@kernel(do_not_specialize=NO_SPECIALIZE)
def norm_jvp(
    x, residual, weight, bias, direction, y, hidden, mean, rstd, tangent_y, tangent_hidden, drop, row_count, width,
    heads, eps, weight_offset,
    CENTER: tl.constexpr, HIDDEN: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """What `norm_forward` computes, and the tangents of y and, if asked for, of hidden. Grid: as there, and the last
    chunk of columns stays in registers too; the others are read again for the means of t, and again for y and y'."""
    norm: tl.constexpr = NormShape(CENTER, HIDDEN, BLOCK_ROWS, BLOCK_COLS)
    rows = select_rows(tl.program_id(0), row_count, tl.program_id(1), heads, width, BLOCK_ROWS)
    source, moving = Source(x, residual, drop), Source(direction.x, direction.residual, drop)
    affine = Affine(weight, bias, weight_offset)
    last = find_last_chunk(width, SINGLE, BLOCK_COLS)
    h, stats = read_rows(source, hidden, rows, last, eps, SINGLE, norm)
    xhat = normalize(h, stats, CENTER)
    chunk = select_chunk(rows, last + tl.arange(0, BLOCK_COLS))
    t = read_tangent(moving, tangent_hidden, chunk, HIDDEN)
    if SINGLE:
        means = find_means(t, xhat, chunk, width, CENTER)
    else:
        means = start_means(load_hidden(moving, select_chunk(rows, tl.arange(0, BLOCK_COLS)), HIDDEN), width)
        pilot = means.x
        means = add_means(means, subtract(t, pilot, chunk, CENTER), xhat, width)
        for start in range(0, last, BLOCK_COLS):
            chunk = select_chunk(rows, start + tl.arange(0, BLOCK_COLS))
            others = load_xhat(source, stats, rows, start, norm)
            part = read_tangent(moving, tangent_hidden, chunk, HIDDEN)
            means = add_means(means, subtract(part, pilot, chunk, CENTER), others, width)
    write_chunk(y, h, stats, affine, rows, last, norm)
    moved = project(t, xhat, means, CENTER) * stats.rstd[:, None]
    write_tangent(tangent_y, xhat, moved, affine, direction, rows, last, norm)
    if not SINGLE:
        for start in range(0, last, BLOCK_COLS):
            chunk = select_chunk(rows, start + tl.arange(0, BLOCK_COLS))
            h, t = load_hidden(source, chunk, HIDDEN), load_hidden(moving, chunk, HIDDEN)
            write_chunk(y, h, stats, affine, rows, start, norm)
            xhat = normalize(h, stats, CENTER)
            moved = project(t, xhat, means, CENTER) * stats.rstd[:, None]
            write_tangent(tangent_y, xhat, moved, affine, direction, rows, start, norm)
    store_norm_stats(mean, rstd, stats, rows, CENTER)


MEANS = tl.constexpr(8)  # of a row, in memory: the RowMeans of t, g and u, and mean(g * xhat')


@triton.jit
def store_means(pointers, means, rows):
    tl.store(pointers, means.x, mask=rows.exist)
    tl.store(pointers + 1, means.product, mask=rows.exist)


@triton.jit
def load_means(pointers, rows):
    x = tl.load(pointers, mask=rows.exist, other=0.0)
    return RowMeans(x, tl.load(pointers + 1, mask=rows.exist, other=0.0))


@kernel(do_not_specialize=NO_SPECIALIZE)
def norm_hvp_means(
    grad_y, hidden, tangent_hidden, weight, tangent_weight, mean, rstd, means, row_count, width, heads, weight_offset,
    CENTER: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The means (rows, MEANS) of rows that are not SINGLE. Grid: as `norm_forward`."""
    rows = select_rows(tl.program_id(0), row_count, tl.program_id(1), heads, width, BLOCK_ROWS)
    stats = load_norm_stats(mean, rstd, rows, CENTER)
    mean_g_moved = tl.zeros((BLOCK_ROWS,), tl.float32)
    first = select_chunk(rows, tl.arange(0, BLOCK_COLS))
    y = load_chunk(grad_y, first)
    of_t = start_means(load_chunk(tangent_hidden, first), width)
    of_g = start_means(apply_weight(y, weight, weight_offset, rows, first), width)
    of_u = RowMeans(mean_g_moved, mean_g_moved)
    if tangent_weight is not None:
        of_u = start_means(apply_weight(y, tangent_weight, 0.0, rows, first), width)
    pilot_t, pilot_g, pilot_u = of_t.x, of_g.x, of_u.x
    for start in range(0, width, BLOCK_COLS):
        chunk = select_chunk(rows, start + tl.arange(0, BLOCK_COLS))
        xhat = normalize(load_chunk(hidden, chunk), stats, CENTER)
        of_t = add_means(of_t, subtract(load_chunk(tangent_hidden, chunk), pilot_t, chunk, CENTER), xhat, width)
        y = load_chunk(grad_y, chunk)
        g = apply_weight(y, weight, weight_offset, rows, chunk)
        of_g = add_means(of_g, subtract(g, pilot_g, chunk, CENTER), xhat, width)
        if tangent_weight is not None:
            u = apply_weight(y, tangent_weight, 0.0, rows, chunk)
            of_u = add_means(of_u, subtract(u, pilot_u, chunk, CENTER), xhat, width)
    for start in range(0, width, BLOCK_COLS):
        chunk = select_chunk(rows, start + tl.arange(0, BLOCK_COLS))
        xhat = normalize(load_chunk(hidden, chunk), stats, CENTER)
        moved = project(load_chunk(tangent_hidden, chunk), xhat, of_t, CENTER) * stats.rstd[:, None]
        g = apply_weight(load_chunk(grad_y, chunk), weight, weight_offset, rows, chunk)
        g = subtract(g, of_g.x, chunk, CENTER)
        mean_g_moved += tl.sum(rounded_product(g, moved), 1) / width
    pointers = means + rows.index * MEANS
    store_means(pointers, of_t, rows)
    store_means(pointers + 2, of_g, rows)
    store_means(pointers + 4, of_u, rows)
    tl.store(pointers + 6, mean_g_moved, mask=rows.exist)


@triton.jit
def apply_weight(y, weight, weight_offset, rows, chunk):
    """y * (weight + weight_offset); without a weight y."""
    if weight is not None:
        y *= load_parameter(weight, rows.head, rows.width, chunk.cols)[None, :] + weight_offset
    return y


@kernel(do_not_specialize=NO_SPECIALIZE)
def norm_hvp(
    grad_y, hidden, tangent_hidden, weight, tangent_weight, mean, rstd, means, grad_x, grad_residual, weight_parts,
    drop, row_count, width, heads, weight_offset,
    CENTER: tl.constexpr, SINGLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The tangents of what `norm_backward` computes, of constant grad_y and grad_hidden: grad_h' as grad_x and
    grad_residual, and partial sums of the weight's, grad_y * xhat'; that of the bias is 0. Grid: as there. means comes
    from `norm_hvp_means`, for rows that are not SINGLE."""
    head = tl.program_id(1)
    cols = tl.program_id(2) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    sum_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    tiles = tl.cdiv(tl.cdiv(row_count - head, heads), BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        rows = select_rows(tile, row_count, head, heads, width, BLOCK_ROWS)
        chunk = select_chunk(rows, cols)
        stats = load_norm_stats(mean, rstd, rows, CENTER)
        xhat = normalize(load_chunk(hidden, chunk), stats, CENTER)
        t, y = load_chunk(tangent_hidden, chunk), load_chunk(grad_y, chunk)
        g = apply_weight(y, weight, weight_offset, rows, chunk)
        if SINGLE:
            of_t, of_g = find_means(t, xhat, chunk, width, CENTER), find_means(g, xhat, chunk, width, CENTER)
        else:
            pointers = means + rows.index * MEANS
            of_t, of_g = load_means(pointers, rows), load_means(pointers + 2, rows)
        moved = project(t, xhat, of_t, CENTER) * stats.rstd[:, None]
        if weight_parts is not None:
            sum_weight += rounded_product(y, moved)
        if SINGLE:
            from_mean = subtract(g, of_g.x, chunk, CENTER)
            mean_g_moved = tl.sum(rounded_product(from_mean, moved), 1) / width
        else:
            mean_g_moved = tl.load(pointers + 6, mask=rows.exist, other=0.0)
        grad = -moved * of_g.product[:, None] - xhat * mean_g_moved[:, None]
        grad -= project(g, xhat, of_g, CENTER) * (stats.rstd * of_t.product)[:, None]
        if tangent_weight is not None:
            u = apply_weight(y, tangent_weight, 0.0, rows, chunk)
            if SINGLE:
                of_u = find_means(u, xhat, chunk, width, CENTER)
            else:
                of_u = load_means(pointers + 4, rows)
            grad += project(u, xhat, of_u, CENTER)
        store_gradient(grad_x, grad_residual, drop, grad * stats.rstd[:, None], chunk)
    if weight_parts is not None:
        offsets = (tl.program_id(0) * heads + head).to(tl.int64) * width + cols
        tl.store(weight_parts + offsets, tl.sum(sum_weight, 0), mask=cols < width)
