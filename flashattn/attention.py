"""`attention`: check the arguments, build the call."""

from __future__ import annotations

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
        score = score._replace(
            softcap=None if softcap is None else _softcap(softcap),
            slopes=None if alibi_slopes is None else _slopes(alibi_slopes, q),
            mask=None if mask is None else _mask(mask, q, seq_k),
            dropout_p=checks.probability("dropout_p", dropout_p),
            seed=checks.seed(seed, q.device) if dropout_p > 0 else None,
        )
    if bias is not None:
        bias = _bias(bias, q, seq_k)
    if sinks is not None:
        _check_sinks(sinks, q)
    widest = head_dim if head_dim > head_dim_v else head_dim_v
    backend = backends.choose(q.device, q.dtype, head_dim=widest)
    out, lse = ops.attention(q, k, v, bias, sinks, score, backend)
    return (out, lse) if return_lse else out


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


def _slopes(slopes, q: Tensor) -> Tensor:
    """Slopes as the kernels read them: contiguous (batch or 1, heads)."""
    checks.tensor("alibi_slopes", slopes)
    if slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be float32, got {slopes.dtype}")
    checks.same_device("alibi_slopes", slopes, "q", q)
    batch, heads = q.shape[:2]
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must be (heads,) = ({heads},) or (batch, heads) = {(batch, heads)}, "
            f"got shape {tuple(slopes.shape)}"
        )
    return slopes.detach().contiguous().view(-1, heads)


def _four_dimensions(name: str, x: Tensor, q: Tensor, seq_k: int) -> Tensor:
    """x as (batch, heads, seq_q, seq_k), each as it is or 1, the last contiguous."""
    checks.same_device(name, x, "q", q)
    whole = (*q.shape[:3], seq_k)
    shape = (*[1] * (4 - x.dim()), *x.shape)
    if len(shape) != 4 or any(size not in (1, full) for size, full in zip(shape, whole, strict=True)):
        raise ValueError(
            f"{name} must be broadcastable to (batch, heads, seq_q, seq_k) = {whole}, got shape {tuple(x.shape)}"
        )
    x = x[(None,) * (4 - x.dim())]
    return x if x.stride(3) in (0, 1) or x.shape[3] == 1 else x.contiguous()


def _mask(mask, q: Tensor, seq_k: int) -> Tensor:
    checks.tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = attend), got {mask.dtype}; what is added to scores is a bias")
    return _four_dimensions("mask", mask, q, seq_k)


def _bias(bias, q: Tensor, seq_k: int) -> Tensor:
    checks.floating("bias", bias)
    if bias.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"bias must be {q.dtype}, as q, or float32, got {bias.dtype}")
    return _four_dimensions("bias", bias, q, seq_k)


def _check_sinks(sinks, q: Tensor) -> None:
    checks.floating("sinks", sinks)
    checks.same_device("sinks", sinks, "q", q)
    if sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be (heads,) = ({q.shape[1]},), got shape {tuple(sinks.shape)}")
