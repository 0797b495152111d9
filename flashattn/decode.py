"""`decode`: append to a cache, rotate, attend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import arguments, autocast, backends, checks, ops
from .backends import BACKENDS
from .cache import Cached, KVCache, PagedKVCache, Selection
from .score import Score


class Rotary(NamedTuple):
    """Rotary position embedding: the cosine and sine of each position's angles.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), arXiv:2104.09864.

    The pairs (x[i], x[i + n]) of the first 2 n numbers of a head are rotated, n = cos.shape[1]; interleaved (x[2i],
    x[2i + 1]). The rest of a head stays as it is.
    """

    cos: Tensor  # (positions, n) floating
    sin: Tensor
    interleaved: bool = False


def decode(
    q: Tensor,
    cache: KVCache | PagedKVCache | Selection,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary: Rotary | None = None,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of generation: append new keys and values to the cache, in place, and attend to all of it.

    The first call, of whole prompts, is a step like any other. It is inference only: no dropout, no gradients. On a GPU
    nothing waits for it, but for a q_lengths that lies there.

    Args:
        q: (batch, heads, seq_q, head_dim), in the cache's dtype and on its device. Under autocast q, k and v are cast
            to this dtype.
        cache: a `KVCache`, sequences of a `PagedKVCache` (`select`), or a `PagedKVCache` for all of its sequences.
        k: (batch, kv_heads, seq_q, head_dim) new keys; None appends nothing.
        v: (batch, kv_heads, seq_q, head_dim_v) new values.
        rotary: rotates q and k by their positions, counted from the beginning of each sequence.
        causal: a new token sees those before it and itself; False: all.
        q_lengths: (batch,) int: how many of the new tokens of a row exist, where rows differ; the others are not
            appended, and give out 0 and lse -inf. Best on the CPU, where reading it waits for nothing.
        mask, bias: broadcastable to (batch, heads, seq_q, seq_k), seq_k the longest length after appending.

    A graph of `torch.compile` moves the cache on when it runs, whatever its lengths and pages are then; a cache's own
    methods, but for `select`, are for outside of it. A step that breaks off, for want of memory or by an interrupt,
    leaves the cache's lengths as they were.

    window, alibi_slopes, softcap, sinks and scale are those of `attention`; the diagonal ends at the last new token and
    the last key of each sequence.

    Returns:
        out (batch, heads, seq_q, head_dim_v); with `return_lse` (out, lse), lse (batch, heads, seq_q) float32.
        The bits of a sequence's result depend neither on what else is in the batch nor on the cache's capacity or page
        size; a batch padded to another seq_q may be computed in another order.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written; a cache without room is one of them, and
            one in the capture of a CUDA graph: its lengths are Python's numbers, which a replay would not move on.
            `flashattn.compat.flash_attn.flash_attn_with_kvcache` can be captured.

    >>> import torch, flashattn
    >>> cache = flashattn.KVCache(batch=1, kv_heads=2, capacity=64, head_dim=32)
    >>> q, k, v = (torch.randn(1, heads, 10, 32) for heads in (4, 2, 2))
    >>> prompt = flashattn.decode(q, cache, k, v)
    >>> q, k, v = (torch.randn(1, heads, 1, 32) for heads in (4, 2, 2))
    >>> flashattn.decode(q, cache, k, v).shape
    torch.Size([1, 4, 1, 32])
    """
    if not isinstance(cache, (KVCache, PagedKVCache, Selection)):
        raise TypeError(f"cache must be a KVCache or a PagedKVCache, got {type(cache).__name__}")
    in_graph = checks.is_traced()
    if isinstance(cache, PagedKVCache) and not in_graph:
        cache = cache.select(cache.sequences)
    if autocast.is_on(q):
        q, k, v = autocast.cast(cache.k.dtype, q, k, v)
    _check_inputs(q, cache, k, v, dropout_p)
    _refuse_gradients(q=q, k=k, v=v, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks)
    scale = q.shape[3] ** -0.5 if scale is None else arguments.check_scale(scale)
    window = (None, None) if window is None else arguments.check_window(window)
    backend = backends.choose(q.device, q.dtype, head_dim=max(q.shape[3], cache.v.shape[3]))
    how = How(causal, *window, mask, bias, alibi_slopes, softcap, sinks, q_lengths, scale, backend)
    if in_graph:
        out, lse = _step_in_graph(q, cache, k, v, rotary, how)
    else:
        checks.refuse_capture("cache", NOT_CAPTURED)
        out, lse = step(q, cache, (cache.k, cache.v), k, v, rotary, how)
    return (out, lse) if return_lse else out


