"""The calls of the `flash_attn` package (FlashAttention-2's names, order and defaults) on flashattn's backends.

Layout (batch, seq, heads, head_dim), packed (total, heads, head_dim); `window_size` inclusive, -1 or None = unbounded;
causal aligned bottom-right; autocast changes nothing. Errors are RuntimeErrors, as the package's are, and each is a
ValueError or a TypeError too. Differences: any dtype and head_dim that flashattn supports; always deterministic;
`return_attn_probs` gives (out, softmax_lse, None) without the weights, which the package returns for its tests only;
the lse of a fully masked row is -inf.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from .. import arguments, autocast, backends, tracing
from ..attention import attention, attention_varlen
from ..cache import CacheView, Rotary
from ..errors import raise_as_torch
from ..ops.decode import append_and_attend, refuse_derivatives_and_onnx, rotate


@raise_as_torch
@autocast.disable
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """q (batch, seq_q, heads, head_dim), k and v (batch, seq_k, kv_heads, head_dim), kv_heads dividing heads.

    Returns:
        out (batch, seq_q, heads, head_dim); with return_attn_probs (out, softmax_lse, None), softmax_lse
        (batch, heads, seq_q) float32, natural logarithm.

    >>> import torch
    >>> from flashattn.compat.flash_attn import flash_attn_func
    >>> x = torch.ones(2, 5, 4, 8)
    >>> flash_attn_func(x, x, x, causal=True, window_size=(2, 0)).shape
    torch.Size([2, 5, 4, 8])
    """
    options = _build_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _attend(q, k, v, options, return_attn_probs)


@raise_as_torch
@autocast.disable
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of kv (batch, seq_k, 2, kv_heads, head_dim)."""
    k, v = _unpack("kv", kv, 2)
    options = _build_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _attend(q, k, v, options, return_attn_probs)


@raise_as_torch
@autocast.disable
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of qkv (batch, seq, 3, heads, head_dim)."""
    q, k, v = _unpack("qkv", qkv, 3)
    options = _build_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _attend(q, k, v, options, return_attn_probs)


@raise_as_torch
@autocast.disable
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Packed q (total_q, heads, head_dim), k and v (total_k, kv_heads, head_dim): `flashattn.attention_varlen`.

    With block_table (batch, n) int32, k and v are pages (pages, page_size, kv_heads, head_dim), which are gathered.

    Returns:
        out (total_q, heads, head_dim); with return_attn_probs (out, softmax_lse, None), softmax_lse (heads, total_q).

    >>> import torch
    >>> from flashattn.compat.flash_attn import flash_attn_varlen_func
    >>> x, starts = torch.ones(7, 4, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_func(x, x, x, starts, starts, 4, 4, causal=True).shape
    torch.Size([7, 4, 8])
    """
    if block_table is not None:
        k, v = _gather_pages(k, v, cu_seqlens_k, block_table)
    options = _build_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, return_attn_probs)


