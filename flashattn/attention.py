"""`attention` and `attention_varlen`: check the arguments, build the call."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from . import backends, checks, ops
from .score import Score


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
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
        scale: multiplies q.k; head_dim ** -0.5 by default.
        return_lse: also return the logarithm of each softmax denominator.

    Returns:
        out (batch, heads, seq_q, head_dim_v) in q's dtype; with `return_lse` (out, lse), lse (batch, heads, seq_q)
        float32, natural logarithm. Gradients flow through both. A query with nothing to attend to gives out 0,
        lse -inf and gradient 0.

    Strides are honoured: a transposed or sliced view is not copied (a last dimension that is not contiguous is, once).
    Lengths on the CPU are checked against the sequence; on a GPU they are clamped, to save a synchronisation.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.

    >>> import torch, flashattn
    >>> q = k = v = torch.ones(1, 8, 5, 64)
    >>> flashattn.attention(q, k, v, causal=True).shape
    torch.Size([1, 8, 5, 64])
    """
    plain = type(q) is type(k) is type(v) is Tensor
    if not plain and any(isinstance(x, Tensor) and x.is_nested for x in (q, k, v)):
        return _nested(
            q, k, v, q_lengths, kv_lengths, return_lse, causal=causal, window=window, mask=mask, bias=bias,
            alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=dropout_p, seed=seed, scale=scale,
        )  # fmt: skip
    batch, seq_q, seq_k, head_dim, head_dim_v = _check(q, k, v)
    left, right = (None, None) if window is None else _window(window)
    score = Score(
        head_dim**-0.5 if scale is None else _scale(scale),
        left,
        0 if causal else right,
        None if q_lengths is None else _lengths("q_lengths", q_lengths, batch, seq_q, q.device),
        None if kv_lengths is None else _lengths("kv_lengths", kv_lengths, batch, seq_k, q.device),
    )
    if mask is not None or alibi_slopes is not None or softcap is not None or dropout_p != 0:
        whole = (*q.shape[:3], seq_k)
        score = _modified(score, whole, q.device, mask, alibi_slopes, softcap, dropout_p, seed)
    if bias is not None:
        bias = _bias(bias, q, (*q.shape[:3], seq_k))
    if sinks is not None:
        _check_sinks(sinks, q)
    widest = head_dim if head_dim > head_dim_v else head_dim_v
    backend = backends.choose(q.device, q.dtype, head_dim=widest)
    out, lse = ops.attention(q, k, v, bias, sinks, score, backend)
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
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length; None finds it (on a GPU that waits for it).
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
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must be (total, heads, head_dim), got shape {tuple(x.shape)}")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    _, _, _, head_dim, head_dim_v = _check(q, k, v)
    max_seqlen_q = _sequences("q", cu_seqlens_q, max_seqlen_q, q)
    max_seqlen_k = _sequences("k", cu_seqlens_k, max_seqlen_k, k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must be as long as cu_seqlens_q, {cu_seqlens_q.shape[0]}, got {cu_seqlens_k.shape[0]}"
        )
    left, right = (None, None) if window is None else _window(window)
    score = Score(
        head_dim**-0.5 if scale is None else _scale(scale),
        left,
        0 if causal else right,
        cu_seqlens=torch.stack((cu_seqlens_q, cu_seqlens_k)),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    whole = (cu_seqlens_q.shape[0] - 1, q.shape[1], max_seqlen_q, max_seqlen_k)
    score = _modified(score, whole, q.device, mask, alibi_slopes, softcap, dropout_p, seed)
    if bias is not None:
        bias = _bias(bias, q, whole)
    if sinks is not None:
        _check_sinks(sinks, q)
    backend = backends.choose(q.device, q.dtype, head_dim=max(head_dim, head_dim_v))
    out, lse = ops.attention(q, k, v, bias, sinks, score, backend)
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def _nested(q, k, v, q_lengths, kv_lengths, return_lse, **options):
    """`attention` of nested tensors (batch, heads, seq, head_dim), jagged along seq: packed sequences."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, x)
        jagged = x.is_nested and x.layout == torch.jagged and x.dim() == 4
        if not jagged or x.transpose(1, 2)._ragged_idx != 1:
            raise ValueError(
                f"{name} must be nested like q, k or v is: (batch, heads, seq, head_dim), jagged along seq"
            )
    for name, x in (("q_lengths", q_lengths), ("kv_lengths", kv_lengths)):
        if x is not None:
            raise ValueError(f"{name} must be None where q is nested, which has lengths of its own")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    starts_q, starts_k = q.offsets(), k.offsets()
    out = attention_varlen(
        q.values(), k.values(), v.values(), starts_q.int(), starts_k.int(), return_lse=return_lse, **options
    )
    results = [torch.nested.nested_tensor_from_jagged(out[0] if return_lse else out, starts_q).transpose(1, 2)]
    if not return_lse:
        return results[0]
    lse = torch.nested.nested_tensor_from_jagged(out[1].transpose(0, 1), starts_q)
    return results[0], lse.transpose(1, 2)


def _modified(score: Score, whole: tuple[int, ...], device, mask, alibi_slopes, softcap, dropout_p, seed) -> Score:
    """The score with its checked modifications; `whole`: (batch, heads, seq_q, seq_k)."""
    return score._replace(
        softcap=None if softcap is None else _softcap(softcap),
        slopes=None if alibi_slopes is None else _slopes(alibi_slopes, whole, device),
        mask=None if mask is None else _mask(mask, whole, device),
        dropout_p=checks.probability("dropout_p", dropout_p),
        seed=checks.seed(seed, device) if dropout_p > 0 else None,
    )


def _sequences(side: str, cu_seqlens, max_seqlen: int | None, x: Tensor) -> int:
    """The longest length that (batch + 1,) starts and ends of sequences in x may have."""
    name = f"cu_seqlens_{side}"
    checks.tensor(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must be (batch + 1,), got shape {tuple(cu_seqlens.shape)}")
    checks.same_device(name, cu_seqlens, "q", x)
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt))):
        raise TypeError(f"max_seqlen_{side} must be an int or None, got {type(max_seqlen).__name__}")
    if torch.compiler.is_compiling() or (cu_seqlens.is_cuda and max_seqlen is not None):
        if max_seqlen is None:
            raise ValueError(f"max_seqlen_{side} must be given under torch.compile, got None")
        return max_seqlen
    starts, total = cu_seqlens.tolist(), x.shape[2]
    steps = [b - a for a, b in itertools.pairwise(starts)]
    if starts[0] != 0 or min(steps) < 0 or starts[-1] > total:
        raise ValueError(
            f"{name} must begin with 0, never fall and end at most at {side}'s {total} rows, got {_shortened(starts)}"
        )
    if max_seqlen is None:
        return max(steps)
    if max_seqlen < max(steps):
        raise ValueError(f"max_seqlen_{side} must be at least the longest sequence's {max(steps)}, got {max_seqlen}")
    return max_seqlen


def _shortened(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:8]))}, ...]"


def _check(q, k, v) -> tuple[int, int, int, int, int]:
    """(batch, seq_q, seq_k, head_dim, head_dim_v) of arguments that fit each other."""
    # One test where nothing is wrong, for its microseconds; which argument is wrong is found out only then.
    plain = type(q) is type(k) is type(v) is Tensor and q.dim() == k.dim() == v.dim() == 4
    if not (plain and k.dtype == v.dtype == q.dtype in checks.DTYPES and k.device == v.device == q.device):
        for name, x in (("q", q), ("k", k), ("v", v)):
            checks.floating(name, x)
            if x.dim() != 4:
                raise ValueError(f"{name} must be (batch, heads, seq, head_dim), got shape {tuple(x.shape)}")
            checks.same_dtype(name, x, "q", q)
            checks.same_device(name, x, "q", q)
    batch, heads, seq_q, head_dim = q.shape
    k_batch, kv_heads, seq_k, k_head_dim = k.shape
    v_batch, v_heads, v_seq, head_dim_v = v.shape
    if not k_batch == v_batch == batch:
        name, got = ("k", k_batch) if k_batch != batch else ("v", v_batch)
        raise ValueError(f"{name} must have q's batch {batch}, got {got}")
    if heads * head_dim == 0 or kv_heads * k_head_dim == 0 or v_heads * head_dim_v == 0:
        name, x = next((n, x) for n, x in (("q", q), ("k", k), ("v", v)) if x.shape[1] * x.shape[3] == 0)
        raise ValueError(f"{name} must have at least one head and head_dim 1, got shape {tuple(x.shape)}")
    if k_head_dim != head_dim:
        raise ValueError(f"k must have q's head_dim {head_dim}, got {k_head_dim}")
    if v_heads != kv_heads or v_seq != seq_k:
        raise ValueError(f"v must have k's (kv_heads, seq_k) {(kv_heads, seq_k)}, got {(v_heads, v_seq)}")
    if heads % kv_heads != 0:
        raise ValueError(f"k must have a number of heads that divides q's {heads}, got {kv_heads}")
    return batch, seq_q, seq_k, head_dim, head_dim_v


def _scale(scale) -> float:
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a float, got {type(scale).__name__}")
    return float(scale)


def _window(window) -> tuple[int | None, int | None]:
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(f"window must be (left, right), each an int or None, got {window!r}") from None
    for side in (left, right):
        if side is not None and (not isinstance(side, int) or isinstance(side, bool)):
            raise TypeError(f"window must be (left, right), each an int or None, got {window!r}")
        if side is not None and side < 0:
            raise ValueError(f"window must be (left, right) with each at least 0, or None for no limit, got {window!r}")
    return left, right


def _lengths(name: str, lengths, batch: int, seq: int, device: torch.device) -> Tensor:
    """Lengths as the kernels read them: contiguous int32 on q's device."""
    checks.tensor(name, lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"{name} must be (batch,) = ({batch},), got shape {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > seq:
            raise ValueError(f"{name} must be between 0 and the sequence length {seq}, got {low if low < 0 else high}")
    return lengths.to(device=device, dtype=torch.int32).contiguous()


def _softcap(softcap) -> float:
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool):
        raise TypeError(f"softcap must be a float, got {type(softcap).__name__}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be above 0 and finite, or None for no cap, got {softcap}")
    return float(softcap)


def _slopes(slopes, whole: tuple[int, ...], device: torch.device) -> Tensor:
    """Slopes as the kernels read them: contiguous (batch or 1, heads)."""
    checks.tensor("alibi_slopes", slopes)
    if slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be float32, got {slopes.dtype}")
    checks.on_device("alibi_slopes", slopes, "q", device)
    batch, heads = whole[:2]
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must be (heads,) = ({heads},) or (batch, heads) = {(batch, heads)}, "
            f"got shape {tuple(slopes.shape)}"
        )
    return slopes.detach().contiguous().view(-1, heads)


