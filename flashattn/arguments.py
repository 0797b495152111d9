"""The checks of attention's arguments. Each names the argument, what it got and what it takes, and returns what the
kernels read."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from . import checks, score_mod
from .score import Score


def modified(score: Score, whole: tuple[int, ...], device, mask, alibi_slopes, softcap, dropout_p, seed) -> Score:
    """The score with its checked modifications; `whole`: (batch, heads, seq_q, seq_k)."""
    return score._replace(
        softcap=None if softcap is None else check_softcap(softcap),
        slopes=None if alibi_slopes is None else check_slopes(alibi_slopes, whole, device),
        mask=None if mask is None else check_mask(mask, whole, device),
        dropout_p=checks.probability("dropout_p", dropout_p),
        seed=checks.seed(seed, device) if dropout_p > 0 else None,
    )


def with_callables(score: Score, mod, block_mask, whole: tuple[int, ...], device: torch.device) -> Score:
    """The score with its traced callables; `whole`: (batch, heads, seq_q, seq_k)."""
    if mod is not None:
        mod = score_mod.on("score_mod", mod, 1, device)
    if block_mask is not None:
        block_mask = score_mod.read_block_mask(block_mask, *whole, device)
    return score._replace(score_mod=mod, block_mask=block_mask)


def longest_of(side: str, cu_seqlens, max_seqlen: int | None, x: Tensor) -> int:
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
    has_data = checks.has_data(cu_seqlens)
    if not has_data or (cu_seqlens.is_cuda and (max_seqlen is not None or checks.is_capturing())):
        if max_seqlen is None:
            where = "in a CUDA graph" if has_data else f"under torch.compile and where {name} has no data"
            raise ValueError(f"max_seqlen_{side} must be given {where}, got None")
        return max_seqlen
    starts, total = cu_seqlens.tolist(), x.shape[2]
    steps = [b - a for a, b in itertools.pairwise(starts)]
    if starts[0] != 0 or min(steps) < 0 or starts[-1] > total:
        raise ValueError(
            f"{name} must begin with 0, never fall and end at most at {side}'s {total} rows, got {shortened(starts)}"
        )
    if max_seqlen is None:
        return max(steps)
    if max_seqlen < max(steps):
        raise ValueError(f"max_seqlen_{side} must be at least the longest sequence's {max(steps)}, got {max_seqlen}")
    return max_seqlen


def shortened(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:8]))}, ...]"


def check_shapes(q, k, v) -> tuple[int, int, int, int, int]:
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


def check_scale(scale) -> float:
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a float, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


# No sequence is as long. Positions are 32-bit in the kernels, and a window is added to the difference of two.
MAX_WINDOW = 2**29


def check_window(window) -> tuple[int | None, int | None]:
    """The window as the kernels read it: a side larger than any sequence means as much as one that is open."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(f"window must be (left, right), each an int or None, got {window!r}") from None
    for side in (left, right):
        if side is not None and (not isinstance(side, int) or isinstance(side, bool)):
            raise TypeError(f"window must be (left, right), each an int or None, got {window!r}")
        if side is not None and side < 0:
            raise ValueError(f"window must be (left, right) with each at least 0, or None for no limit, got {window!r}")
    return tuple(None if side is None else min(side, MAX_WINDOW) for side in (left, right))


def check_lengths(name: str, lengths, batch: int, seq: int, device: torch.device) -> Tensor:
    """Lengths as the kernels read them: contiguous int32 on q's device."""
    checks.tensor(name, lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"{name} must be (batch,) = ({batch},), got shape {tuple(lengths.shape)}")
    if lengths.device != device and not checks.is_traced():
        checks.refuse_capture(name, f"it must be on {device}, as what a replay reads anew is; got {lengths.device}")
    if lengths.device.type == "cpu" and batch > 0 and checks.has_data(lengths):
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > seq:
            raise ValueError(f"{name} must be between 0 and the sequence length {seq}, got {low if low < 0 else high}")
    if lengths.dtype == torch.int64 and lengths.device.type != "cpu":
        lengths = lengths.clamp(0, seq)  # not read back, so not checked; the low half of one may be a length again
    # To a GPU, and only to it, without a wait: the copy out of pageable memory is done with it when it returns.
    return lengths.to(device=device, dtype=torch.int32, non_blocking=device.type == "cuda").contiguous()