@raise_as_torch
@autocast.disable
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` of kv (total_k, 2, kv_heads, head_dim)."""
    k, v = _unpack("kv", kv, 2, ("total",))
    options = _build_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, return_attn_probs)


@raise_as_torch
@autocast.disable
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` of qkv (total, 3, heads, head_dim)."""
    q, k, v = _unpack("qkv", qkv, 3, ("total",))
    options = _build_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _attend_packed(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, options, return_attn_probs)


@raise_as_torch
@autocast.disable
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A decode step: append k and v to the cache after cache_seqlens tokens, in place, and attend from q to all tokens.

    Args:
        q: (batch, seq_q, heads, head_dim).
        k_cache, v_cache: (batch_cache, capacity, kv_heads, head_dim); with block_table pages (pages, page_size,
            kv_heads, head_dim).
        k, v: (batch, seq_new, kv_heads, head_dim), or None.
        rotary_cos, rotary_sin: (positions, n), n at most head_dim / 2. k is rotated by its positions; q too if causal
            or windowed, else every query by position cache_seqlens.
        cache_seqlens: (batch,) int32 or one int: the number of tokens in the cache; None: all of its capacity. A tensor
            on a GPU is read back, except in a CUDA graph and under torch.compile: there it is clamped, and each run
            reads it again. In these, on the CPU too, rotary_cos needs a row for each position of the capacity (and for
            queries past it, where there are more queries than new keys).
        cache_batch_idx: (batch,) int32: which row of the cache belongs to a row of q.
        cache_leftpad: (batch,) int32: the first token of a row of the cache.
        block_table: (batch, n) int32.
        num_splits: ignored; results do not depend on it.

    Returns:
        out (batch, seq_q, heads, head_dim); with return_softmax_lse (out, lse), lse (batch, heads, seq_q).

    >>> import torch
    >>> from flashattn.compat.flash_attn import flash_attn_with_kvcache
    >>> k_cache, v_cache = torch.zeros(2, 1, 16, 4, 8)
    >>> q = k = v = torch.ones(1, 1, 4, 8)
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3, causal=True).shape
    torch.Size([1, 1, 4, 8])
    """
    q, k_cache, v_cache, k, v = _read_tensors(q, k_cache, v_cache, k, v)
    (batch, heads, seq_q, head_dim), new = q.shape, 0 if k is None else k.shape[2]
    cached = _view_cache(q, k_cache, v_cache, new, cache_seqlens, cache_batch_idx, block_table)
    rotary = None
    if rotary_cos is not None:
        if k is None:
            raise ValueError("k must be given with rotary_cos: rotary positions are those of new tokens")
        if rotary_sin is None:
            raise ValueError("rotary_sin must be given with rotary_cos, got None")
        rotary = Rotary(rotary_cos, rotary_sin, rotary_interleaved)
        positions = cached.longest - new + max(seq_q, new)  # there may be more queries than new keys
        arguments.check_rotary(rotary, q, positions)
    mask = None if cache_leftpad is None else _mask_leftpad(cache_leftpad, cached)
    window = _read_window(window_size)
    score = arguments.build_score(
        q, (batch, heads, seq_q, cached.longest), scale=_read_scale(softmax_scale), causal=causal, window=window,
        mask=mask, alibi_slopes=alibi_slopes, softcap=_read_softcap(softcap),
    )._replace(kv_lengths=cached.lengths)  # fmt: skip
    backend = backends.choose(q.device, q.dtype, head_dim=max(head_dim, v_cache.shape[3]))
    refuse_derivatives_and_onnx(q, k_cache, v_cache, k, v, *(rotary or ()))
    if rotary is not None and k is not None and not causal and window == (None, None):
        q = _rotate_at_cache_end(q, cached.starts, rotary, backend)
        k = rotate(k, cached.starts, rotary, backend)
        rotary = None
    out, lse = append_and_attend(q, cached, k, v, rotary, score, backend)
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _build_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes) -> dict:
    """The package's options as those of `attention` and `attention_varlen`."""
    return dict(
        causal=causal, window=_read_window(window_size), alibi_slopes=alibi_slopes, softcap=_read_softcap(softcap),
        dropout_p=dropout_p, scale=_read_scale(softmax_scale), return_lse=True,
    )  # fmt: skip


def _attend(q, k, v, options: dict, return_attn_probs: bool) -> Tensor | tuple[Tensor, Tensor, None]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_4d(name, x)
    out, lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    out = out.transpose(1, 2).contiguous()
    return (out, lse, None) if return_attn_probs else out


def _attend_packed(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options: dict, return_attn_probs: bool
) -> Tensor | tuple[Tensor, Tensor, None]:
    longest = [
        x if x is None or not hasattr(x, "__index__") else _read_integer(x) for x in (max_seqlen_q, max_seqlen_k)
    ]
    out, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, **options)
    return (out, lse, None) if return_attn_probs else out