def _four_dimensions(name: str, x: Tensor, whole: tuple[int, ...], device: torch.device) -> Tensor:
    """x as (batch, heads, seq_q, seq_k), each as it is or 1, the last contiguous."""
    checks.on_device(name, x, "q", device)
    shape = (*[1] * (4 - x.dim()), *x.shape)
    if len(shape) != 4 or any(size not in (1, full) for size, full in zip(shape, whole, strict=True)):
        raise ValueError(
            f"{name} must be broadcastable to (batch, heads, seq_q, seq_k) = {whole}, got shape {tuple(x.shape)}"
        )
    x = x[(None,) * (4 - x.dim())]
    return x if x.stride(3) in (0, 1) or x.shape[3] == 1 else x.contiguous()


def _mask(mask, whole: tuple[int, ...], device: torch.device) -> Tensor:
    checks.tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = attend), got {mask.dtype}; what is added to scores is a bias")
    return _four_dimensions("mask", mask, whole, device)


def _bias(bias, q: Tensor, whole: tuple[int, ...]) -> Tensor:
    checks.floating("bias", bias)
    if bias.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"bias must be {q.dtype}, as q, or float32, got {bias.dtype}")
    return _four_dimensions("bias", bias, whole, q.device)


def _check_sinks(sinks, q: Tensor) -> None:
    checks.floating("sinks", sinks)
    checks.same_device("sinks", sinks, "q", q)
    if sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be (heads,) = ({q.shape[1]},), got shape {tuple(sinks.shape)}")
