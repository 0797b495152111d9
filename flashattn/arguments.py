"""The checks of arguments. Each names the argument, what it got and what it takes, and returns what the kernels read.
`build_score` is the one place where a `Score` is made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import score_mod as mods
from . import tracing
from .cache import KVCache, PagedBatch, Rotary
from .score import Score, ScoreOptions

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def build_score(
    q: Tensor, shape: tuple[int, int, int, int] | None, *, scale: float | None = None, causal: bool = False,
    window=None, dropout_p: float = 0.0, seed=None, **fields,
) -> Score:  # fmt: skip
    """The checked `Score` of a call's options. `shape`: (batch, heads, seq_q, seq_k), of packed sequences their number
    and the longest lengths; None where it is not known yet, for `check_score` to check the other fields then."""
    left, right = (None, None) if window is None else check_window(window)
    if shape is not None:
        fields = check_fields(fields, q, shape)
    if dropout_p != 0:
        fields |= dict(dropout_p=check_probability("dropout_p", dropout_p), seed=make_seed(seed, q.device))
    return Score(q.shape[3] ** -0.5 if scale is None else check_scale(scale), left, 0 if causal else right, **fields)


# The checks of the other fields, and what the kernels read then: (value, q, shape) -> value.
CHECKS: dict[str, Callable[[object, Tensor, tuple[int, int, int, int]], object]] = {
    "q_lengths": lambda x, q, shape: check_lengths("q_lengths", x, shape[0], shape[2], q.device),
    "kv_lengths": lambda x, q, shape: check_lengths("kv_lengths", x, shape[0], shape[3], q.device),
    "softcap": lambda x, q, shape: check_softcap(x),
    "alibi_slopes": lambda x, q, shape: check_alibi_slopes(x, shape, q.device),
    "mask": lambda x, q, shape: check_mask(x, shape, q.device),
    "bias": lambda x, q, shape: check_bias(x, q, shape),
    "sinks": lambda x, q, shape: check_sinks(x, q),
    "score_mod": lambda x, q, shape: mods.trace_for("score_mod", x, 1, q.device),
    "block_mask": lambda x, q, shape: mods.read_block_mask(x, *shape, q.device),
}


def check_fields(fields: Mapping, q: Tensor, shape: tuple[int, int, int, int]) -> dict:
    """Those that are given, checked. (A loop: this is the path that is counted in microseconds.)"""
    given = {}
    for name, value in fields.items():
        if value is not None:
            given[name] = CHECKS[name](value, q, shape)
    return given


def check_score(score: Score, q: Tensor, shape: tuple[int, int, int, int]) -> Score:
    """A Score that was built without a shape, checked."""
    return score._replace(**check_fields({name: getattr(score, name) for name in CHECKS}, q, shape))


def check_names(call: str, options: Mapping) -> None:
    """Refuse options that are not in `ScoreOptions`."""
    for name in options:
        if name not in ScoreOptions.__annotations__:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


# ------------------------------------------------------------------------------------------------ tensors and numbers


def check_tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_floating(name: str, x) -> None:
    if not isinstance(x, Tensor):
        check_tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_device(name: str, x: Tensor, owner: str, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on {owner}'s device {device}, got {x.device}")


def check_dtype(name: str, x: Tensor, owner: str, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name} must have {owner}'s dtype {dtype}, got {x.dtype}")


def overrides_functions(x: Tensor) -> bool:
    """Whether PyTorch asks x's class before it calls a function."""
    if type(x) is Tensor or type(x) is torch.nn.Parameter:
        return False
    return type(x).__torch_function__ is not torch._C._disabled_torch_function_impl


def has_own_operations(x: Tensor) -> bool:
    """Whether x's class overrides Tensor's operations, as PyTorch's CausalBias does: its memory may not hold its
    values."""
    if not overrides_functions(x):
        return False
    own, usual = (getattr(kind.__torch_function__, "__func__", None) for kind in (type(x), Tensor))
    return own is not usual


def refuse_own_operations(name: str, x: Tensor) -> None:
    if has_own_operations(x):
        raise TypeError(f"{name} must be a plain tensor, got {type(x).__name__}, which has operations of its own")


def check_probability(name: str, p) -> float:
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"{name} must be a float, got {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), got {p}")
    return float(p)