def _read_tensors(q, k_cache, v_cache, k, v) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors of `flash_attn_with_kvcache`, checked, as views (batch, heads, seq, head_dim)."""
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together, or neither")
    named = [("q", q), ("k_cache", k_cache), ("v_cache", v_cache)]
    named += [("k", k), ("v", v)] if k is not None else []
    for name, x in named:
        _check_4d(name, x)
        arguments.check_dtype(name, x, "q", q.dtype)
        arguments.check_device(name, x, "q", q.device)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient: decoding is inference; use torch.no_grad()")
    q, k_cache, v_cache = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    k, v = (None if x is None else x.transpose(1, 2) for x in (k, v))
    _check_sizes(q, k_cache, v_cache, k, v)
    return q, k_cache, v_cache, k, v


def _view_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, new: int, cache_seqlens, cache_batch_idx, block_table
) -> CacheView:
    """The cache with `new` more tokens in each row; with cache_batch_idx a row of it is one page."""
    batch, pages, page_size = q.shape[0], k_cache.shape[0], k_cache.shape[2]
    name, table = "block_table", block_table
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx must be None with block_table")
    elif cache_batch_idx is not None:
        arguments.check_tensor("cache_batch_idx", cache_batch_idx)
        if cache_batch_idx.dim() != 1:
            raise ValueError(f"cache_batch_idx must be (batch,) = ({batch},), got shape {tuple(cache_batch_idx.shape)}")
        name, table = "cache_batch_idx", cache_batch_idx[:, None]
    elif pages != batch:
        raise ValueError(f"k_cache must have q's batch {batch}, got {pages}")
    capacity = page_size
    if table is not None:
        capacity *= arguments.check_page_table(name, table, batch, q.device)
        table = table.contiguous()
    starts, longest = _read_lengths(cache_seqlens, batch, capacity, new, q.device)
    if longest > capacity:
        raise ValueError(f"k_cache must have room for {longest} tokens, got {capacity}")
    lengths = starts + new
    if table is not None:
        arguments.check_pages(name, table, pages, page_size, lengths)
    return CacheView(k_cache, v_cache, table, starts, lengths, longest)


def _mask_leftpad(leftpad, cached: CacheView) -> Tensor:
    """A mask of the tokens before leftpad, (batch, 1, 1, longest)."""
    batch, device = cached.starts.numel(), cached.k.device
    capacity = cached.k.shape[2] * (1 if cached.page_table is None else cached.page_table.shape[1])
    leftpad = arguments.check_lengths("cache_leftpad", leftpad, batch, capacity, device)
    return (torch.arange(cached.longest, device=device) >= leftpad[:, None])[:, None, None]


def _rotate_at_cache_end(q: Tensor, starts: Tensor, rotary: Rotary, backend: str) -> Tensor:
    """q with every query rotated by the position where the new tokens of its row begin."""
    batch, heads, seq_q, head_dim = q.shape
    each = q.transpose(1, 2).reshape(batch * seq_q, heads, 1, head_dim)
    each = rotate(each, starts.repeat_interleave(seq_q), rotary, backend)
    return each.view(batch, seq_q, heads, head_dim).transpose(1, 2)


def _read_lengths(
    cache_seqlens: int | Tensor | None, batch: int, capacity: int, new: int, device: torch.device
) -> tuple[Tensor, int]:
    """(lengths before the new tokens, (batch,) int32; the largest length with them)."""
    if cache_seqlens is None:
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int):
        if not 0 <= cache_seqlens <= capacity:
            raise ValueError(f"cache_seqlens must be between 0 and the capacity {capacity}, got {cache_seqlens}")
        return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=device), cache_seqlens + new
    starts = arguments.check_lengths("cache_seqlens", cache_seqlens, batch, capacity, device)
    if not tracing.has_data(cache_seqlens):  # the operator checks the values on the CPU
        return (starts.clamp(0, max(0, capacity - new)) if starts.is_cuda else starts), max(capacity, new)
    if tracing.is_capturing():
        return starts.clamp(0, max(0, capacity - new)), max(capacity, new)
    lengths = cache_seqlens.tolist()
    if min(lengths, default=0) < 0:
        raise ValueError(f"cache_seqlens must be between 0 and the capacity {capacity}, got {min(lengths)}")
    return starts, max(lengths, default=0) + new


def _check_sizes(q, k_cache, v_cache, k, v) -> None:
    """Check the sizes of views (batch, heads, seq, head_dim)."""
    (batch, heads, _, head_dim), (_, kv_heads, _, cache_dim) = q.shape, k_cache.shape
    if cache_dim != head_dim or kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"k_cache must have q's head_dim {head_dim} and a number of heads that divides {heads}, "
            f"got head_dim {cache_dim} and {kv_heads} heads"
        )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"v_cache must be as large as k_cache, {tuple(k_cache.shape)}, got {tuple(v_cache.shape)}")
    for name, x, kept in (("k", k, k_cache), ("v", v, v_cache)):
        if x is not None and (x.shape[:2] != (batch, kv_heads) or x.shape[3] != kept.shape[3]):
            raise ValueError(
                f"{name} must be (batch, seq, kv_heads, head_dim) = ({batch}, seq, {kv_heads}, {kept.shape[3]}), "
                f"got shape {tuple(x.transpose(1, 2).shape)}"
            )


def _gather_pages(k: Tensor, v: Tensor, cu_seqlens: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """The packed keys and values of pages (pages, page_size, kv_heads, head_dim)."""
    for name, x in (("k", k), ("v", v)):
        _check_4d(name, x)
    arguments.check_tensor("cu_seqlens_k", cu_seqlens)
    tracing.refuse_capture("block_table", "how many tokens it gathers is read back; flash_attn_with_kvcache can be")
    batch, page_size = cu_seqlens.numel() - 1, k.shape[1]
    arguments.check_page_table("block_table", block_table, batch, k.device)
    lengths = cu_seqlens.diff()
    arguments.check_pages("block_table", block_table, k.shape[0], page_size, lengths)
    row = torch.repeat_interleave(lengths)
    position = torch.arange(row.numel(), device=k.device) - cu_seqlens[row]
    page = block_table[row, position // page_size].long()
    return k[page, position % page_size], v[page, position % page_size]


def _check_4d(name: str, x) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor (batch, seq, heads, head_dim), got {got}")


def _unpack(name: str, x: Tensor, parts: int, leading: tuple[str, ...] = ("batch", "seq")) -> tuple[Tensor, ...]:
    """The tensors packed in the dimension after the leading ones, as views."""
    n = len(leading)
    if not isinstance(x, Tensor) or x.dim() != n + 3 or x.shape[n] != parts:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor ({', '.join(leading)}, {parts}, heads, head_dim), got {got}")
    return torch.unbind(x, n)


def _read_window(window_size) -> tuple[int | None, int | None]:
    try:
        left, right = (None if side is None else _read_integer(side) for side in window_size)
    except (TypeError, ValueError):
        raise TypeError(f"window_size must be (left, right), each an int or None, got {window_size!r}") from None
    if any(side is not None and side < -1 for side in (left, right)):
        raise ValueError(
            f"window_size must be (left, right) with each at least 0, or -1 for no limit, got {window_size}"
        )
    return None if left == -1 else left, None if right == -1 else right


def _read_softcap(softcap: float | None) -> float | None:
    if softcap is None or softcap == 0:
        return None
    if softcap < 0:
        raise ValueError(f"softcap must be at least 0, 0 for no cap, got {softcap}")
    return float(softcap)


def _read_integer(x):
    """x as an int; the package takes a tensor or an array of one element too."""
    return x if isinstance(x, (int, torch.SymInt)) else operator.index(x)


def _read_scale(softmax_scale):
    return float(softmax_scale) if isinstance(softmax_scale, Tensor) else softmax_scale