def check_softcap(softcap) -> float:
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool):
        raise TypeError(f"softcap must be a float, got {type(softcap).__name__}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be above 0 and finite, or None for no cap, got {softcap}")
    return float(softcap)


def check_slopes(slopes, whole: tuple[int, ...], device: torch.device) -> Tensor:
    """Slopes as the kernels read them: contiguous (batch or 1, heads)."""
    checks.tensor("alibi_slopes", slopes)
    if slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be float32, got {slopes.dtype}")
    checks.on_device("alibi_slopes", slopes, "q", device)
    checks.refuse_tangents(slopes)
    batch, heads = whole[:2]
    if slopes.shape != (heads,) and slopes.shape != (batch, heads):  # `in` does not compare symbols
        raise ValueError(
            f"alibi_slopes must be (heads,) = ({heads},) or (batch, heads) = {(batch, heads)}, "
            f"got shape {tuple(slopes.shape)}"
        )
    return slopes.detach().contiguous().view(-1, heads)


def four_dimensions(name: str, x: Tensor, whole: tuple[int, ...], device: torch.device) -> Tensor:
    """x as (batch, heads, seq_q, seq_k), each as it is or 1, the last contiguous."""
    checks.refuse_own_operations(name, x)
    checks.on_device(name, x, "q", device)
    shape = (*[1] * (4 - x.dim()), *x.shape)
    if len(shape) != 4 or any(size != 1 and size != full for size, full in zip(shape, whole, strict=True)):
        raise ValueError(
            f"{name} must be broadcastable to (batch, heads, seq_q, seq_k) = {whole}, got shape {tuple(x.shape)}"
        )
    x = x[(None,) * (4 - x.dim())]
    return x if x.stride(3) in (0, 1) or x.shape[3] == 1 else x.contiguous()


def check_mask(mask, whole: tuple[int, ...], device: torch.device) -> Tensor:
    checks.tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = attend), got {mask.dtype}; what is added to scores is a bias")
    return four_dimensions("mask", mask, whole, device)


def check_bias(bias, q: Tensor, whole: tuple[int, ...]) -> Tensor:
    checks.floating("bias", bias)
    if bias.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"bias must be {q.dtype}, as q, or float32, got {bias.dtype}")
    return four_dimensions("bias", bias, whole, q.device)


def check_sinks(sinks, q: Tensor) -> None:
    checks.floating("sinks", sinks)
    checks.same_device("sinks", sinks, "q", q)
    if sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be (heads,) = ({q.shape[1]},), got shape {tuple(sinks.shape)}")


def check_page_table(name: str, table, batch: int, device: torch.device) -> int:
    """How many pages a row of a page table (batch, n) has."""
    checks.tensor(name, table)
    if table.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {table.dtype}")
    if table.dim() != 2 or table.shape[0] != batch:
        raise ValueError(f"{name} must be (batch, n) = ({batch}, n), got shape {tuple(table.shape)}")
    checks.on_device(name, table, "q", device)
    return table.shape[1]


def check_pages(name: str, table: Tensor, pages: int, page_size: int, lengths: Tensor) -> None:
    """That each row's first pages, which its length needs, lie in the cache. On a GPU they are not read back."""
    if table.is_cuda or not checks.has_data(table):
        return
    for row, length in zip(table.tolist(), lengths.tolist(), strict=True):
        for page in row[: -(-length // page_size)]:
            if not 0 <= page < pages:
                raise ValueError(f"{name} must point at pages 0 to {pages - 1} of the cache, got {page}")
