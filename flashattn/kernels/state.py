"""The state of attention kernels, as named tuples that their functions pass on. The compiler takes tuples apart, so
they cost nothing. Inside a kernel a tuple of constants needs `name: tl.constexpr = Shape(...)`."""

from typing import NamedTuple

import triton.language as tl

from .tiles import Matrix


class Shape(NamedTuple):
    """The sizes that a pass is compiled for: head dimensions, columns of a tile of q or k and of one of v, queries and
    keys of a tile."""

    HEAD_DIM: tl.constexpr
    HEAD_DIM_V: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr


class Sizes(NamedTuple):
    """The sizes of a call. In a packed one batches counts the sequences, and seq_q and seq_k are the longest ones."""

    batches: tl.tensor
    heads: tl.tensor
    kv_heads: tl.tensor
    seq_q: tl.tensor
    seq_k: tl.tensor


class SeqInfo(NamedTuple):
    """One batch row: its sizes, the ends of its queries and keys by the lengths, where it starts in packed tensors (0
    in others), and the key that query 0 is aligned with."""

    seq_q: tl.tensor
    seq_k: tl.tensor
    query_end: tl.tensor
    key_end: tl.tensor
    q_start: tl.tensor
    k_start: tl.tensor
    diagonal: tl.tensor


class HeadInfo(NamedTuple):
    """One query head of one batch row."""

    batch: tl.tensor
    head: tl.tensor
    heads: tl.tensor
    seq: SeqInfo


class TilePositions(NamedTuple):
    """The queries and keys of a tile of scores, in any two shapes that broadcast to the tile's, so that one function
    serves tiles laid out (M, N) and (N, M); and the tile's `block_state`."""

    queries: tl.tensor
    keys: tl.tensor
    block_state: tl.tensor


class Dual(NamedTuple):
    """Scores, their derivative by scale * q.k, and the tangents of both; 0 at compile time where there is none."""

    scores: tl.tensor
    dscore: tl.tensor
    tangent: tl.tensor
    dscore_tangent: tl.tensor


class Softmax(NamedTuple):
    """The online softmax of some rows: unnormalised output, running maximum and running sum."""

    acc: tl.tensor
    m_i: tl.tensor
    l_i: tl.tensor


class SoftmaxTangent(NamedTuple):
    """The tangent of a `Softmax`: of the unnormalised output at constant weights' sum, and the sum of the weights times
    the tangents of their scores."""

    acc: tl.tensor
    mu: tl.tensor


class RowStats(NamedTuple):
    """lse and its rest, as `load_lse` returns them, and delta of some queries, in registers."""

    lse: tl.tensor
    delta: tl.tensor
    rest: tl.tensor


class KeyViews(NamedTuple):
    """k and v of a head in memory, and their tangents."""

    k: Matrix
    v: Matrix
    tangent_k: Matrix | None
    tangent_v: Matrix | None


class QueryViews(NamedTuple):
    """q and grad_out of a head in memory, and the tangent of q."""

    q: Matrix
    grad_out: Matrix
    tangent_q: Matrix | None


class DualStats(NamedTuple):
    """The RowStats of some queries, and the tangents of lse and delta."""

    rows: RowStats
    tangent_lse: tl.tensor
    tangent_delta: tl.tensor


class QueryTile(NamedTuple):
    """The queries that a program or consumer of backward owns."""

    start: tl.tensor
    q: tl.tensor
    grad_out: tl.tensor
    stats: RowStats


class KeyTile(NamedTuple):
    """The keys that a program or consumer of backward owns."""

    start: tl.tensor
    k: tl.tensor
    v: tl.tensor


class DualQueryTile(NamedTuple):
    """A `QueryTile` with the tangents of its queries."""

    start: tl.tensor
    q: tl.tensor
    tangent_q: tl.tensor | None
    grad_out: tl.tensor
    stats: DualStats


class DualKeyTile(NamedTuple):
    """A `KeyTile` with the tangents of its keys and values."""

    start: tl.tensor
    k: tl.tensor
    tangent_k: tl.tensor | None
    v: tl.tensor
    tangent_v: tl.tensor | None


class KeyGradients(NamedTuple):
    """The gradients of a `KeyTile`, so far."""

    k: tl.tensor
    v: tl.tensor
