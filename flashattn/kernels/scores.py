"""Everything between q.k and softmax, for the kernels: which tiles to visit, which scores to keep.

`ScoreArgs` is `flashattn.score.Score` inside a kernel. An absent feature is None, and the code that would read it is
compiled away. A new feature is one field here and one branch in the function that it concerns:

- `key_tiles` and `query_tiles` leave out tiles that it masks entirely;
- `in_window_and_bounds` masks by position inside a tile;
- `apply_softcap` and `apply_score_mods` change the scores themselves, and the function beside each part of these that
  says "tangent" differentiates it once more, for `jvp.py` and `hvp.py`.

Tiles come in two kinds. In a *full* tile every score is kept, so the loop over full tiles compares and selects nothing.
*Partial* tiles (at the diagonal, at the end of a sequence) are the others; one loop visits those on both sides.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .dropout import DropoutArgs
from .softmax import LOG2E
from .state import Dual, HeadInfo, SeqInfo
from .tiles import Heads, rounded_product

# Kernel arguments that Triton must not specialise on: it would compile a length of 1, or a multiple of 16, anew, and
# with a constant 1 folded in, the assembler of CUDA 12.8 (in Triton 3.7.1) crashes on the backward. On numbers inside a
# tuple it specialises regardless, so the sizes are arguments of their own.
NO_SPECIALIZE = ["score", "batches", "heads", "kv_heads", "seq_q", "seq_k"]


class ScoreTensor(NamedTuple):
    """A (batch, heads, seq_q, seq_k) mask or bias; the stride of a broadcast dimension is 0."""

    ptr: tl.tensor
    stride_batch: tl.tensor
    stride_head: tl.tensor
    stride_q: tl.tensor
    stride_k: tl.tensor


def score_tensor_arg(x: Tensor) -> ScoreTensor:
    """A tensor of four dimensions, each that of the scores or 1, as an argument of a kernel."""
    return ScoreTensor(x, *(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)))


# Of a block mask's block: no pair attends, mask_mod decides, all pairs attend.
BLOCK_SKIP = tl.constexpr(0)
BLOCK_PARTIAL = tl.constexpr(1)
BLOCK_FULL = tl.constexpr(2)


class ModArgs(NamedTuple):
    """A score_mod, generated from its graph: functions of (score, batch, head, query, key, captured)."""

    value: tl.constexpr
    dscore: tl.constexpr  # its derivative by the score
    captured: tuple | None


class BlocksArgs(NamedTuple):
    """A block mask. `states` has BLOCK_SKIP, BLOCK_PARTIAL or BLOCK_FULL for each block."""

    captured: tuple | None
    states: ScoreTensor  # of bytes, by blocks
    block_q: tl.tensor
    block_k: tl.tensor
    mask_mod: tl.constexpr  # a function of (batch, head, query, key, captured)


class ScoreArgs(NamedTuple):
    """A constant comes last, as in BlocksArgs: after a loop Triton 3.6 forgets constants inside nested tuples that no
    constant of the tuple itself follows."""

    scale: tl.tensor  # float: multiplies q.k
    first: tl.tensor | None  # int: query i attends to keys j >= i + diagonal + first; None = no limit
    last: tl.tensor | None  # int: and to keys j <= i + diagonal + last
    q_lengths: tl.tensor | None  # (batch,) int32: queries at or past it attend to nothing
    kv_lengths: tl.tensor | None  # (batch,) int32: keys at or past it are masked
    softcap: tl.tensor | None = None  # float
    inverse_softcap: tl.tensor | None = None  # a GPU's division gives 0 from a softcap of 2^126 on
    alibi_slopes: tl.tensor | None = None  # (batch or 1, heads) float32
    alibi_stride: tl.tensor | None = None  # from batch to batch
    mask: ScoreTensor | None = None  # of bytes
    bias: ScoreTensor | None = None
    sinks: tl.tensor | None = None  # (heads,)
    dropout: DropoutArgs | None = None
    cu_seqlens: tl.tensor | None = None  # (2, batch + 1) int32, of packed q, k and v
    total_q: tl.tensor | None = None  # tokens in packed q
    score_mod: ModArgs | None = None
    blocks: BlocksArgs | None = None
    raw: tl.constexpr = tl.constexpr(False)  # scores are q.k, unscaled: softmax folds the scale into its exponents
    precision: tl.constexpr = tl.constexpr("ieee")  # of float32 products (`precision.py`)


class TangentArgs(NamedTuple):
    """The tangents of a call's tensors. None is 0, and the code that would read it is compiled away. Constants come
    last, as in ScoreArgs."""

    q: Heads | None
    k: Heads | None
    v: Heads | None
    bias: ScoreTensor | None
    sinks: tl.tensor | None  # (heads,)
    captured: tuple | None  # what a score_mod captured, and then the tangents that some of it have
    # The tangents of the score_mod and, for `hvp.py`, of its derivative, generated from its graph: functions of (score,
    # batch, head, query, key, tangent, captured).
    mod_value: tl.constexpr
    mod_dscore: tl.constexpr
    of_scores: tl.constexpr  # whether the scores have one


class TileRanges(NamedTuple):
    """The tiles that a program visits: the partial ones, then the full ones at full_begin .. full_end."""

    begin: tl.tensor
    full_begin: tl.tensor
    full_end: tl.tensor
    partial_count: tl.tensor  # of both sides


# Triton 3.6 compiles no function that returns None, or a tuple that holds None.
@triton.jit
def load_seq_info(score, batch, sizes):
    """The SeqInfo of this batch row."""
    q_start = 0
    k_start = 0
    seq_q = sizes.seq_q
    seq_k = sizes.seq_k
    if score.cu_seqlens is not None:
        q_start = tl.load(score.cu_seqlens + batch)
        k_start = tl.load(score.cu_seqlens + sizes.batches + 1 + batch)
        seq_q = tl.load(score.cu_seqlens + batch + 1) - q_start
        seq_k = tl.load(score.cu_seqlens + sizes.batches + 2 + batch) - k_start
    query_end = seq_q
    key_end = seq_k
    if score.q_lengths is not None:
        query_end = tl.minimum(query_end, tl.load(score.q_lengths + batch))
    if score.kv_lengths is not None:
        key_end = tl.minimum(key_end, tl.load(score.kv_lengths + batch))
    return SeqInfo(seq_q, seq_k, query_end, key_end, q_start, k_start, seq_k - seq_q)


@triton.jit
def query_tile_of_program(program, score, sizes, BLOCK_M: tl.constexpr):
    """(first query, kv_head, HeadInfo) of a program, in a grid of (query tiles * heads * batch,).

    The tiles of a head follow each other, the last first: under a causal mask those have the most keys. One dimension,
    since the other two of a grid end at 65,535.
    """
    tiles = tl.cdiv(sizes.seq_q, BLOCK_M)
    start_m = (tiles - 1 - program % tiles) * BLOCK_M
    head = program // tiles % sizes.heads
    kv_head = head // (sizes.heads // sizes.kv_heads)
    batch = program // tiles // sizes.heads
    return start_m, kv_head, HeadInfo(batch, head, sizes.heads, load_seq_info(score, batch, sizes))


@triton.jit
def key_tile_of_program(sizes, BLOCK_N: tl.constexpr):
    """(first key, kv_head, batch) of this program, in a grid of (key tiles * kv_heads * batch,)."""
    tiles = tl.cdiv(sizes.seq_k, BLOCK_N)
    program = tl.program_id(0)
    start_n = program % tiles * BLOCK_N
    return start_n, program // tiles % sizes.kv_heads, program // tiles // sizes.kv_heads


@triton.jit
def lse_offset(score, at):
    """Where a head begins in lse, and in tensors of its shape: (batch, heads, seq_q), packed (heads, total_q)."""
    if score.cu_seqlens is not None:
        offset = tl.cast(at.head, tl.int64) * score.total_q + at.seq.q_start
    else:
        offset = tl.cast(at.batch * at.heads + at.head, tl.int64) * at.seq.seq_q
    return offset


@triton.jit
def round_to_tiles(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """Round the range of full tiles inwards to whole tiles; the tiles left on both sides are partial."""
    begin = begin // BLOCK * BLOCK
    end = tl.maximum(end, begin)
    full_begin = tl.minimum(tl.cdiv(tl.maximum(full_begin, begin), BLOCK) * BLOCK, tl.cdiv(end, BLOCK) * BLOCK)
    full_end = tl.maximum(tl.minimum(full_end, end) // BLOCK * BLOCK, full_begin)
    partial_count = (full_begin - begin) // BLOCK + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK)
    return TileRanges(begin, full_begin, full_end, partial_count)


@triton.jit
def key_range(score, seq, start_m, BLOCK_M):
    """(begin, end) of the keys that queries start_m .. start_m + BLOCK_M attend to."""
    begin = 0
    end = seq.key_end
    if score.first is not None:
        begin = tl.maximum(start_m + seq.diagonal + score.first, 0)  # the first key of the first query
    if score.last is not None:
        end = tl.minimum(end, start_m + BLOCK_M + seq.diagonal + score.last)  # past the last key of the last query
    if score.q_lengths is not None or score.cu_seqlens is not None:
        end = tl.where(start_m < seq.query_end, end, 0)
    return begin, end


@triton.jit
def key_tiles(score, seq, start_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The key tiles that queries start_m .. start_m + BLOCK_M attend to."""
    begin, end = key_range(score, seq, start_m, BLOCK_M)
    aligned = start_m + seq.diagonal
    full_begin = 0
    full_end = seq.key_end
    if score.first is not None:
        full_begin = tl.maximum(aligned + BLOCK_M - 1 + score.first, 0)  # the first key of the last query
    if score.last is not None:
        full_end = tl.minimum(full_end, aligned + 1 + score.last)  # past the last key of the first one
    return round_to_tiles(begin, full_begin, full_end, end, BLOCK_N)


