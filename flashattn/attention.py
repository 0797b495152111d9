"""`attention` and `attention_varlen`: check the arguments, build the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import arguments, autocast, backends, checks, flex, nested, ops
from .auxiliary import AuxOutput, AuxRequest, auxiliary, read_request
from .score import Score

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    score_mod: Callable | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Exact softmax attention: out = softmax(scale * q k^T) v, in memory linear in the sequence length.

    Args:
        q: (batch, heads, seq_q, head_dim); float32, bfloat16 or float16 (float64 on the reference backend).
        k: (batch, kv_heads, seq_k, head_dim); kv_heads divides heads, and query head h reads key/value head
            h // (heads // kv_heads).
        v: (batch, kv_heads, seq_k, head_dim_v).
        causal: query i sees keys j <= i + seq_k - seq_q (aligned bottom-right).
        window: (left, right): query i sees keys from i - left to i + right inclusive, counted from the same diagonal;
            None on a side leaves it open. With causal, right is 0.
        mask: bool, broadcastable to (batch, heads, seq_q, seq_k): True = attend. Broadcast dimensions are not expanded.
        bias: floating, broadcastable likewise, added to the scaled scores; gets a gradient.
        alibi_slopes: (heads,) or (batch, heads) float32: -slope * |i + seq_k - seq_q - j| is added to the scores. No
            gradient.
        softcap: the scaled scores become softcap * tanh(score / softcap), before bias, slopes and masks.
        sinks: (heads,): a learned logit that joins the softmax denominator only; gets a gradient.
        kv_lengths: (batch,) integers: keys at or past the length are masked, and never read.
        q_lengths: (batch,) integers: queries at or past the length attend to nothing.
        dropout_p: probability in [0, 1) that a weight is dropped; those kept are divided by 1 - dropout_p.
        seed: int, or an int64 tensor of one element on q's device. The same seed drops the same weights on every
            backend, forward and backward; None draws one from PyTorch's generator.
        score_mod: (score, batch, head, q_idx, kv_idx) -> score, of FlexAttention: a function of one score, behind bias
            and slopes and before masks. Tensors that it captures get gradients.
        block_mask: of `torch.nn.attention.flex_attention.create_block_mask`; its blocks without a pair that attends are
            never looked at.
        scale: multiplies q.k; head_dim ** -0.5 by default.
        return_lse: also return the logarithm of each softmax denominator.
        return_aux: a `flashattn.AuxRequest`: also return what it asks for, as a `flashattn.AuxOutput`.

    Returns:
        out (batch, heads, seq_q, head_dim_v) in q's dtype; with `return_lse` (out, lse), lse (batch, heads, seq_q)
        float32, natural logarithm; with `return_aux` (out, aux). Gradients flow through out and lse. A query with
        nothing to attend to gives out 0, lse -inf and gradient 0.

    Under autocast q, k, v and bias are cast to its dtype, as PyTorch's own attention does.

    Strides are honoured: a transposed or sliced view is not copied (a last dimension that is not contiguous is, once).
    Lengths on the CPU are checked against the sequence; on a GPU they are clamped, to save a synchronisation.

    On NVIDIA GPUs float32 is multiplied as `torch.set_float32_matmul_precision` says: "highest" without tensor cores,
    "high" (up to head_dim 128) by three products of TF32, "medium" by one; a backward by the setting of its own time.

    Weights sum to one however large the scores are, with -1e9 or the least float as a mask too. On a GPU, where nothing
    but scale and masks changes the scores of 16-bit tensors, results are NaN beyond 4e7, and gradients beyond 4e4.

    On a GPU nothing waits for it, and a CUDA graph can capture it, forward and backward, after a first call, which
    compiles: with tensors that are all on the GPU, lengths too. In a replay an int for a seed drops the same weights
    again, None others. Gradients of what a score_mod captured cannot be captured, nor without the triton backend
    (float64, a head_dim over 256) callables and packed sequences: a ValueError says so.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.
        IndexError: where a pair that attends points outside of what a score_mod captured (on a GPU, which cannot raise,
            a floating tensor reads as NaN there and others as 0).
        NotImplementedError: in forward mode (`torch.func.jvp`, dual tensors), whose derivatives are not there.

    >>> import torch, flashattn
    >>> q = k = v = torch.ones(1, 8, 5, 64)
    >>> flashattn.attention(q, k, v, causal=True).shape
    torch.Size([1, 8, 5, 64])
    """
    q, k, v, bias = autocast.attention_inputs(q, k, v, bias)
    plain = type(q) is type(k) is type(v) is Tensor
    if q.is_nested or k.is_nested or v.is_nested if plain else any(map(nested.is_nested, (q, k, v))):
        for name, x in (("score_mod", score_mod), ("block_mask", block_mask), ("return_aux", return_aux)):
            if x is not None:
                raise ValueError(f"{name} must be None where q is nested")
        return _nested(
            q, k, v, q_lengths, kv_lengths, return_lse, causal=causal, window=window, mask=mask, bias=bias,
            alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=dropout_p, seed=seed, scale=scale,
        )  # fmt: skip
    request = None if return_aux is None else read_request(return_aux, return_lse)
    batch, seq_q, seq_k, head_dim, head_dim_v = arguments.check_shapes(q, k, v)
    left, right = (None, None) if window is None else arguments.check_window(window)
    score = Score(
        head_dim**-0.5 if scale is None else arguments.check_scale(scale),
        left,
        0 if causal else right,
        None if q_lengths is None else arguments.check_lengths("q_lengths", q_lengths, batch, seq_q, q.device),
        None if kv_lengths is None else arguments.check_lengths("kv_lengths", kv_lengths, batch, seq_k, q.device),
    )
    if mask is not None or alibi_slopes is not None or softcap is not None or dropout_p != 0:
        whole = (*q.shape[:3], seq_k)
        score = arguments.modified(score, whole, q.device, mask, alibi_slopes, softcap, dropout_p, seed)
    if bias is not None:
        bias = arguments.check_bias(bias, q, (*q.shape[:3], seq_k))
    if sinks is not None:
        arguments.check_sinks(sinks, q)
    widest = head_dim if head_dim > head_dim_v else head_dim_v
    backend = backends.choose(q.device, q.dtype, head_dim=widest)
    if score_mod is None and block_mask is None:
        out, lse, _ = ops.attention(q, k, v, bias, sinks, score, backend)
    else:
        score = arguments.with_callables(score, score_mod, block_mask, (*q.shape[:3], seq_k), q.device)
        out, lse = flex.attention(q, k, v, bias, sinks, score, backend)
    if request is not None:
        return out, auxiliary(request, q, k, lse, ops.whole(score, bias, sinks))
    return (out, lse) if return_lse else out


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
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of sequences of different lengths, packed one behind the other without padding.

    Args:
        q: (total_q, heads, head_dim): the queries of sequence b are rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1].
        k: (total_k, kv_heads, head_dim), likewise by cu_seqlens_k.
        v: (total_k, kv_heads, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, from 0, never falling. A sequence may be empty.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length; None finds it (on a GPU that waits for it;
            in a CUDA graph it must be given).
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
    q, k, v, bias = autocast.attention_inputs(q, k, v, bias)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must be (total, heads, head_dim), got shape {tuple(x.shape)}")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    _, _, _, head_dim, head_dim_v = arguments.check_shapes(q, k, v)
    max_seqlen_q = arguments.longest_of("q", cu_seqlens_q, max_seqlen_q, q)
    max_seqlen_k = arguments.longest_of("k", cu_seqlens_k, max_seqlen_k, k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must be as long as cu_seqlens_q, {cu_seqlens_q.shape[0]}, got {cu_seqlens_k.shape[0]}"
        )
    left, right = (None, None) if window is None else arguments.check_window(window)
    score = Score(
        head_dim**-0.5 if scale is None else arguments.check_scale(scale),
        left,
        0 if causal else right,
        cu_seqlens=torch.stack((cu_seqlens_q, cu_seqlens_k)),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    whole = (cu_seqlens_q.shape[0] - 1, q.shape[1], max_seqlen_q, max_seqlen_k)
    score = arguments.modified(score, whole, q.device, mask, alibi_slopes, softcap, dropout_p, seed)
    if bias is not None:
        bias = arguments.check_bias(bias, q, whole)
    if sinks is not None:
        arguments.check_sinks(sinks, q)
    backend = backends.choose(q.device, q.dtype, head_dim=max(head_dim, head_dim_v))
    out, lse, _ = ops.attention(q, k, v, bias, sinks, score, backend)
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def _nested(q, k, v, q_lengths, kv_lengths, return_lse, **options):
    """`attention` of nested tensors (batch, heads, seq, head_dim), ragged along seq: packed sequences."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not nested.is_nested(x):
            raise ValueError(f"{name} must be nested as q, k or v is, got {type(x).__name__}")
    q, k, v = (x.transpose(1, 2) if x.dim() == 4 else x for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        nested.check(name, x, 4, "(batch, heads, seq, head_dim), jagged along seq")
    for name, x in (("q_lengths", q_lengths), ("kv_lengths", kv_lengths)):
        if x is not None:
            raise ValueError(f"{name} must be None where q is nested, which has lengths of its own")
    checks.refuse_capture(
        "q", "where its lengths are is read back; attention_varlen takes max_seqlen_q and max_seqlen_k"
    )
    (rows_q, starts_q), (rows_k, starts_k), (rows_v, starts_v) = map(nested.pack, (q, k, v))
    nested.check_same("v", starts_v, "k", starts_k)
    longest = map(nested.longest, (rows_q, rows_k))
    out = attention_varlen(
        rows_q, rows_k, rows_v, starts_q.int(), starts_k.int(), *longest, return_lse=return_lse, **options
    )
    if not return_lse:
        return nested.unpack(out, starts_q, q.layout).transpose(1, 2)
    results = out[0], out[1].transpose(0, 1)
    return tuple(nested.unpack(x, starts_q, q.layout).transpose(1, 2) for x in results)
