"""`attention`, `attention_varlen` and `decode`: each checks its arguments, builds the Score, chooses a backend and
calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import arguments, autocast, auxiliary, backends, nested, ops, tracing
from .auxiliary import AuxOutput, AuxRequest
from .cache import KVCache, PagedBatch, PagedKVCache, Rotary
from .score import ScoreOptions, list_options

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from typing_extensions import Unpack


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., bias: Tensor | None = ..., dropout_p: float = ...,
    seed: int | Tensor | None = ..., q_lengths: Tensor | None = ..., kv_lengths: Tensor | None = ...,
    score_mod: Callable | None = ..., block_mask: BlockMask | None = ..., return_lse: Literal[False] = ...,
    return_aux: None = ..., **options: Unpack[ScoreOptions],
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., bias: Tensor | None = ..., dropout_p: float = ...,
    seed: int | Tensor | None = ..., q_lengths: Tensor | None = ..., kv_lengths: Tensor | None = ...,
    score_mod: Callable | None = ..., block_mask: BlockMask | None = ..., return_lse: Literal[True],
    return_aux: None = ..., **options: Unpack[ScoreOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., bias: Tensor | None = ..., dropout_p: float = ...,
    seed: int | Tensor | None = ..., q_lengths: Tensor | None = ..., kv_lengths: Tensor | None = ...,
    score_mod: Callable | None = ..., block_mask: BlockMask | None = ..., return_lse: Literal[False] = ...,
    return_aux: AuxRequest, **options: Unpack[ScoreOptions],
) -> tuple[Tensor, AuxOutput]: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., bias: Tensor | None = ..., dropout_p: float = ...,
    seed: int | Tensor | None = ..., q_lengths: Tensor | None = ..., kv_lengths: Tensor | None = ...,
    score_mod: Callable | None = ..., block_mask: BlockMask | None = ..., return_lse: bool = ...,
    return_aux: AuxRequest | None = ..., **options: Unpack[ScoreOptions],
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]: ...  # fmt: skip
@list_options
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    score_mod: Callable | None = None,
    block_mask: BlockMask | None = None,
    return_lse: bool = False,
    return_aux: AuxRequest | None = None,
    **options: Unpack[ScoreOptions],
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Exact softmax attention: out = softmax(scale * q k^T) v, in memory linear in the sequence length.

    Args:
        q: (batch, heads, seq_q, head_dim); float32, bfloat16 or float16 (float64 on the reference backend).
        k: (batch, kv_heads, seq_k, head_dim); kv_heads divides heads, and query head h reads key/value head
            h // (heads // kv_heads).
        v: (batch, kv_heads, seq_k, head_dim_v).
        causal: query i attends to keys j <= i + seq_k - seq_q (aligned bottom-right).
        window: (left, right): query i attends to keys i - left to i + right inclusive, from the same diagonal;
            None on a side leaves it open. With causal, right is 0.
        mask: bool, broadcastable to (batch, heads, seq_q, seq_k): True = attend. Broadcast dimensions are not expanded.
        bias: floating, broadcastable likewise, added to the scaled scores; gets a gradient.
        alibi_slopes: (heads,) or (batch, heads) float32: -slope * |i + seq_k - seq_q - j| is added to the scores. No
            gradient.
        softcap: the scaled scores become softcap * tanh(score / softcap), before bias, ALiBi and masks.
        sinks: (heads,): a learned logit that joins the softmax denominator only; gets a gradient.
        kv_lengths: (batch,) integers: keys at or past the length are masked, and never read.
        q_lengths: (batch,) integers: queries at or past the length attend to nothing.
        dropout_p: probability in [0, 1) that a weight is dropped; those kept are divided by 1 - dropout_p.
        seed: int, or an int64 tensor of one element on q's device. The same seed drops the same weights on every
            backend, forward and backward; None draws one from PyTorch's generator.
        score_mod: (score, batch, head, q_idx, kv_idx) -> score, of FlexAttention: a function of one score, after bias
            and ALiBi, before masks. Tensors that it captures get gradients.
        block_mask: of `torch.nn.attention.flex_attention.create_block_mask`; its empty blocks are skipped.
        scale: multiplies q.k; head_dim ** -0.5 by default.
        return_lse: also return the logarithm of each softmax denominator.
        return_aux: a `flashattn.AuxRequest`: also return what it asks for, as a `flashattn.AuxOutput`.

    Returns:
        out (batch, heads, seq_q, head_dim_v) in q's dtype; with `return_lse` (out, lse), lse (batch, heads, seq_q)
        float32, natural logarithm; with `return_aux` (out, aux). Gradients flow through out and lse. A fully
        masked row gives out 0, lse -inf and gradient 0.

    Differentiable twice by q, k, v, bias, sinks and what a score_mod captured, forward (`torch.func.jvp`, one pass) and
    in reverse, under functorch's transforms too.

    Under autocast q, k, v and bias are cast to its dtype, as PyTorch's own attention does.

    Strides are honoured: a transposed or sliced view is not copied (a last dimension that is not contiguous is, once).
    Lengths on the CPU are checked against the sequence; on a GPU they are clamped, to save a synchronisation.

    On NVIDIA GPUs float32 is multiplied as `torch.set_float32_matmul_precision` says: "highest" without tensor cores,
    "high" (up to head_dim 128; on sm_100 from Triton 3.8 on) by three products of TF32, "medium" by one; a backward by
    the setting of its own time.

    Weights sum to one however large the scores are, with -1e9 or the least float as a mask too. On a GPU, where nothing
    but scale and masks changes the scores of 16-bit tensors, results are NaN beyond 4e7, and gradients beyond 4e4.

    A call never synchronises with the GPU, and a CUDA graph can capture it, forward and backward, after a first call,
    which compiles; all tensors, lengths too, must be on the GPU. In a replay an int for a seed drops the same weights
    again, None others. The gradients of tensors that a score_mod captured cannot be captured in a CUDA graph, nor can
    callables and packed sequences without the triton backend (float64, a head_dim over 256): a ValueError says so.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.
        IndexError: if a pair that attends indexes a captured tensor outside of its bounds (a GPU cannot raise: there a
            floating tensor reads as NaN and others as 0).
        NotImplementedError: for a third derivative, or a derivative by alibi_slopes or of `return_aux`'s statistics.

    >>> import torch, flashattn
    >>> q = k = v = torch.ones(1, 8, 5, 64)
    >>> flashattn.attention(q, k, v, causal=True).shape
    torch.Size([1, 8, 5, 64])
    """
    arguments.check_names("attention", options)
    q, k, v, bias = autocast.cast_attention_inputs(q, k, v, bias)
    plain = type(q) is type(k) is type(v) is Tensor
    if q.is_nested or k.is_nested or v.is_nested if plain else any(map(nested.is_nested, (q, k, v))):
        refused = dict(score_mod=score_mod, block_mask=block_mask, return_aux=return_aux)
        taken = dict(causal=causal, bias=bias, dropout_p=dropout_p, seed=seed, return_lse=return_lse, **options)
        return _nested(q, k, v, q_lengths, kv_lengths, refused, taken)
    request = None if return_aux is None else auxiliary.read_request(return_aux, return_lse)
    shape = arguments.check_shapes(q, k, v)
    score = arguments.build_score(
        q, shape, causal=causal, bias=bias, dropout_p=dropout_p, seed=seed, q_lengths=q_lengths, kv_lengths=kv_lengths,
        score_mod=score_mod, block_mask=block_mask, **options,
    )  # fmt: skip
    backend = backends.choose(q.device, q.dtype, head_dim=max(q.shape[3], v.shape[3]))
    out, lse = ops.attention.attention(q, k, v, score, backend)
    if request is not None:
        return out, auxiliary.compute(request, q, k, lse, score, backend)
    return (out, lse) if return_lse else out


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., *, causal: bool = ..., bias: Tensor | None = ..., dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    return_lse: Literal[False] = ..., **options: Unpack[ScoreOptions],
) -> Tensor: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., *, causal: bool = ..., bias: Tensor | None = ..., dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    return_lse: Literal[True], **options: Unpack[ScoreOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., *, causal: bool = ..., bias: Tensor | None = ..., dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    return_lse: bool = ..., **options: Unpack[ScoreOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@list_options
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    **options: Unpack[ScoreOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of sequences of different lengths, concatenated without padding.

    Args:
        q: (total_q, heads, head_dim): the queries of sequence b are rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1].
        k: (total_k, kv_heads, head_dim), likewise by cu_seqlens_k.
        v: (total_k, kv_heads, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, from 0, never falling. A sequence may be empty.
        max_seqlen_q, max_seqlen_k: an upper bound of the lengths; computed if None, which synchronises on a GPU (in a
            CUDA graph it must be given).
        mask, bias: broadcastable to (batch, heads, max_seqlen_q, max_seqlen_k), by positions inside a sequence.
        dropout_p, seed: a weight is dropped where `attention` on a padded batch drops it.

    The other arguments are those of `attention`; causal, window and alibi_slopes count from the diagonal of each
    sequence, which ends at its last query and key.

    Returns:
        out (total_q, heads, head_dim_v); with `return_lse` (out, lse), lse (heads, total_q) float32. Rows past the last
        sequence give out 0, lse -inf and gradient 0.

    On a GPU cu_seqlens is not read back, so its contents are checked on the CPU only.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.

    >>> import torch, flashattn
    >>> q = k = v = torch.ones(7, 8, 64)
    >>> starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flashattn.attention_varlen(q, k, v, starts, starts, 4, 4, causal=True).shape
    torch.Size([7, 8, 64])
    """
    arguments.check_names("attention_varlen", options)
    q, k, v, bias = autocast.cast_attention_inputs(q, k, v, bias)
    for name, x in (("q", q), ("k", k), ("v", v)):
        arguments.check_floating(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must be (total, heads, head_dim), got shape {tuple(x.shape)}")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    _, heads, _, _ = arguments.check_shapes(q, k, v)
    max_seqlen_q = arguments.check_cu_seqlens("q", cu_seqlens_q, max_seqlen_q, q)
    max_seqlen_k = arguments.check_cu_seqlens("k", cu_seqlens_k, max_seqlen_k, k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must be as long as cu_seqlens_q, {cu_seqlens_q.shape[0]}, got {cu_seqlens_k.shape[0]}"
        )
    shape = (cu_seqlens_q.shape[0] - 1, heads, max_seqlen_q, max_seqlen_k)
    score = arguments.build_score(
        q, shape, causal=causal, bias=bias, dropout_p=dropout_p, seed=seed, **options
    )._replace(
        cu_seqlens=torch.stack((cu_seqlens_q, cu_seqlens_k)), max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k
    )
    backend = backends.choose(q.device, q.dtype, head_dim=max(q.shape[3], v.shape[3]))
    out, lse = ops.attention.attention(q, k, v, score, backend)
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


@overload
def decode(
    q: Tensor, cache: KVCache | PagedKVCache | PagedBatch, k: Tensor | None = ..., v: Tensor | None = ...,
    rotary: Rotary | None = ..., *, causal: bool = ..., bias: Tensor | None = ..., q_lengths: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ..., **options: Unpack[ScoreOptions],
) -> Tensor: ...  # fmt: skip
@overload
def decode(
    q: Tensor, cache: KVCache | PagedKVCache | PagedBatch, k: Tensor | None = ..., v: Tensor | None = ...,
    rotary: Rotary | None = ..., *, causal: bool = ..., bias: Tensor | None = ..., q_lengths: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True], **options: Unpack[ScoreOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def decode(
    q: Tensor, cache: KVCache | PagedKVCache | PagedBatch, k: Tensor | None = ..., v: Tensor | None = ...,
    rotary: Rotary | None = ..., *, causal: bool = ..., bias: Tensor | None = ..., q_lengths: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: bool = ..., **options: Unpack[ScoreOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@list_options
def decode(
    q: Tensor,
    cache: KVCache | PagedKVCache | PagedBatch,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary: Rotary | None = None,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
    q_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    **options: Unpack[ScoreOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """A decode step: append new keys and values to the cache, in place, and attend to all of it.

    The first call, with whole prompts, is a step like any other (prefill). Inference only: no dropout, no gradients. A
    step synchronises with the GPU only to read a q_lengths that is on it.

    Args:
        q: (batch, heads, seq_q, head_dim), in the cache's dtype and on its device. Under autocast q, k and v are cast
            to this dtype.
        cache: a `KVCache`, sequences of a `PagedKVCache` (`select`), or a `PagedKVCache` for all of its sequences.
        k: (batch, kv_heads, seq_q, head_dim) new keys; None appends nothing.
        v: (batch, kv_heads, seq_q, head_dim_v) new values.
        rotary: rotates q and k by their positions, counted from the beginning of each sequence.
        causal: a new token attends to itself and those before it; False: to all.
        q_lengths: (batch,) int: the number of new tokens of each row, where rows differ; the others are not appended,
            and give out 0 and lse -inf. Pass it on the CPU to avoid a synchronisation.
        mask, bias: broadcastable to (batch, heads, seq_q, seq_k), seq_k the longest length after appending.

    A graph of `torch.compile` advances the cache when it runs, with the lengths and pages of that time; except for
    `select`, a cache's own methods cannot be called inside a graph. A step that fails, out of memory or by an
    interrupt, leaves the cache's lengths as they were.

    window, alibi_slopes, softcap, sinks and scale are those of `attention`; the diagonal ends at the last new token and
    the last key of each sequence.

    Returns:
        out (batch, heads, seq_q, head_dim_v); with `return_lse` (out, lse), lse (batch, heads, seq_q) float32.
        The bits of a sequence's result depend neither on what else is in the batch nor on the cache's capacity or page
        size; a batch padded to another seq_q may be computed in another order.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written; a cache without room is one of them, and
            one in the capture of a CUDA graph: its lengths are Python's numbers, which a replay would not advance.
            `flashattn.compat.flash_attn.flash_attn_with_kvcache` can be captured.

    >>> import torch, flashattn
    >>> cache = flashattn.KVCache(batch=1, kv_heads=2, capacity=64, head_dim=32)
    >>> q, k, v = (torch.randn(1, heads, 10, 32) for heads in (4, 2, 2))
    >>> prompt = flashattn.decode(q, cache, k, v)
    >>> q, k, v = (torch.randn(1, heads, 1, 32) for heads in (4, 2, 2))
    >>> flashattn.decode(q, cache, k, v).shape
    torch.Size([1, 4, 1, 32])
    """
    arguments.check_names("decode", options)
    if not isinstance(cache, (KVCache, PagedKVCache, PagedBatch)):
        raise TypeError(f"cache must be a KVCache or a PagedKVCache, got {type(cache).__name__}")
    if isinstance(cache, PagedKVCache) and not tracing.is_traced():
        cache = cache.select(cache.sequences)
    if autocast.is_on(q):
        q, k, v = autocast.cast(cache.k.dtype, q, k, v)
    arguments.check_decode_inputs(q, cache, k, v, dropout_p)
    score = arguments.build_score(q, None, causal=causal, bias=bias, q_lengths=q_lengths, **options)
    arguments.refuse_gradients(q=q, k=k, v=v, bias=score.bias, alibi_slopes=score.alibi_slopes, sinks=score.sinks)
    backend = backends.choose(q.device, q.dtype, head_dim=max(q.shape[3], cache.v.shape[3]))
    out, lse = ops.decode.step(q, cache, k, v, rotary, score, backend)
    return (out, lse) if return_lse else out


def _nested(q, k, v, q_lengths, kv_lengths, refused: dict, options: dict) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of nested tensors (batch, heads, seq, head_dim), ragged along seq: packed sequences."""
    for name, x in refused.items():
        if x is not None:
            raise ValueError(f"{name} must be None where q is nested")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not nested.is_nested(x):
            raise ValueError(f"{name} must be nested as q, k or v is, got {type(x).__name__}")
    q, k, v = (x.transpose(1, 2) if x.dim() == 4 else x for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        nested.check_nested(name, x, 4, "(batch, heads, seq, head_dim), jagged along seq")
    for name, x in (("q_lengths", q_lengths), ("kv_lengths", kv_lengths)):
        if x is not None:
            raise ValueError(f"{name} must be None where q is nested, which has lengths of its own")
    tracing.refuse_capture(
        "q", "where its lengths are is read back; attention_varlen takes max_seqlen_q and max_seqlen_k"
    )
    (rows_q, starts_q), (rows_k, starts_k), (rows_v, starts_v) = map(nested.pack, (q, k, v))
    nested.check_same_lengths("v", starts_v, "k", starts_k)
    longest = map(nested.bound_longest, (rows_q, rows_k))
    result = attention_varlen(rows_q, rows_k, rows_v, starts_q.int(), starts_k.int(), *longest, **options)
    if isinstance(result, Tensor):
        return nested.unpack(result, starts_q, q.layout).transpose(1, 2)
    results = result[0], result[1].transpose(0, 1)
    out, lse = (nested.unpack(x, starts_q, q.layout).transpose(1, 2) for x in results)
    return out, lse