def make_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed of a dropout as the kernels read it: an int64 on the device; None draws one."""
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed must be an int or an int64 tensor of one element on {device}, "
                f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            )
        return seed
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int in [0, 2**63), got {seed!r}")
    return torch.full((), seed, dtype=torch.int64, device=device)


# ------------------------------------------------------------------------------------------------ attention


def check_shapes(q, k, v) -> tuple[int, int, int, int]:
    """Check that q, k and v fit each other; returns (batch, heads, seq_q, seq_k)."""
    # One comparison where nothing is wrong, to save microseconds; the loop finds the argument to name.
    plain = type(q) is type(k) is type(v) is Tensor and q.dim() == k.dim() == v.dim() == 4
    if not (plain and k.dtype == v.dtype == q.dtype in DTYPES and k.device == v.device == q.device):
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_floating(name, x)
            if x.dim() != 4:
                raise ValueError(f"{name} must be (batch, heads, seq, head_dim), got shape {tuple(x.shape)}")
            check_dtype(name, x, "q", q.dtype)
            check_device(name, x, "q", q.device)
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
    return batch, heads, seq_q, seq_k


def check_cu_seqlens(side: str, cu_seqlens, max_seqlen: int | None, x: Tensor) -> int:
    """Check the boundaries (batch + 1,) of the sequences in x; returns an upper bound of their lengths."""
    name = f"cu_seqlens_{side}"
    check_tensor(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must be (batch + 1,), got shape {tuple(cu_seqlens.shape)}")
    check_device(name, cu_seqlens, "q", x.device)
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt))):
        raise TypeError(f"max_seqlen_{side} must be an int or None, got {type(max_seqlen).__name__}")
    has_data = tracing.has_data(cu_seqlens)
    if not has_data or (cu_seqlens.is_cuda and (max_seqlen is not None or tracing.is_capturing())):
        if max_seqlen is None:
            where = "in a CUDA graph" if has_data else f"under torch.compile and where {name} has no data"
            raise ValueError(f"max_seqlen_{side} must be given {where}, got None")
        return max_seqlen
    starts, total = cu_seqlens.tolist(), x.shape[2]
    steps = [b - a for a, b in itertools.pairwise(starts)]
    if starts[0] != 0 or min(steps) < 0 or starts[-1] > total:
        raise ValueError(
            f"{name} must begin with 0, never fall and end at most at {side}'s {total} rows, "
            f"got {truncate_repr(starts)}"
        )
    if max_seqlen is None:
        return max(steps)
    if max_seqlen < max(steps):
        raise ValueError(f"max_seqlen_{side} must be at least the longest sequence's {max(steps)}, got {max_seqlen}")
    return max_seqlen


def truncate_repr(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:8]))}, ...]"


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
    return None if left is None else min(left, MAX_WINDOW), None if right is None else min(right, MAX_WINDOW)


def check_lengths(name: str, lengths, batch: int, seq: int, device: torch.device) -> Tensor:
    """Lengths as the kernels read them: contiguous int32 on q's device."""
    check_tensor(name, lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"{name} must be (batch,) = ({batch},), got shape {tuple(lengths.shape)}")
    if lengths.device != device and not tracing.is_traced():
        tracing.refuse_capture(name, f"it must be on {device}, as what a replay reads anew is; got {lengths.device}")
    if lengths.device.type == "cpu" and batch > 0 and tracing.has_data(lengths):
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > seq:
            raise ValueError(f"{name} must be between 0 and the sequence length {seq}, got {low if low < 0 else high}")
    if lengths.dtype == torch.int64 and lengths.device.type != "cpu":
        lengths = lengths.clamp(0, seq)  # not read back, so not checked; the low half of one may be a length again
    # Asynchronous to a GPU only: a copy from pageable memory has read its source when it returns.
    return lengths.to(device=device, dtype=torch.int32, non_blocking=device.type == "cuda").contiguous()


def check_softcap(softcap) -> float:
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool):
        raise TypeError(f"softcap must be a float, got {type(softcap).__name__}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be above 0 and finite, or None for no cap, got {softcap}")
    return float(softcap)