NOT_CAPTURED = "a replay would not move its lengths on; flash_attn_with_kvcache can be captured"


class How(NamedTuple):
    """The options of a `decode`."""

    causal: bool
    left: int | None
    right: int | None
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    q_lengths: Tensor | None
    scale: float
    backend: str


def _step_in_graph(q, cache, k, v, rotary, how: How) -> tuple[Tensor, Tensor]:
    """`step` when the graph runs: lengths and pages are those of that time."""
    kept, sequences = (cache.cache, cache.sequences) if isinstance(cache, Selection) else (cache, None)
    if rotary is not None:
        check_rotary(rotary, q, 0)
    cos, sin, interleaved = (None, None, False) if rotary is None else rotary
    return torch.ops.flashattn.step(q, kept.k, kept.v, k, v, kept._number, sequences, cos, sin, interleaved, *how)


def step(
    q: Tensor, cache: KVCache | Selection, memory: tuple[Tensor, Tensor], k: Tensor | None, v: Tensor | None,
    rotary: Rotary | None, how: How,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`decode` of checked inputs, (out, lse). `memory`: the cache's k and v, or copies in which a graph writes."""
    batch, heads, seq_q, _ = q.shape
    lengths = cache.lengths
    counts = _counts(how.q_lengths, batch, seq_q)
    new = [0] * batch if k is None else counts
    after = [a + b for a, b in zip(lengths, new, strict=True)]
    if rotary is not None:
        check_rotary(rotary, q, max(after, default=0))
        if any(count > length for count, length in zip(counts, after, strict=True)):
            raise ValueError("q must not have more tokens than the cache, whose last they are, where none are new")
    q_counts = None if how.q_lengths is None else checks.int32_on(q.device, counts)
    score = Score(how.scale, how.left, 0 if how.causal else how.right, q_counts)
    whole = (batch, heads, seq_q, max(after, default=0))
    score = arguments.modified(score, whole, q.device, how.mask, how.alibi_slopes, how.softcap, 0.0, None)
    bias = None if how.bias is None else arguments.check_bias(how.bias, q, whole)
    if how.sinks is not None:
        arguments.check_sinks(how.sinks, q)
    refuse_derivatives_and_onnx(q, *memory, k, v, bias, how.sinks, *(rotary or ()))
    cached = cache._grow(new, *memory)
    score = score._replace(kv_lengths=cached.lengths, bias=bias, sinks=how.sinks)
    try:
        return append_and_attend(q, cached, k, v, rotary, score, how.backend)
    except BaseException:  # no memory, or the user's interrupt: the same call may come again
        cache.truncate(lengths)
        raise


def refuse_derivatives_and_onnx(*tensors: Tensor | None) -> None:
    """Before a cache has moved on."""
    checks.refuse_tangents(*tensors)
    checks.refuse_onnx("decode")


def append_and_attend(
    q: Tensor, cached: Cached, k: Tensor | None, v: Tensor | None, rotary: Rotary | None, score: Score, backend: str
) -> tuple[Tensor, Tensor]:
    """`decode` of checked arguments, in a cache that has room."""
    if not (ops.is_watched() or q.is_meta):
        return run(q, cached, k, v, rotary, score, backend)
    cos, sin, interleaved = (None, None, False) if rotary is None else rotary
    return torch.ops.flashattn.decode(
        q, cached.k, cached.v, k, v, cached.page_table, cached.starts, cached.longest, cos, sin, interleaved,
        score.bias, score.sinks, *score[: ops.fields_of(Score)], backend,
    )  # fmt: skip


def run(
    q: Tensor, cached: Cached, k: Tensor | None, v: Tensor | None, rotary: Rotary | None, score: Score, backend: str
) -> tuple[Tensor, Tensor]:
    verbs = BACKENDS[backend]
    if k is not None:
        q = verbs.append(q, k, v, cached, score.q_lengths, rotary)
    elif rotary is not None:  # q belongs to the last keys that are there
        starts = cached.lengths - (q.shape[2] if score.q_lengths is None else score.q_lengths)
        q = verbs.rotate(q, starts, score.q_lengths, rotary)
    return verbs.decode(q, cached, score)


def rotate(x: Tensor, starts: Tensor, rotary: Rotary, backend: str) -> Tensor:
    if not (ops.is_watched() or x.is_meta):
        return BACKENDS[backend].rotate(x, starts, None, rotary)
    return torch.ops.flashattn.rotate(x, starts, *rotary, backend)


def _counts(q_lengths: Tensor | None, batch: int, seq_q: int) -> list[int]:
    """How many new tokens each row has."""
    if q_lengths is None:
        return [seq_q] * batch
    return arguments.check_lengths("q_lengths", q_lengths, batch, seq_q, torch.device("cpu")).tolist()


def _check_inputs(q, cache, k, v, dropout_p) -> None:
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0: decode is for inference, got {dropout_p}")
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together, or neither")
    inputs = [("q", q)] if k is None else [("q", q), ("k", k), ("v", v)]
    for name, x in inputs:
        checks.floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, seq, head_dim), got shape {tuple(x.shape)}")
        if x.dtype != cache.k.dtype:
            raise TypeError(f"{name} must have the cache's dtype {cache.k.dtype}, got {x.dtype}")
        checks.on_device(name, x, "the cache", cache.k.device)
    batch, heads, seq_q, head_dim = q.shape
    kv_heads = cache.k.shape[1]
    if not checks.is_traced():  # else the operator does
        check_batch(q, cache)
    if heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"q must have a number of heads that the cache's {kv_heads} divide, got {heads}")
    if head_dim != cache.k.shape[3]:
        raise ValueError(f"q must have the cache's head_dim {cache.k.shape[3]}, got {head_dim}")
    for name, x, kept in (("k", k, cache.k), ("v", v, cache.v)):
        expected = (batch, kv_heads, seq_q, kept.shape[3])
        if x is not None and x.shape != expected:
            raise ValueError(f"{name} must be (batch, kv_heads, seq_q, dim) = {expected}, got shape {tuple(x.shape)}")


def _refuse_gradients(**inputs) -> None:
    if torch.is_grad_enabled():
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.requires_grad:
                raise ValueError(f"{name} must not require a gradient: decode is for inference; use torch.no_grad()")


def check_batch(q: Tensor, cache: KVCache | Selection) -> None:
    if q.shape[0] != len(cache.lengths):
        raise ValueError(f"q must have the cache's batch {len(cache.lengths)}, got {q.shape[0]}")


def check_rotary(rotary, q: Tensor, positions: int) -> None:
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a flashattn.Rotary(cos, sin), got {type(rotary).__name__}")
    for name, x in (("rotary.cos", rotary.cos), ("rotary.sin", rotary.sin)):
        checks.floating(name, x)
        checks.same_device(name, x, "q", q)
        if x.dim() != 2 or x.shape != rotary.cos.shape or 2 * x.shape[1] > q.shape[3]:
            raise ValueError(
                f"{name} must be (positions, n), n at most half of head_dim {q.shape[3]}, got shape {tuple(x.shape)}"
            )
    if rotary.cos.shape[0] < positions:
        raise ValueError(f"rotary.cos must have a row for each of {positions} positions, got {rotary.cos.shape[0]}")
