"""The operators of decoding, which write to a cache. Calls that need no dispatcher skip them.

`rotate` and `decode` take tensors alone. `step` is all of `flashattn.decode`: how many tokens a KVCache has, and in
which pages, are Python's numbers, and it advances them each time that a graph runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import arguments, tracing
from .. import cache as caches
from ..backends import BACKENDS
from ..cache import CacheView, KVCache, PagedBatch, PagedKVCache, Rotary
from ..score import SCORE_FIELDS, Score, write_operator_schema
from ..tensors import find_accumulation_dtype, new_result
from .register import implement

ROTARY = "Tensor? cos, Tensor? sin, bool interleaved"
CACHE = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v"

torch.library.define(
    "flashattn::rotate",
    "(Tensor x, Tensor starts, Tensor cos, Tensor sin, bool interleaved, str backend) -> Tensor",
)
torch.library.define(
    "flashattn::decode",
    f"(Tensor q, {CACHE}, Tensor? page_table, Tensor starts, SymInt longest, {ROTARY}, {write_operator_schema(Score)}, "
    "str backend) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "flashattn::step",
    f"(Tensor q, {CACHE}, Tensor number, SymInt[]? sequences, {ROTARY}, {write_operator_schema(Score)}, "
    "str backend) -> (Tensor out, Tensor lse)",
)

NOT_CAPTURED = "a replay would not advance its lengths; flash_attn_with_kvcache can be captured"


# ------------------------------------------------------------------------------------------------ a step


def step(
    q: Tensor, cache: KVCache | PagedKVCache | PagedBatch, k: Tensor | None, v: Tensor | None, rotary: Rotary | None,
    score: Score, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of checked inputs; the score is still to be checked. In a graph lengths and pages are those of the
    time when it runs."""
    if not tracing.is_traced():
        assert not isinstance(cache, PagedKVCache)
        tracing.refuse_capture("cache", NOT_CAPTURED)
        return run_step(q, cache, (cache.k, cache.v), k, v, rotary, score, backend)
    owner, sequences = (cache.cache, cache.sequences) if isinstance(cache, PagedBatch) else (cache, None)
    if rotary is not None:
        arguments.check_rotary(rotary, q, 0)
    flat = (owner._number, sequences, *flatten_rotary(rotary), *score[:SCORE_FIELDS], backend)
    return torch.ops.flashattn.step(q, owner.k, owner.v, k, v, *flat)