def check_alibi_slopes(slopes, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The slopes as the kernels read them: contiguous (batch or 1, heads)."""
    check_tensor("alibi_slopes", slopes)
    if slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be float32, got {slopes.dtype}")
    check_device("alibi_slopes", slopes, "q", device)
    tracing.refuse_tangents("alibi_slopes", slopes)
    batch, heads = shape[:2]
    if slopes.shape != (heads,) and slopes.shape != (batch, heads):  # `in` does not compare symbols
        raise ValueError(
            f"alibi_slopes must be (heads,) = ({heads},) or (batch, heads) = {(batch, heads)}, "
            f"got shape {tuple(slopes.shape)}"
        )
    return slopes.detach().contiguous().view(-1, heads)


def as_4d(name: str, x: Tensor, full: tuple[int, ...], device: torch.device) -> Tensor:
    """x, broadcastable to `full`, as a view of four dimensions, the last contiguous."""
    refuse_own_operations(name, x)
    check_device(name, x, "q", device)
    shape = (*[1] * (4 - x.dim()), *x.shape)
    if len(shape) != 4 or any(size != 1 and size != wanted for size, wanted in zip(shape, full, strict=True)):
        raise ValueError(
            f"{name} must be broadcastable to (batch, heads, seq_q, seq_k) = {full}, got shape {tuple(x.shape)}"
        )
    x = x[(None,) * (4 - x.dim())]
    return x if x.stride(3) in (0, 1) or x.shape[3] == 1 else x.contiguous()


def check_mask(mask, shape: tuple[int, ...], device: torch.device) -> Tensor:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = attend), got {mask.dtype}; what is added to scores is a bias")
    return as_4d("mask", mask, shape, device)


def check_bias(bias, q: Tensor, shape: tuple[int, ...]) -> Tensor:
    check_floating("bias", bias)
    if bias.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"bias must be {q.dtype}, as q, or float32, got {bias.dtype}")
    return as_4d("bias", bias, shape, q.device)


def check_sinks(sinks, q: Tensor) -> Tensor:
    check_floating("sinks", sinks)
    check_device("sinks", sinks, "q", q.device)
    if sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be (heads,) = ({q.shape[1]},), got shape {tuple(sinks.shape)}")
    return sinks


# ------------------------------------------------------------------------------------------------ decoding


def check_page_table(name: str, table, batch: int, device: torch.device) -> int:
    """How many pages a row of a page table (batch, n) has."""
    check_tensor(name, table)
    if table.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {table.dtype}")
    if table.dim() != 2 or table.shape[0] != batch:
        raise ValueError(f"{name} must be (batch, n) = ({batch}, n), got shape {tuple(table.shape)}")
    check_device(name, table, "q", device)
    return table.shape[1]


def check_pages(name: str, table: Tensor, pages: int, page_size: int, lengths: Tensor) -> None:
    """Check that the pages which each row's length needs exist in the cache. Not on a GPU, where that would
    synchronise."""
    if table.is_cuda or not tracing.has_data(table):
        return
    for row, length in zip(table.tolist(), lengths.tolist(), strict=True):
        for page in row[: -(-length // page_size)]:
            if not 0 <= page < pages:
                raise ValueError(f"{name} must point at pages 0 to {pages - 1} of the cache, got {page}")


def check_decode_inputs(q, cache, k, v, dropout_p) -> None:
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0: decode is for inference, got {dropout_p}")
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together, or neither")
    inputs = [("q", q)] if k is None else [("q", q), ("k", k), ("v", v)]
    for name, x in inputs:
        check_floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, seq, head_dim), got shape {tuple(x.shape)}")
        if x.dtype != cache.k.dtype:
            raise TypeError(f"{name} must have the cache's dtype {cache.k.dtype}, got {x.dtype}")
        check_device(name, x, "the cache", cache.k.device)
    batch, heads, seq_q, head_dim = q.shape
    kv_heads = cache.k.shape[1]
    if not tracing.is_traced():  # else the operator does
        check_batch(q, cache)
    if heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"q must have a number of heads that the cache's {kv_heads} divide, got {heads}")
    if head_dim != cache.k.shape[3]:
        raise ValueError(f"q must have the cache's head_dim {cache.k.shape[3]}, got {head_dim}")
    for name, x, kept in (("k", k, cache.k), ("v", v, cache.v)):
        expected = (batch, kv_heads, seq_q, kept.shape[3])
        if x is not None and x.shape != expected:
            raise ValueError(f"{name} must be (batch, kv_heads, seq_q, dim) = {expected}, got shape {tuple(x.shape)}")


def refuse_gradients(**inputs) -> None:
    if torch.is_grad_enabled():
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.requires_grad:
                raise ValueError(f"{name} must not require a gradient: decode is for inference; use torch.no_grad()")


def check_batch(q: Tensor, cache: KVCache | PagedBatch) -> None:
    if q.shape[0] != len(cache.lengths):
        raise ValueError(f"q must have the cache's batch {len(cache.lengths)}, got {q.shape[0]}")


def check_rotary(rotary, q: Tensor, positions: int) -> None:
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a flashattn.Rotary(cos, sin), got {type(rotary).__name__}")
    for name, x in (("rotary.cos", rotary.cos), ("rotary.sin", rotary.sin)):
        check_floating(name, x)
        check_device(name, x, "q", q.device)
        if x.dim() != 2 or x.shape != rotary.cos.shape or 2 * x.shape[1] > q.shape[3]:
            raise ValueError(
                f"{name} must be (positions, n), n at most half of head_dim {q.shape[3]}, got shape {tuple(x.shape)}"
            )
    if rotary.cos.shape[0] < positions:
        raise ValueError(f"rotary.cos must have a row for each of {positions} positions, got {rotary.cos.shape[0]}")
