"""The reference: attention and norms as the mathematics says them, on any device PyTorch runs on.

Every other backend is tested against this one in float64. It computes in float32 for 16-bit inputs, takes the queries
in blocks so that memory stays linear in the sequence length, and refuses nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import autocast, checks
from ..norm_settings import Norm
from ..score import Score
from .common import dropout_threshold, new_lse, result_like

if TYPE_CHECKING:
    from ..cache import Cached
    from ..decode import Rotary
    from ..score_mod import Traced

MAX_SCORES = 1 << 24  # at a time


def unusable(device: torch.device) -> str | None:
    return None


def refuses(dtype: torch.dtype, wide: bool) -> str | None:
    return None


def accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Sequence(NamedTuple):
    """One of packed sequences."""

    batch: int
    queries: slice
    keys: slice
    score: Score

    def of_queries(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        return x[:, :, self.keys]

    def plane(self, x: Tensor | None) -> Tensor | None:
        """A mask or a bias of (batch, heads, max_seqlen_q, max_seqlen_k): what concerns this sequence."""
        if x is None:
            return None
        x = x if x.shape[0] == 1 else x[self.batch : self.batch + 1]
        x = x if x.shape[2] == 1 else x[:, :, : self.queries.stop - self.queries.start]
        return x if x.shape[3] == 1 else x[..., : self.keys.stop - self.keys.start]

    def alone(self) -> Score:
        """The Score of this sequence on its own."""
        slopes = self.score.slopes
        if slopes is not None and slopes.shape[0] > 1:
            slopes = slopes[self.batch : self.batch + 1]
        return self.score._replace(
            q_lengths=None, kv_lengths=None, cu_seqlens=None, slopes=slopes, mask=self.plane(self.score.mask),
            bias=self.plane(self.score.bias),
        )  # fmt: skip


def sequences(score: Score) -> Iterator[Sequence]:
    """Each of packed sequences with the Score it has on its own."""
    checks.refuse_capture("cu_seqlens", "without the triton backend it is read back")
    starts_q, starts_k = score.cu_seqlens.tolist()
    ranges = zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True)
    for batch, (queries, keys) in enumerate(ranges):
        one = Sequence(batch, slice(*queries), slice(*keys), score)
        yield one._replace(score=one.alone())


class Keys(NamedTuple):
    """The keys that a block of queries is compared with: all, or where a block mask leaves some out the others."""

    positions: Tensor
    chosen: Tensor | None = None

    def of(self, x: Tensor, dim: int = -1) -> Tensor:
        """What concerns these keys of a tensor, which may be broadcast along them."""
        return x if self.chosen is None or x.shape[dim] == 1 else x.index_select(dim, self.chosen)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total (batch, heads, seq_k, dim) += x (batch, heads, keys, dim)."""
        total.add_(x) if self.chosen is None else total.index_add_(2, self.chosen, x)


def keys_of(score: Score, rows: slice, seq_k: int, device: torch.device) -> Keys:
    if score.block_mask is None:
        return Keys(torch.arange(seq_k, device=device))
    chosen = score.block_mask.keys_of(rows, seq_k)
    return Keys(chosen, chosen)


def visible(score: Score, shape: tuple[int, ...], rows: slice, keys: Keys) -> Tensor:
    """(batch, 1 or heads, rows, keys) bool: which keys each query attends to; `shape`: (batch, heads, seq_q, seq_k)."""
    batch, heads, seq_q, seq_k = shape
    j = keys.positions
    i = torch.arange(seq_q, device=j.device)[rows].view(-1, 1)
    keep = torch.ones(batch, 1, i.shape[0], j.shape[0], dtype=torch.bool, device=j.device)
    first, last = score.bounds(seq_q, seq_k)
    if first is not None:
        keep = keep & (j >= i + first)
    if last is not None:
        keep = keep & (j <= i + last)
    if score.q_lengths is not None:
        keep = keep & (i < score.q_lengths.view(-1, 1, 1, 1))
    if score.kv_lengths is not None:
        keep = keep & (j < score.kv_lengths.view(-1, 1, 1, 1))
    if score.mask is not None:
        keep = keep & is_set(keys.of(of_rows(score.mask, rows)))
    if score.block_mask is not None:
        keep = keep & score.block_mask.visible(*positions(batch, heads, i, j))
    return keep