def run_step(
    q: Tensor, cache: KVCache | PagedBatch, memory: tuple[Tensor, Tensor], k: Tensor | None, v: Tensor | None,
    rotary: Rotary | None, score: Score, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`memory`: the cache's k and v, or copies to which a graph writes."""
    batch, heads, seq_q, _ = q.shape
    lengths = cache.lengths
    counts = _count_tokens(score.q_lengths, batch, seq_q)
    new = [0] * batch if k is None else counts
    after = [a + b for a, b in zip(lengths, new, strict=True)]
    if rotary is not None:
        arguments.check_rotary(rotary, q, max(after, default=0))
        if any(count > length for count, length in zip(counts, after, strict=True)):
            raise ValueError("q must not have more tokens than the cache, whose last they are, where none are new")
    q_lengths = None if score.q_lengths is None else caches.to_int32(q.device, counts)
    shape = (batch, heads, seq_q, max(after, default=0))
    score = arguments.check_score(score._replace(q_lengths=None), q, shape)
    refuse_derivatives_and_onnx(q, *memory, k, v, score.bias, score.sinks, *(rotary or ()))
    cached = cache._reserve(new, *memory)
    score = score._replace(q_lengths=q_lengths, kv_lengths=cached.lengths)
    try:
        return append_and_attend(q, cached, k, v, rotary, score, backend)
    except BaseException:  # out of memory, or the user's interrupt: the same call may come again
        cache.truncate(lengths)
        raise


def _count_tokens(q_lengths: Tensor | None, batch: int, seq_q: int) -> list[int]:
    """How many new tokens each row has."""
    if q_lengths is None:
        return [seq_q] * batch
    return arguments.check_lengths("q_lengths", q_lengths, batch, seq_q, torch.device("cpu")).tolist()


def refuse_derivatives_and_onnx(*tensors: Tensor | None) -> None:
    """Refuse forward mode and ONNX, before the cache is changed."""
    tracing.refuse_tangents("decode", *tensors)
    tracing.refuse_onnx("decode")


def append_and_attend(
    q: Tensor, cached: CacheView, k: Tensor | None, v: Tensor | None, rotary: Rotary | None, score: Score, backend: str
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments, in a cache that has room."""
    if not (tracing.must_dispatch() or q.is_meta):
        return run(q, cached, k, v, rotary, score, backend)
    view = (cached.k, cached.v, k, v, cached.page_table, cached.starts, cached.longest)
    return torch.ops.flashattn.decode(q, *view, *flatten_rotary(rotary), *score[:SCORE_FIELDS], backend)


def run(
    q: Tensor, cached: CacheView, k: Tensor | None, v: Tensor | None, rotary: Rotary | None, score: Score, backend: str
) -> tuple[Tensor, Tensor]:
    verbs = BACKENDS[backend]
    if k is not None and v is not None:
        q = verbs.append(q, k, v, cached, score.q_lengths, rotary)
    elif rotary is not None:  # q belongs to the last keys of the cache
        starts = cached.lengths - (q.shape[2] if score.q_lengths is None else score.q_lengths)
        q = verbs.rotate(q, starts, score.q_lengths, rotary)
    return verbs.decode(q, cached, score)


def rotate(x: Tensor, starts: Tensor, rotary: Rotary, backend: str) -> Tensor:
    if not (tracing.must_dispatch() or x.is_meta):
        return BACKENDS[backend].rotate(x, starts, None, rotary)
    return torch.ops.flashattn.rotate(x, starts, *rotary, backend)


# ------------------------------------------------------------------------------------------------ operators


def flatten_rotary(rotary: Rotary | None) -> tuple:
    return (None, None, False) if rotary is None else tuple(rotary)


def unflatten_rotary(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rotary | None:
    return None if cos is None or sin is None else Rotary(cos, sin, interleaved)


def _check_starts(starts: Tensor, most: int) -> None:
    """Check values that a graph could not read when it was traced. On a GPU they were clamped."""
    if starts.is_cuda or starts.numel() == 0:
        return
    low, high = int(starts.min()), int(starts.max())
    if low < 0 or high > most:
        raise ValueError(f"cache_seqlens must be between 0 and {most}, got {low if low < 0 else high}")


@implement("rotate")
def _(x, starts, cos, sin, interleaved, backend):
    _check_starts(starts, cos.shape[0] - x.shape[2])
    return BACKENDS[backend].rotate(x, starts, None, Rotary(cos, sin, interleaved))


@torch.library.register_fake("flashattn::rotate")
def _(x, *_):
    return x.new_empty(x.shape)


@implement("decode")
def _(q, k_cache, v_cache, k, v, page_table, starts, longest, cos, sin, interleaved, *flat):
    score, backend = Score(*flat[:SCORE_FIELDS]), flat[SCORE_FIELDS]
    assert score.kv_lengths is not None
    capacity = k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    _check_starts(starts, capacity - (0 if k is None else k.shape[2]))
    if page_table is not None:
        name = "block_table or cache_batch_idx"
        arguments.check_pages(name, page_table, k_cache.shape[0], k_cache.shape[2], score.kv_lengths)
    cached = CacheView(k_cache, v_cache, page_table, starts, score.kv_lengths, longest)
    return run(q, cached, k, v, unflatten_rotary(cos, sin, interleaved), score, backend)


@torch.library.register_fake("flashattn::decode")
@torch.library.register_fake("flashattn::step")
def _(q, k_cache, v_cache, *_):
    return new_result(q, v_cache.shape[3], True), q.new_empty(q.shape[:3], dtype=find_accumulation_dtype(q))


@implement("step")
def _(q, k_cache, v_cache, k, v, number, sequences, cos, sin, interleaved, *flat):
    tracing.refuse_capture("cache", NOT_CAPTURED)
    found = caches.find_cache(int(number))
    cache: KVCache | PagedBatch
    if isinstance(found, PagedKVCache):
        cache = found.select(found.sequences if sequences is None else sequences)
    else:
        assert isinstance(found, KVCache)
        cache = found
    arguments.check_batch(q, cache)
    rotary = unflatten_rotary(cos, sin, interleaved)
    score, backend = Score(*flat[:SCORE_FIELDS]), flat[SCORE_FIELDS]
    return run_step(q, cache, (k_cache, v_cache), k, v, rotary, score, backend)
