"""The operators of decoding, which write to a cache: for what traces or watches calls. Other calls take the shorter way
to what these do.

`rotate` and `decode` take tensors alone. `step` is all of `flashattn.decode`: how many tokens a KVCache has, and which
pages, are Python's numbers, and it moves them on each time that a graph runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments, cache, checks, ops
from . import decode as calls
from . import score as score_settings
from .backends import BACKENDS
from .backends.common import result_like
from .cache import Cached
from .decode import Rotary
from .score import Score

ROTARY = "Tensor? cos, Tensor? sin, bool interleaved"

torch.library.define(
    "flashattn::rotate",
    "(Tensor x, Tensor starts, Tensor cos, Tensor sin, bool interleaved, str backend) -> Tensor",
)
torch.library.define(
    "flashattn::decode",
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor? page_table, Tensor starts, "
    f"SymInt longest, {ROTARY}, Tensor? bias, Tensor? sinks, {score_settings.SCHEMA}, str backend) "
    "-> (Tensor out, Tensor lse)",
)
torch.library.define(
    "flashattn::step",
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor number, SymInt[]? sequences, "
    f"{ROTARY}, bool causal, SymInt? left, SymInt? right, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, "
    "float? softcap, Tensor? sinks, Tensor? q_lengths, float scale, str backend) -> (Tensor out, Tensor lse)",
)


def rotary_of(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rotary | None:
    return None if cos is None else Rotary(cos, sin, interleaved)


def check_starts(starts: Tensor, most: int) -> None:
    """Of what a graph could not read. On a GPU they were clamped."""
    if starts.is_cuda or starts.numel() == 0:
        return
    low, high = int(starts.min()), int(starts.max())
    if low < 0 or high > most:
        raise ValueError(f"cache_seqlens must be between 0 and {most}, got {low if low < 0 else high}")


@ops.implement("rotate")
def _(x, starts, cos, sin, interleaved, backend):
    check_starts(starts, cos.shape[0] - x.shape[2])
    return BACKENDS[backend].rotate(x, starts, None, Rotary(cos, sin, interleaved))


@torch.library.register_fake("flashattn::rotate")
def _(x, *_):
    return x.new_empty(x.shape)


@ops.implement("decode")
def _(q, k_cache, v_cache, k, v, page_table, starts, longest, cos, sin, interleaved, bias, sinks, *settings):
    *fields, backend = settings
    score = Score(*fields, bias, sinks)
    capacity = k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    check_starts(starts, capacity - (0 if k is None else k.shape[2]))
    if page_table is not None:
        name = "block_table or cache_batch_idx"
        arguments.check_pages(name, page_table, k_cache.shape[0], k_cache.shape[2], score.kv_lengths)
    cached = Cached(k_cache, v_cache, page_table, starts, score.kv_lengths, longest)
    return calls.run(q, cached, k, v, rotary_of(cos, sin, interleaved), score, backend)


@torch.library.register_fake("flashattn::decode")
@torch.library.register_fake("flashattn::step")
def _(q, k_cache, v_cache, *_):
    return result_like(q, v_cache.shape[3], True), q.new_empty(q.shape[:3], dtype=ops.lse_dtype(q))


@ops.implement("step")
def _(q, k_cache, v_cache, k, v, number, sequences, cos, sin, interleaved, *how):
    checks.refuse_capture("cache", calls.NOT_CAPTURED)
    kept = cache.numbered(int(number))
    if isinstance(kept, cache.PagedKVCache):
        kept = kept.select(kept.sequences if sequences is None else sequences)
    calls.check_batch(q, kept)
    return calls.step(q, kept, (k_cache, v_cache), k, v, rotary_of(cos, sin, interleaved), calls.How(*how))
