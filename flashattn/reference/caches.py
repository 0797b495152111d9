"""The reference's decode steps and caches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import tracing
from ..score import Score
from ..tensors import find_accumulation_dtype, new_result
from .attention import PackedSequence, forward_dense

if TYPE_CHECKING:
    from ..cache import CacheView, Rotary


def rotate(x: Tensor, starts: Tensor, counts: Tensor | None, rotary: Rotary) -> Tensor:
    """x (batch, heads, seq, dim), rotated by its angles; token t of batch row b is at position starts[b] + t."""
    positions = starts.view(-1, 1) + torch.arange(x.shape[2], device=x.device)
    positions = positions.clamp(0, rotary.cos.shape[0] - 1)  # tokens past the table do not exist
    dtype, n = find_accumulation_dtype(x), rotary.cos.shape[1]
    cos, sin = (table[positions][:, None].to(dtype) for table in (rotary.cos, rotary.sin))
    part = x[..., : 2 * n].to(dtype)
    a, b = part.unflatten(-1, (n, 2)).unbind(-1) if rotary.interleaved else part.split(n, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    rotated = torch.stack(pair, -1).flatten(-2) if rotary.interleaved else torch.cat(pair, -1)
    return torch.cat((rotated.to(x.dtype), x[..., 2 * n :]), -1)


def append(q: Tensor, k: Tensor, v: Tensor, cached: CacheView, counts: Tensor | None, rotary: Rotary | None) -> Tensor:
    """Write the first counts[b] new keys (batch, kv_heads, seq, dim) of each batch row, rotated, and values to the
    cache after those that it has. Returns q, rotated to the same positions."""
    store(k, cached.k, cached, counts, rotary)
    store(v, cached.v, cached, counts, None)
    return q if rotary is None else rotate(q, cached.starts, counts, rotary)


def store(x: Tensor, cache: Tensor, cached: CacheView, counts: Tensor | None, rotary: Rotary | None) -> None:
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


def decode(q: Tensor, cached: CacheView, score: Score) -> tuple[Tensor, Tensor]:
    """Each batch row by itself: its queries and keys, aligned bottom-right."""
    out = new_result(q, cached.v.shape[3], True)
    lse = torch.full(q.shape[:3], -math.inf, dtype=find_accumulation_dtype(q), device=q.device)
    tracing.refuse_capture("cache_seqlens", "without the triton backend it is read back")
    lengths = cached.lengths.tolist()
    counts = [q.shape[2]] * len(lengths) if score.q_lengths is None else score.q_lengths.tolist()
    for batch, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        own = PackedSequence(batch, slice(0, count), slice(0, length)).own_score(score)
        k, v = (gather_pages(x, cached.page_table, batch, length) for x in (cached.k, cached.v))
        out[batch, :, :count], lse[batch, :, :count], _ = forward_dense(q[batch : batch + 1, :, :count], k, v, own)
    return out, lse


def gather_pages(x: Tensor, page_table: Tensor | None, batch: int, length: int) -> Tensor:
    """(1, kv_heads, length, dim): the keys or values of one batch row, from their pages."""
    if page_table is None:
        return x[batch : batch + 1, :, :length]
    pages = x[page_table[batch, : -(-length // x.shape[2])].long()]
    return pages.transpose(0, 1).flatten(1, 2)[None, :, :length]