def positions(batch: int, heads: int, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch rows, heads, queries and keys as a score_mod takes them: int32, and they broadcast."""
    b, h = torch.arange(batch, device=j.device).view(-1, 1, 1, 1), torch.arange(heads, device=j.device).view(-1, 1, 1)
    return tuple(x.int() for x in (b, h, i, j))


def is_set(mask: Tensor) -> Tensor:
    """The mask in bytes of 0 and 1: a view of other bytes as bool has others, and & takes them bit by bit."""
    return mask.view(torch.uint8) != 0


def of_rows(x: Tensor, rows: slice) -> Tensor:
    """Of a mask or a bias: what concerns these queries."""
    return x if x.shape[2] == 1 else x[:, :, rows]


def existing(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (batch, heads, seq, dim) in the accumulation dtype, with 0 at and past each length: what lies there may be
    NaN, and 0 * NaN is NaN."""
    x = x.to(accumulate_dtype(x))
    if lengths is None:
        return x
    exists = torch.arange(x.shape[2], device=x.device) < lengths.view(-1, 1)
    return torch.where(exists[:, None, :, None], x, 0)


def query_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Queries in blocks of some MAX_SCORES scores."""
    batch, heads, seq_q, seq_k = shape
    block = max(16, min(256, MAX_SCORES // max(1, batch * heads * seq_k)))
    for start in range(0, seq_q, block):
        yield slice(start, min(start + block, seq_q))


def masked_scores(
    q: Tensor, k: Tensor, score: Score, shape: tuple[int, ...], rows: slice, keys: Keys
) -> tuple[Tensor, Callable[[Tensor, list], Tensor]]:
    """(scores, pull): scores with -inf where masked, (batch, heads, rows, keys); pull(gradient, sums) takes their
    gradient back to that of scale * q.k, and adds those of what a score_mod captured to `sums`."""
    batch, heads, seq_q, seq_k = shape
    i = torch.arange(seq_q, device=q.device)[rows].view(-1, 1)
    scores, slope, pull_mod = q[:, :, rows] @ k.mT * score.scale, 1.0, None
    if score.softcap is not None:
        tanh = torch.tanh(scores / score.softcap)
        scores, slope = score.softcap * tanh, 1 - tanh * tanh
    if score.slopes is not None:
        distances = (i + seq_k - seq_q - keys.positions).abs()
        scores = scores - score.slopes[:, :, None, None].to(scores.dtype) * distances
    if score.bias is not None:
        scores = scores + keys.of(of_rows(score.bias, rows)).to(scores.dtype)
    keep = visible(score, shape, rows, keys)
    if score.score_mod is not None:
        scores, pull_mod = modified(score.score_mod, scores, positions(batch, heads, i, keys.positions), keep)

    def pull(gradient: Tensor, sums: list[Tensor | None]) -> Tensor:
        return (gradient if pull_mod is None else pull_mod(gradient, sums)) * slope

    return scores.masked_fill(~keep, -math.inf), pull


def modified(
    mod: Traced, scores: Tensor, at: tuple[Tensor, ...], keep: Tensor
) -> tuple[Tensor, Callable[[Tensor, list], Tensor]]:
    """Scores through a score_mod, and `pull` as above. Pairs that attend decide: at others positions may lie outside of
    what the score_mod captured, and a derivative may be infinite."""
    try:
        # (On a GPU an index outside of a tensor ends the process.)
        modify = modified_where(keep) if scores.is_cuda and mod.indexes else modified_at
        result, gradients = modify(mod, scores, at)
    except IndexError:
        result, gradients = modified_where(keep)(mod, scores, at)

    def pull(gradient: Tensor, sums: list[Tensor | None]) -> Tensor:
        wanted = [n for n, total in enumerate(sums) if total is not None]
        of_scores, *others = gradients(gradient, wanted)
        if not all(x.isfinite().all() for x in others):  # 0 * inf
            _, *others = modified_where(keep)(mod, scores, at)[1](gradient, wanted)
        for n, x in zip(wanted, others, strict=True):
            sums[n] += x
        return torch.where(gradient == 0, 0, of_scores)

    return result, pull


Gradients = Callable[[Tensor, list[int]], list[Tensor]]


def modified_at(mod: Traced, scores: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, Gradients]:
    """(scores through a score_mod, gradients): gradients(gradient, wanted) are those of the scores and of the captured
    tensors of these numbers."""
    with torch.enable_grad():
        inputs = [scores.detach().requires_grad_()]
        inputs += [x.detach().requires_grad_(x.is_floating_point()) for x in mod.captured]
        result = mod.graph.forward(inputs[0], *at, *inputs[1:]).to(scores.dtype).broadcast_to(scores.shape)

    def gradients(gradient: Tensor, wanted: list[int]) -> list[Tensor]:
        of = [inputs[0], *(inputs[n + 1] for n in wanted)]
        if not result.requires_grad:
            return [torch.zeros_like(x) for x in of]
        return torch.autograd.grad(result, of, gradient, allow_unused=True, materialize_grads=True)

    return result.detach(), gradients


def modified_where(keep: Tensor) -> Callable[[Traced, Tensor, tuple[Tensor, ...]], tuple[Tensor, Gradients]]:
    """`modified_at` of the pairs that attend alone; the scores of the others are 0, and so are their gradients."""

    def modify(mod, scores, at):
        pairs = keep.expand_as(scores).nonzero(as_tuple=True)
        values, gradients_of_pairs = modified_at(mod, scores[pairs], tuple(x.expand_as(scores)[pairs] for x in at))

        def everywhere(of_pairs: Tensor) -> Tensor:
            return torch.zeros_like(scores).index_put(pairs, of_pairs)

        def gradients(gradient: Tensor, wanted: list[int]) -> list[Tensor]:
            of_scores, *others = gradients_of_pairs(gradient[pairs], wanted)
            return [everywhere(of_scores), *others]

        return everywhere(values), gradients

    return modify


def kept_weights(
    score: Score, shape: tuple[int, ...], first_batch: int, rows: slice, keys: Keys, dtype: torch.dtype
) -> Tensor | float:
    """What dropout multiplies the weights (batch, heads, rows, keys) by: 0 or 1 / (1 - p). The four words of Philox,
    of 7 rounds, at (j // 4, i, batch * heads + head, 0) serve four keys."""
    if score.dropout_p == 0:
        return 1.0
    (batch, heads, seq_q, seq_k), device = shape, keys.positions.device
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1) + first_batch * heads
    i, quarter = torch.arange(seq_q, device=device)[rows].view(-1, 1), torch.arange((seq_k + 3) // 4, device=device)
    words = torch.stack(philox(score.seed.view(()), quarter, i, head, rounds=7), -1).flatten(-2)[..., :seq_k]
    return (keys.of(words) >> 1 >= dropout_threshold(score.dropout_p)).to(dtype) / (1 - score.dropout_p)


def softmax_weights(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(s) / (sum(exp(s)) + exp(sink)), lse, the logarithm of what it is divided by, and the rest that rounding took
    from it); 0, -inf and 0 of a row without a key. Not exp(s - lse): beside scores of -1e9 the logarithm of a sum of a
    thousand is rounded away, and such weights would sum to a thousand."""
    if scores.shape[-1] == 0:
        lse = scores.new_full((*scores.shape[:-1], 1), -math.inf)
        return scores, lse, torch.zeros_like(lse)
    top = scores.amax(-1, keepdim=True)
    empty = top == -math.inf
    top = torch.where(empty, 0, top)
    if sinks is not None:
        sinks = sinks.to(scores.dtype).view(-1, 1, 1)
        top = torch.maximum(top, sinks)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    log = total.log()
    lse = top + log
    rest = log - (lse - top)
    return torch.where(empty, 0, weights / total), torch.where(empty, -math.inf, lse), torch.where(empty, 0, rest)


def forward(q: Tensor, k: Tensor, v: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor]:
    """out = softmax(s) v and lse = log(sum(exp(s))), with the scores s and a sink among what is summed, and the rest of
    lse."""
    if score.cu_seqlens is None:
        return dense_forward(q, k, v, score)
    out, lse = result_like(q, v.shape[-1], True), new_lse(q, score, accumulate_dtype(q))
    rest = torch.zeros_like(lse)
    for one in sequences(score):
        one.of_queries(out)[:], one.of_queries(lse)[:], one.of_queries(rest)[:] = dense_forward(
            one.of_queries(q), one.of_keys(k), one.of_keys(v), one.score, one.batch
        )
    return out, lse, rest


@autocast.off
def dense_forward(q: Tensor, k: Tensor, v: Tensor, score: Score, first_batch: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    dtype, group = q.dtype, q.shape[1] // k.shape[1]
    q = existing(q, score.q_lengths)
    k, v = (existing(x, score.kv_lengths).repeat_interleave(group, dim=1) for x in (k, v))
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=dtype, device=q.device)
    lse, rest = (torch.empty(q.shape[:3], dtype=q.dtype, device=q.device) for _ in range(2))
    shape = (*q.shape[:3], k.shape[2])
    for rows in query_blocks(shape):
        keys = keys_of(score, rows, k.shape[2], q.device)
        scores, _ = masked_scores(q, keys.of(k, 2), score, shape, rows, keys)
        weights, *logarithms = softmax_weights(scores, score.sinks)
        weights = weights * kept_weights(score, shape, first_batch, rows, keys, q.dtype)
        out[:, :, rows] = (weights @ keys.of(v, 2)).to(dtype)
        lse[:, :, rows], rest[:, :, rows] = (x.squeeze(-1) for x in logarithms)
    return out, lse, rest


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rest: Tensor | None, score: Score, with_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """With the weights p, dropped to p', and dp' = grad_out v^T: ds = p * (dp - rowsum(p * dp) + grad_lse)."""
    if score.cu_seqlens is None:
        *gradients, grad_bias = dense_backward(grad_out, grad_lse, q, k, v, score, with_grad_bias)
        return *gradients, grad_bias.to(score.bias.dtype) if with_grad_bias else None
    grad_q, grad_k, grad_v = (result_like(x, x.shape[-1], True) for x in (q, k, v))
    grad_bias = torch.zeros_like(score.bias, dtype=lse.dtype) if with_grad_bias else None
    for one in sequences(score):
        rows, keys = one.of_queries, one.of_keys
        rows(grad_q)[:], keys(grad_k)[:], keys(grad_v)[:], grad = dense_backward(
            rows(grad_out), rows(grad_lse), rows(q), keys(k), keys(v), one.score, with_grad_bias, one.batch
        )
        if with_grad_bias:
            one.plane(grad_bias).add_(grad)
    return grad_q, grad_k, grad_v, grad_bias.to(score.bias.dtype) if with_grad_bias else None


@autocast.off
def dense_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, score: Score,
    with_grad_bias: bool, first_batch: int = 0, grad_captured: list[Tensor | None] | tuple[()] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Also adds the gradients of what a score_mod captured to `grad_captured`, where it has a tensor."""
    dtype, group = q.dtype, q.shape[1] // k.shape[1]
    q, grad_out = (existing(x, score.q_lengths) for x in (q, grad_out))
    if grad_lse is not None:
        grad_lse = existing(grad_lse[..., None], score.q_lengths)
    k, v = (existing(x, score.kv_lengths).repeat_interleave(group, dim=1) for x in (k, v))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_bias = torch.zeros_like(score.bias, dtype=q.dtype) if with_grad_bias else None
    shape = (*q.shape[:3], k.shape[2])
    for rows in query_blocks(shape):
        keys = keys_of(score, rows, k.shape[2], q.device)
        k_rows, v_rows = keys.of(k, 2), keys.of(v, 2)
        scores, pull = masked_scores(q, k_rows, score, shape, rows, keys)
        p, *_ = softmax_weights(scores, score.sinks)
        kept = kept_weights(score, shape, first_batch, rows, keys, q.dtype)
        do = grad_out[:, :, rows]
        dp = do @ v_rows.mT * kept
        delta = (p * dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[:, :, rows]
        ds = p * (dp - delta)
        if grad_bias is not None:
            add_bias_gradient(of_rows(grad_bias, rows), ds, keys)
        ds = pull(ds, grad_captured) * score.scale
        grad_q[:, :, rows] = ds @ k_rows
        keys.add_to(grad_k, ds.mT @ q[:, :, rows])
        keys.add_to(grad_v, (p * kept).mT @ do)
    grad_k, grad_v = (g.unflatten(1, (-1, group)).sum(2) for g in (grad_k, grad_v))
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), grad_bias


# ------------------------------------------------------------------------------------------------ decoding


def rotate(x: Tensor, starts: Tensor, counts: Tensor | None, rotary: Rotary) -> Tensor:
    """x (batch, heads, seq, dim), of which token t of a row is at position starts[b] + t, rotated by its angles. What
    stands at and past counts[b], where given, does not exist."""
    positions = starts.view(-1, 1) + torch.arange(x.shape[2], device=x.device)
    positions = positions.clamp(0, rotary.cos.shape[0] - 1)  # those past the table do not exist
    dtype, n = accumulate_dtype(x), rotary.cos.shape[1]
    cos, sin = (table[positions][:, None].to(dtype) for table in (rotary.cos, rotary.sin))
    part = x[..., : 2 * n].to(dtype)
    a, b = part.unflatten(-1, (n, 2)).unbind(-1) if rotary.interleaved else part.split(n, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    rotated = torch.stack(pair, -1).flatten(-2) if rotary.interleaved else torch.cat(pair, -1)
    return torch.cat((rotated.to(x.dtype), x[..., 2 * n :]), -1)


def append(q: Tensor, k: Tensor, v: Tensor, cached: Cached, counts: Tensor | None, rotary: Rotary | None) -> Tensor:
    """Write new keys, rotated, and values (batch, kv_heads, seq, dim) behind those that the cache has, counts[b] of
    each row. Returns q, whose tokens are at the same positions, rotated."""
    store(k, cached.k, cached, counts, rotary)
    store(v, cached.v, cached, counts, None)
    return q if rotary is None else rotate(q, cached.starts, counts, rotary)


def store(x: Tensor, cache: Tensor, cached: Cached, counts: Tensor | None, rotary: Rotary | None) -> None:
    starts, page_table = cached.starts, cached.page_table
    if rotary is not None:
        x = rotate(x, starts, counts, rotary)
    (batch, _, seq, _), size = x.shape, cache.shape[2]
    token, row = torch.arange(seq, device=x.device), torch.arange(batch, device=x.device).view(-1, 1)
    exists = token < (seq if counts is None else counts.view(-1, 1))
    row, token = (i[exists.expand(batch, seq)] for i in torch.broadcast_tensors(row, token))
    position = starts[row] + token
    page = row if page_table is None else page_table[row, position // size]
    cache[page, :, position % size] = x[row, :, token]


def decode(q: Tensor, cached: Cached, score: Score) -> tuple[Tensor, Tensor]:
    """Each row alone: its queries and its keys, whose diagonal is the bottom right as ever."""
    out = result_like(q, cached.v.shape[3], True)
    lse = torch.full(q.shape[:3], -math.inf, dtype=accumulate_dtype(q), device=q.device)
    checks.refuse_capture("cache_seqlens", "without the triton backend it is read back")
    lengths = score.kv_lengths.tolist()
    counts = [q.shape[2]] * len(lengths) if score.q_lengths is None else score.q_lengths.tolist()
    for batch, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        one = Sequence(batch, slice(0, count), slice(0, length), score).alone()
        k, v = (existing_rows(x, cached.page_table, batch, length) for x in (cached.k, cached.v))
        out[batch, :, :count], lse[batch, :, :count], _ = dense_forward(q[batch : batch + 1, :, :count], k, v, one)
    return out, lse


def existing_rows(x: Tensor, page_table: Tensor | None, batch: int, length: int) -> Tensor:
    """(1, kv_heads, length, dim): the keys or values of one batch row, out of their pages."""
    if page_table is None:
        return x[batch : batch + 1, :, :length]
    pages = x[page_table[batch, : -(-length // x.shape[2])].long()]
    return pages.transpose(0, 1).flatten(1, 2)[None, :, :length]


# ------------------------------------------------------------------------------------------------ random numbers


def add_bias_gradient(total: Tensor, ds: Tensor, keys: Keys) -> None:
    """total += ds, summed over what shares an element."""
    size = [*total.shape[:3], 1 if total.shape[3] == 1 else ds.shape[3]]
    ds = ds.sum_to_size(size)
    total.add_(ds) if keys.chosen is None or total.shape[3] == 1 else total.index_add_(3, keys.chosen, ds)


def philox(seed: int | Tensor, *counter: Tensor, rounds: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of Philox-4x32 under key `seed` at a counter of up to four words, the others 0: int64 in [0, 2**32).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    mask = 0xFFFFFFFF
    key_0, key_1 = seed & mask, seed >> 32 & mask
    words = torch.broadcast_tensors(*(c & mask for c in counter))
    c_0, c_1, c_2, c_3 = (*words, *[torch.zeros_like(words[0])] * (4 - len(words)))
    for _ in range(rounds):
        product_0, product_2 = c_0 * 0xD2511F53, c_2 * 0xCD9E8D57  # wraps, but keeps the low 64 bits
        c_0, c_1, c_2, c_3 = (
            (product_2 >> 32 & mask) ^ c_1 ^ key_0,
            product_2 & mask,
            (product_0 >> 32 & mask) ^ c_3 ^ key_1,
            product_0 & mask,
        )
        key_0, key_1 = (key_0 + 0x9E3779B9) & mask, (key_1 + 0xBB67AE85) & mask
    return c_0, c_1, c_2, c_3


def dropout(x: Tensor, norm: Norm) -> Tensor:
    """x (rows, width) with elements dropped where 31 random bits are below p * 2**31, the others scaled up."""
    if norm.dropout_p == 0:
        return x
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    cols = torch.arange(x.shape[1], device=x.device)[None, :]
    keep = philox(norm.seed.view(()), cols, rows)[0] >> 1 >= dropout_threshold(norm.dropout_p)
    return torch.where(keep, x / (1 - norm.dropout_p), 0)


def per_row(p: Tensor, rows: int) -> Tensor:
    """A parameter as (rows, width) or (1, width): row r of per-head weights is weight[r % heads]."""
    return p.repeat(rows // p.shape[0], 1) if p.dim() == 2 else p[None, :]


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    hidden_dtype: torch.dtype,
    keep_hidden: bool,
    norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """h = residual + dropout(x); y = (h - mean) * rstd * (weight + offset) + bias."""
    dtype, width = accumulate_dtype(x), x.shape[-1]
    hidden = dropout(x.reshape(-1, width).to(dtype), norm)
    rows = hidden.shape[0]
    if residual is not None:
        hidden = hidden + residual.reshape(-1, width).to(dtype)
    hidden = hidden.to(hidden_dtype).to(dtype)  # what is kept of h is what is normalised
    mean = hidden.mean(-1) if norm.center else None
    if norm.center:  # the mean of what is left corrects a sum that was rounded: of equal numbers it is that number
        mean = mean + (hidden - mean[:, None]).mean(-1)
    centered = hidden - mean[:, None] if norm.center else hidden
    rstd = torch.rsqrt(centered.square().mean(-1) + norm.eps)
    y = centered * rstd[:, None]
    if weight is not None:
        y = y * (per_row(weight, rows).to(dtype) + norm.weight_offset)
    if bias is not None:
        y = y + per_row(bias, rows).to(dtype)
    kept = hidden.to(hidden_dtype).view(x.shape) if keep_hidden else None
    return y.to(x.dtype).view(x.shape), kept, mean, rstd


def norm_backward(
    grad_y: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """With g = grad_y * (weight + offset): grad_h = (g - mean(g) - xhat * mean(g * xhat)) * rstd + grad_hidden."""
    dtype, shape, width = rstd.dtype, hidden.shape, hidden.shape[-1]
    grad = grad_y.reshape(-1, width).to(dtype)
    rows = grad.shape[0]
    xhat = hidden.reshape(-1, width).to(dtype)
    if norm.center:
        xhat = xhat - mean[:, None]
    xhat = xhat * rstd[:, None]
    g = grad if weight is None else grad * (per_row(weight, rows).to(dtype) + norm.weight_offset)
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