@triton.jit
def query_tiles(score, seq, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The query tiles that attend to keys start_n .. start_n + BLOCK_N."""
    aligned = start_n - seq.diagonal
    begin = 0
    full_begin = 0
    end = seq.query_end
    full_end = seq.query_end
    if score.last is not None:
        begin = tl.maximum(aligned - score.last, 0)  # the first query of the first key
        full_begin = tl.maximum(aligned + BLOCK_N - 1 - score.last, 0)  # and the last key
    if score.first is not None:
        end = tl.minimum(end, aligned + BLOCK_N - score.first)  # past the last query of the last key
        full_end = tl.minimum(full_end, aligned + 1 - score.first)  # and the first key
    end = tl.where(start_n < seq.key_end, end, 0)
    return round_to_tiles(begin, full_begin, full_end, end, BLOCK_M)


@triton.jit
def partial_start(tiles, index, BLOCK: tl.constexpr):
    """Where partial tile number `index` starts: first those before the full ones, then those after them."""
    before = (tiles.full_begin - tiles.begin) // BLOCK
    return tl.where(index < before, tiles.begin + index * BLOCK, tiles.full_end + (index - before) * BLOCK)


@triton.jit
def in_window_and_bounds(score, seq, tile):
    """Which (query, key) pairs of a partial tile attend, by the window and the lengths."""
    keep = (tile.keys < seq.key_end) & (tile.queries < seq.query_end)
    if score.first is not None:
        keep = keep & (tile.keys >= tile.queries + (seq.diagonal + score.first))
    if score.last is not None:
        keep = keep & (tile.keys <= tile.queries + (seq.diagonal + score.last))
    return keep


@triton.jit
def tanh_parts(x):
    """(near, p, far): tanh(x) is x + p x where `near`, else `far`. An odd polynomial near 0, where 1 - 2 / (e^2x + 1)
    would cancel. Largest error 2e-7, relative."""
    square = x * x
    p = square * -5.70498872745e-3 + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = (p * square - 3.33332819422e-1) * square
    magnitude = tl.abs(x)
    far = 1 - 2 / (tl.exp2(tl.minimum(magnitude, 20.0) * (2 * LOG2E)) + 1)
    return magnitude < 0.625, p, tl.where(x < 0, -far, far)


@triton.jit
def tanh(x):
    near, p, far = tanh_parts(x)
    return tl.where(near, p * x + x, far)


@triton.jit
def scale_products(score, products):
    """Scores from q.k; raw ones stay as they are. A bare product would be contracted into the subtraction of the
    maximum, where it loses the rounding that the maximum has."""
    if not score.raw:
        products = rounded_product(products, score.scale)
    return products


@triton.jit
def apply_softcap(score, scores):
    """(softcap * tanh(scores / softcap), its derivative); without a softcap the scores and 1. A score that is tiny
    beside the softcap stays as it is, though their quotient may be 0."""
    dscore = 1.0
    if score.softcap is not None:
        x = scores * score.inverse_softcap
        near, p, far = tanh_parts(x)
        t = tl.where(near, p * x + x, far)
        dscore = 1 - t * t
        scores = tl.where(near, p * scores + scores, rounded_product(far, score.softcap))
    return scores, dscore


@triton.jit
def softcap_tangents(score, scores, dscore, tangent):
    """The tangents of `apply_softcap`'s results, (scores, dscore), from that of its argument."""
    dscore_tangent = 0.0
    if score.softcap is not None:
        t = scores * score.inverse_softcap
        dscore_tangent = (-2.0 * t * score.inverse_softcap) * (dscore * tangent)
        tangent *= dscore
    return tangent, dscore_tangent


@triton.jit
def score_tensor_pointers(x, batch, head, queries, keys):
    """Pointers to a mask or a bias at positions that broadcast. 64-bit: it may pass 2**31 elements."""
    base = x.ptr + tl.cast(batch, tl.int64) * x.stride_batch + tl.cast(head, tl.int64) * x.stride_head
    return base + queries.to(tl.int64) * x.stride_q + keys.to(tl.int64) * x.stride_k


@triton.jit
def block_state(score, at, start_m, start_n):
    """The block mask's state of a tile, which lies in one of its blocks: BLOCK_FULL without a block mask."""
    if score.blocks is None:
        return BLOCK_FULL
    else:
        i = tl.cast(start_m // score.blocks.block_q, tl.int64)
        j = tl.cast(start_n // score.blocks.block_k, tl.int64)
        return tl.load(score_tensor_pointers(score.blocks.states, at.batch, at.head, i, j)).to(tl.int32)


@triton.jit
def block_is_active(score, at, start_m, start_n):
    """Whether a tile has a pair that attends by the block mask. True, at compile time, without one."""
    if score.blocks is None:
        return True
    else:
        return block_state(score, at, start_m, start_n) > BLOCK_SKIP


@triton.jit
def signed_infinity(keep):
    """+inf where a byte is not 0, else -inf; by its bits, since for AMD's GPUs Triton 3.9 cannot compile a compare with
    a loaded tile whose result must change its layout."""
    return (((keep.to(tl.uint32) + 0x7FFFFFFF) & 0x80000000) ^ 0xFF800000).to(tl.float32, bitcast=True)


@triton.jit
def add_biases(score, at, scores, tile):
    """(scores with ALiBi and bias, which pairs of the tile are inside of the sequence)."""
    batch, head, seq = at.batch, at.head, at.seq
    queries, keys = tile.queries, tile.keys
    if score.alibi_slopes is not None:
        alibi = tl.load(score.alibi_slopes + batch * score.alibi_stride + head)
        scores -= alibi * tl.abs(queries + seq.diagonal - keys).to(tl.float32)
    exists = (queries < seq.query_end) & (keys < seq.key_end)
    if score.bias is not None:
        bias = tl.load(score_tensor_pointers(score.bias, batch, head, queries, keys), mask=exists, other=0.0)
        scores += bias.to(tl.float32)
    return scores, exists


@triton.jit
def add_bias_tangent(tangents, at, tangent, tile, exists):
    """The tangent of the scores that `add_biases` returns, from that of its argument."""
    if tangents.bias is not None:
        pointers = score_tensor_pointers(tangents.bias, at.batch, at.head, tile.queries, tile.keys)
        tangent += tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    return tangent


@triton.jit
def mod_positions(seq, tile):
    """The queries and keys of a tile for a callable. A tile may pass the end of the sequence: positions stop there, so
    that reads of captured tensors stay inside."""
    return tl.minimum(tile.queries, seq.query_end - 1), tl.minimum(tile.keys, seq.key_end - 1)


@triton.jit
def apply_score_mod(score, at, scores, dscore, tile):
    """(scores, dscore) after the score_mod."""
    if score.score_mod is not None:
        i, j = mod_positions(at.seq, tile)
        # (A tuple that holds a function cannot be assigned to a variable.)
        captured = score.score_mod.captured
        dscore, _ = tl.broadcast(dscore * score.score_mod.dscore(scores, at.batch, at.head, i, j, captured), scores)
        value = score.score_mod.value(scores, at.batch, at.head, i, j, captured)
        scores, _ = tl.broadcast(rounded_product(value, 1.0), scores)  # rounded as in `scale_products`
    return scores, dscore


@triton.jit
def score_mod_tangents(score, tangents, at, dual, tile):
    """The tangents of `apply_score_mod`'s results, (scores, dscore), from the `Dual` of its arguments."""
    tangent = dual.tangent
    dscore_tangent = dual.dscore_tangent
    if score.score_mod is not None:
        i, j = mod_positions(at.seq, tile)
        captured = tangents.captured
        if tangents.mod_dscore is not None:
            own = score.score_mod.dscore(dual.scores, at.batch, at.head, i, j, score.score_mod.captured)
            own_tangent = tangents.mod_dscore(dual.scores, at.batch, at.head, i, j, tangent, captured)
            dscore_tangent = dscore_tangent * own + dual.dscore * own_tangent
        value = tangents.mod_value(dual.scores, at.batch, at.head, i, j, tangent, captured)
        tangent, _ = tl.broadcast(rounded_product(value, 1.0), dual.scores)
    return tangent, dscore_tangent


@triton.jit
def mask_scores(score, at, scores, tile, exists):
    """Scores with -inf where the mask or the block mask hides a pair."""
    batch, head, seq = at.batch, at.head, at.seq
    queries, keys = tile.queries, tile.keys
    if score.mask is not None:
        keep = tl.load(score_tensor_pointers(score.mask, batch, head, queries, keys), mask=exists, other=0)
        scores = tl.minimum(scores, signed_infinity(keep))
    if score.blocks is not None:
        i, j = mod_positions(seq, tile)
        keep = score.blocks.mask_mod(batch, head, i, j, score.blocks.captured) | (tile.block_state == BLOCK_FULL)
        scores = tl.where(keep, scores, float("-inf"))
    return scores


@triton.jit
def apply_score_mods(score, at, scores, dscore, tile):
    """(scores, dscore): ALiBi, bias, score_mod and masks applied to capped scores, and the derivative of the result by
    scale * q.k."""
    scores, exists = add_biases(score, at, scores, tile)
    scores, dscore = apply_score_mod(score, at, scores, dscore, tile)
    return mask_scores(score, at, scores, tile, exists), dscore


@triton.jit
def linearize_scores(score, tangents, at, products, tangent_products, tile, OF_BIAS: tl.constexpr):
    """The `Dual` of a tile's scores, from q.k and its tangent. OF_BIAS: with the derivative by the bias instead of that
    by scale * q.k."""
    scores, dscore = apply_softcap(score, scale_products(score, products))
    tangent, dscore_tangent = softcap_tangents(score, scores, dscore, tangent_products * score.scale)
    if OF_BIAS:
        dscore = 1.0
        dscore_tangent = 0.0
    scores, exists = add_biases(score, at, scores, tile)
    tangent = add_bias_tangent(tangents, at, tangent, tile, exists)
    dual = Dual(scores, dscore, tangent, dscore_tangent)
    tangent, dscore_tangent = score_mod_tangents(score, tangents, at, dual, tile)
    scores, dscore = apply_score_mod(score, at, scores, dscore, tile)
    return Dual(mask_scores(score, at, scores, tile, exists), dscore, tangent, dscore_tangent)


@triton.jit
def hide_tangent(tangents, p, tangent):
    """The tangent of scores whose weights are p. A weight of 0 has none, whatever a callable or a hidden bias makes of
    it."""
    if tangents.bias is not None or tangents.mod_value is not None:
        tangent = tl.where(p == 0.0, 0.0, tangent)
    return tangent


@triton.jit
def scores_backward(score, ds, dscore):
    """The gradient of scale * q.k from that of the scores. A weight of 0 has none, whatever its dscore is."""
    if score.score_mod is not None:
        ds = tl.where(ds == 0.0, 0.0, ds * dscore)
    elif score.softcap is not None:
        ds *= dscore
    return ds


@triton.jit
def scores_backward_tangent(score, ds, ds_tangent, dual):
    """The tangent of `scores_backward`'s result, from the gradient of the scores and its tangent."""
    result = scores_backward(score, ds_tangent, dual.dscore)
    if score.score_mod is not None or score.softcap is not None:
        result += scores_backward(score, ds, dual.dscore_tangent)
    return result
