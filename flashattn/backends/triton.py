"""The Triton backend: launches the kernels in `flashattn/kernels`."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from .. import reference
from ..protocol import Capabilities, Saved, SavedNorm
from ..score import Norm, Score
from ..tensors import (
    as_rows,
    count_norm_heads,
    dropout_threshold,
    make_contiguous,
    make_last_dim_contiguous,
    new_lse,
    new_result,
)
from .setting import Setting

if TYPE_CHECKING:
    from ..cache import CacheView, Rotary
    from ..protocol import NormTangents, Tangents

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from ..kernels import backward as backward_kernels
    from ..kernels import codegen, compiler, configs, tune
    from ..kernels import decode as decode_kernels
    from ..kernels import forward as forward_kernels
    from ..kernels import hvp as hvp_kernels
    from ..kernels import jvp as jvp_kernels
    from ..kernels import norm as norm_kernels
    from ..kernels import rotary as rotary_kernels
    from ..kernels.backward import StatsPointers
    from ..kernels.dropout import DropoutArgs
    from ..kernels.hvp import DualPointers
    from ..kernels.norm import Direction, RowView
    from ..kernels.pages import PageTable, page_table_arg
    from ..kernels.precision import choose_input_precision
    from ..kernels.rotary import RotaryArgs
    from ..kernels.scores import ScoreArgs, TangentArgs, score_tensor_arg
    from ..kernels.tiles import Heads
    from . import triton_hopper
else:
    triton = None


# Whether Triton has a driver that launches on CPU tensors, set by `triton_on_cpu`.
accepts_cpu_tensors = Setting(False)


def list_compiler_bugs() -> list[str]:
    """The bugs of this Triton that are worked around, in a sentence each."""
    return [] if triton is None else compiler.list_bugs()


@functools.cache
def unavailable_reason(device: torch.device) -> str | None:
    if triton is None:
        return "the triton package is not installed (a PyTorch for GPUs brings it)"
    if triton.knobs.runtime.interpret:
        return None
    if device.type == "cpu" and accepts_cpu_tensors.value:
        return None
    if device.type != "cuda":  # PyTorch calls AMD's devices cuda too
        return f"it runs on GPUs, not on {device.type} (TRITON_INTERPRET=1 runs it in Triton's interpreter, slowly)"
    try:
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    except (AssertionError, RuntimeError):  # a tensor of FakeTensorMode can say that it is on a GPU where none is
        return "there is no GPU"
    return None


Verb = TypeVar("Verb", bound=Callable)


def launch_on_tensor_device(verb: Verb) -> Verb:
    """Launch on the GPU the tensors are on: Triton launches on the current one."""

    @functools.wraps(verb)
    def guarded(x: Tensor, *args):
        if not x.is_cuda:
            return verb(x, *args)
        with torch.cuda.device(x.device):
            return tune.call(verb, x, *args)

    return guarded  # type: ignore[return-value]  # of the same signature


REFUSED_DTYPES = {torch.float64: "it does not take float64"}
if triton is not None and triton.knobs.runtime.interpret:
    REFUSED_DTYPES[torch.bfloat16] = "Triton's interpreter computes bfloat16 wrongly"
CAPABILITIES = Capabilities(REFUSED_DTYPES, max_head_dim=256, captures_mods=True)


# ------------------------------------------------------------------------------------------------ attention


LARGEST = torch.finfo(torch.float32).max
MAX_ROW_STRIDE = 2**23  # elements: the 256 rows of a tile are less than 2**31 apart


def make_readable(x: Tensor) -> Tensor:
    """x (batch, heads, seq, dim) itself if the kernels can read it, else a copy: its last dimension must be contiguous,
    and a tile's offsets are 32-bit."""
    return make_last_dim_contiguous(x) if x.stride(2) <= MAX_ROW_STRIDE or x.shape[2] == 1 else x.contiguous()


def heads_arg(x: Tensor) -> Heads:
    """A tensor as an argument of a kernel. The stride of a batch of one, as packed sequences have, is 0."""
    return Heads(x, x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(2))


def dropout_arg(dropout_p: float, seed: Tensor | None) -> DropoutArgs | None:
    if dropout_p == 0:
        return None
    return DropoutArgs(seed, dropout_threshold(dropout_p), 1 / (1 - dropout_p))


def attention_args(q: Tensor, k: Tensor, v: Tensor, score: Score, with_tangents: bool = False) -> tuple:
    """The arguments all attention kernels share: the score, then the fields of `Sizes`. The score's limits count from
    each batch row's own diagonal, which kernels add."""
    batches, seq_q, seq_k = score.sizes(q, k)
    first, last = score.bounds(0, 0)
    slopes, mask, softcap = score.alibi_slopes, score.mask, score.softcap
    args = ScoreArgs(
        scale=score.scale,
        first=first,
        last=last,
        q_lengths=score.q_lengths,
        kv_lengths=score.kv_lengths,
        softcap=softcap,
        inverse_softcap=None if softcap is None else min(1 / softcap, LARGEST),
        alibi_slopes=slopes,
        alibi_stride=None if slopes is None else slopes.stride(0) * (slopes.shape[0] > 1),
        mask=None if mask is None else score_tensor_arg(mask.view(torch.uint8)),
        bias=None if score.bias is None else score_tensor_arg(score.bias),
        sinks=make_contiguous(score.sinks),
        dropout=dropout_arg(score.dropout_p, score.seed),
        cu_seqlens=score.cu_seqlens,
        total_q=None if score.cu_seqlens is None else q.shape[2],
        score_mod=codegen.mod_arg(score.score_mod),
        blocks=codegen.blocks_arg(score.block_mask),
        raw=tl.constexpr(has_raw_scores(q, score)),
        precision=tl.constexpr(choose_input_precision(q, v, with_tangents)),
    )
    return args, batches, q.shape[1], k.shape[1], seq_q, seq_k


def tangent_args(tangents: Tangents, score: Score, with_dscore: bool = False) -> TangentArgs:
    """The tangents of a call as an argument of a kernel. with_dscore: also of the score's derivative."""
    q, k, v = (None if x is None else heads_arg(make_readable(x)) for x in (tangents.q, tangents.k, tangents.v))
    bias = None if tangents.bias is None else score_tensor_arg(tangents.bias)
    of_mod = codegen.mod_tangent_args(score.score_mod, tangents.captured, with_dscore)
    of_scores = any(x is not None for x in (q, k, bias, *tangents.captured))
    return TangentArgs(q, k, v, bias, make_contiguous(tangents.sinks), of_scores=tl.constexpr(of_scores), **of_mod)


def allocate_stats(lse: Tensor, sequences: int, raw: bool) -> tuple[Tensor, StatsPointers]:
    """Memory for the statistics that a backward's first pass writes of each query, (2 or 4, batch * heads, stride), and
    the same as an argument of kernels. `sequences`: those packed into a row, which start at multiples of 16 bytes, as
    rows do."""
    lines, seq = lse.shape[:-1].numel(), configs.cdiv(lse.shape[-1] + 4 * sequences, 4) * 4
    # Three where scores are not raw; but a tile that is copied in bulk has a power of two of them.
    rows = torch.empty(2 if raw else 4, lines, seq, dtype=torch.float32, device=lse.device)
    return rows, StatsPointers(rows[0], rows[1], rows[1 if raw else 2], rows.stride(1))


def has_raw_scores(q: Tensor, score: Score) -> bool:
    """Whether scores are q.k of 16-bit tensors times a positive factor, with which the maximum of a row commutes.

    A raw score s puts the weights of a backward off by 6e-8 s: less than the rounding of its results, up to scores of
    thousands in float16 and tens of thousands in bfloat16; larger ones (`softmax.py`) become NaN. Other features can
    make scores as large as float32 allows, and float32 results show the error: those stay in natural units.
    """
    return q.element_size() == 2 and score.scale > 0 and not score.has_score_changes()


def has_rest(q: Tensor, score: Score) -> bool:
    return not has_raw_scores(q, score)


def count_pair_costs(score: Score, tangents: Tangents | None = None) -> configs.PairCosts:
    """The `PairCosts` of a call. Of a pass with tangents, as if all captured tensors had one."""
    biases = (score.bias, None if tangents is None else tangents.bias)
    loads = [x.element_size() for x in (*biases, score.mask) if x is not None]
    if score.score_mod is not None:
        loads += codegen.list_pair_loads(score.score_mod) * (1 if tangents is None else 2)
    if score.block_mask is not None:
        loads += codegen.list_pair_loads(score.block_mask.mask)
    return configs.PairCosts(
        sum(loads), max(loads, default=0), score.dropout_p > 0, triton_hopper.has_tile_changes(score)
    )


def count_bias_programs(grad_bias: Tensor, meta: dict) -> int:
    *planes, size_q, size_k = grad_bias.shape
    return configs.cdiv(size_k, meta["BLOCK_N"]) * configs.cdiv(size_q, meta["BLOCK_M"]) * math.prod(planes)


def choose_attention_meta(direction: str, q: Tensor, v: Tensor, score: Score, tangents: Tangents | None = None) -> dict:
    """Tile sizes and launch options of one pass. A tile lies in one block of a block mask."""
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    cols = configs.choose_cols(head_dim, head_dim_v)
    has_score_mod, precision = score.score_mod is not None, choose_input_precision(q, v, tangents is not None)
    pairs = count_pair_costs(score, tangents)
    tiles = configs.choose_tiles(direction, cols, q.element_size(), pairs, has_score_mod, precision)
    tiles = tune.choose_row(direction, q, v, score, tiles, tangents)
    block_mask = score.block_mask
    block_m, block_n = tiles.block_m, tiles.block_n
    if block_mask is not None:
        block_m = min(block_m, block_mask.block_q & -block_mask.block_q)  # the power of two that divides it
        block_n = min(block_n, block_mask.block_k & -block_mask.block_k)
        if min(block_m, block_n) < 16:
            sizes = block_mask.block_q, block_mask.block_k
            raise ValueError(f"block_mask must have a BLOCK_SIZE of multiples of 16 on the triton backend, got {sizes}")
    return dict(
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_D=cols[0],
        BLOCK_DV=cols[1],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@launch_on_tensor_device
def forward(q: Tensor, k: Tensor, v: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, v = make_readable(q), make_readable(k), make_readable(v)
    batch, seq_q, _ = score.sizes(q, k)
    packed, heads = score.cu_seqlens is not None, q.shape[1]
    out, lse = new_result(q, v.shape[-1], packed), new_lse(q, score, torch.float32)
    rest = None if has_raw_scores(q, score) else new_lse(q, score, torch.float32)
    roles = triton_hopper.choose_roles("forward", q, k, v, score)
    if roles is not None:
        triton_hopper.forward(q, k, v, heads_arg(out), lse, rest, attention_args(q, k, v, score), roles)
        return out, lse, rest
    meta = choose_attention_meta("forward", q, v, score)
    programs = configs.cdiv(seq_q, meta["BLOCK_M"]) * heads * batch
    if programs:
        forward_kernels.attention_forward[(programs,)](
            heads_arg(q), heads_arg(k), heads_arg(v), heads_arg(out), lse, rest, *attention_args(q, k, v, score),
            **meta,
        )  # fmt: skip
    return out, lse, rest


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, with_grad_bias: bool,
    grad_captured: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    if any(x is not None for x in grad_captured):  # a kernel would have to add these atomically
        reference.backward(grad_out, grad_lse, saved, score, False, grad_captured)
    return launch_backward(grad_out, grad_lse, saved, score, with_grad_bias)


@launch_on_tensor_device  # which may run it several times, to search for tiles
def launch_backward(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, with_grad_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v, grad_out = (make_readable(x) for x in (*saved[:3], grad_out))
    out, lse, rest = saved[3:]
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    batch, seq_q, seq_k = score.sizes(q, k)
    packed, heads = score.cu_seqlens is not None, q.shape[1]
    grad_q, grad_k, grad_v = (new_result(x, x.shape[-1], packed) for x in (q, k, v))
    rows, statistics = allocate_stats(lse, batch if packed else 0, has_raw_scores(q, score))
    args = attention_args(q, k, v, score)
    roles = triton_hopper.choose_roles("backward_q", q, k, v, score, grad_out)
    if roles is not None:
        triton_hopper.backward_q(
            q, k, v, heads_arg(out), grad_out, lse, rest, grad_lse, heads_arg(grad_q), statistics, args, roles
        )
    else:
        meta = choose_attention_meta("backward_q", q, v, score)
        programs = configs.cdiv(seq_q, meta["BLOCK_M"]) * heads * batch
        if programs:
            backward_kernels.attention_backward_q[(programs,)](
                heads_arg(q), heads_arg(k), heads_arg(v), heads_arg(out), heads_arg(grad_out), lse, rest, grad_lse,
                heads_arg(grad_q), statistics, *args, **meta,
            )  # fmt: skip
    roles = triton_hopper.choose_roles("backward_kv", q, k, v, score, grad_out)
    if roles is not None:
        triton_hopper.backward_kv(q, k, v, grad_out, rows, heads_arg(grad_k), heads_arg(grad_v), args, roles)
    else:
        meta = choose_attention_meta("backward_kv", q, v, score)
        programs = configs.cdiv(seq_k, meta["BLOCK_N"]) * k.shape[1] * batch
        if programs:
            backward_kernels.attention_backward_kv[(programs,)](
                heads_arg(q), heads_arg(k), heads_arg(v), heads_arg(grad_out), statistics, heads_arg(grad_k),
                heads_arg(grad_v), *args, **meta,
            )  # fmt: skip
    if not with_grad_bias or score.bias is None:
        return grad_q, grad_k, grad_v, None
    grad_bias = torch.empty(score.bias.shape, dtype=torch.float32, device=q.device)
    meta = choose_attention_meta("backward_q", q, v, score)
    programs = count_bias_programs(grad_bias, meta)
    if programs:
        backward_kernels.attention_backward_bias[(programs,)](
            heads_arg(q), heads_arg(k), heads_arg(v), heads_arg(grad_out), statistics, grad_bias, *args,
            *grad_bias.shape, **meta,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_bias.to(score.bias.dtype)


@launch_on_tensor_device
def jvp(
    q: Tensor, k: Tensor, v: Tensor, score: Score, tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    q, k, v = make_readable(q), make_readable(k), make_readable(v)
    batch, seq_q, _ = score.sizes(q, k)
    packed, heads = score.cu_seqlens is not None, q.shape[1]
    out, tangent_out = (new_result(q, v.shape[-1], packed) for _ in range(2))
    lse = new_lse(q, score, torch.float32)
    rest = None if has_raw_scores(q, score) else new_lse(q, score, torch.float32)
    tangent_lse = torch.zeros_like(lse) if packed else torch.empty_like(lse)
    meta = choose_attention_meta("jvp", q, v, score, tangents)
    programs = configs.cdiv(seq_q, meta["BLOCK_M"]) * heads * batch
    if programs:
        jvp_kernels.attention_jvp[(programs,)](
            heads_arg(q), heads_arg(k), heads_arg(v), heads_arg(out), lse, rest, heads_arg(tangent_out), tangent_lse,
            tangent_args(tangents, score), *attention_args(q, k, v, score, True), **meta,
        )  # fmt: skip
    return out, lse, rest, tangent_out, tangent_lse


def hvp(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, tangents: Tangents, tangent_out: Tensor,
    tangent_lse: Tensor, with_grad_bias: bool, grad_captured: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    given = grad_out, grad_lse, saved, score, tangents, tangent_out, tangent_lse
    if any(x is not None for x in grad_captured):  # as in `backward`
        reference.hvp(*given, False, grad_captured)
    return launch_hvp(*given, with_grad_bias)


@launch_on_tensor_device
def launch_hvp(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, tangents: Tangents, tangent_out: Tensor,
    tangent_lse: Tensor, with_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    q, k, v, grad_out, out, tangent_out = (make_readable(x) for x in (*saved[:3], grad_out, saved.out, tangent_out))
    grad_lse, lse, tangent_lse = make_contiguous(grad_lse), saved.lse.contiguous(), tangent_lse.contiguous()
    batch, seq_q, seq_k = score.sizes(q, k)
    packed, heads = score.cu_seqlens is not None, q.shape[1]
    grad_q, grad_k, grad_v = (new_result(x, x.shape[-1], packed) for x in (q, k, v))
    sequences = batch if packed else 0
    _, statistics = allocate_stats(lse, sequences, has_raw_scores(q, score))
    _, of_tangents = allocate_stats(lse, sequences, True)
    rows = DualPointers(statistics, of_tangents)
    args = tangent_args(tangents, score, True), *attention_args(q, k, v, score, True)
    meta = choose_attention_meta("hvp_q", q, v, score, tangents)
    programs = configs.cdiv(seq_q, meta["BLOCK_M"]) * heads * batch
    if programs:
        hvp_kernels.attention_hvp_q[(programs,)](
            heads_arg(q), heads_arg(k), heads_arg(v), heads_arg(out), heads_arg(tangent_out), heads_arg(grad_out), lse,
            saved.rest, grad_lse, tangent_lse, heads_arg(grad_q), rows, *args, **meta,
        )  # fmt: skip
    meta_kv = choose_attention_meta("hvp_kv", q, v, score, tangents)
    programs = configs.cdiv(seq_k, meta_kv["BLOCK_N"]) * k.shape[1] * batch
    if programs:
        hvp_kernels.attention_hvp_kv[(programs,)](
            heads_arg(q), heads_arg(k), heads_arg(v), heads_arg(grad_out), rows, heads_arg(grad_k), heads_arg(grad_v),
            *args, **meta_kv,
        )  # fmt: skip
    if not with_grad_bias or score.bias is None:
        return grad_q, grad_k, grad_v, None
    grad_bias = torch.empty(score.bias.shape, dtype=torch.float32, device=q.device)
    programs = count_bias_programs(grad_bias, meta)
    if programs:
        hvp_kernels.attention_hvp_bias[(programs,)](
            heads_arg(q), heads_arg(k), heads_arg(v), heads_arg(grad_out), rows, grad_bias, *args, *grad_bias.shape,
            **meta,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_bias.to(score.bias.dtype)


attention_stats = reference.attention_stats


# ------------------------------------------------------------------------------------------------ decoding


@launch_on_tensor_device
def rotate(x: Tensor, starts: Tensor, counts: Tensor | None, rotary: Rotary) -> Tensor:
    turned = rotate_and_store(x, None, None, None, starts, counts, rotary)
    assert turned is not None
    return turned


@launch_on_tensor_device
def append(q: Tensor, k: Tensor, v: Tensor, cached: CacheView, counts: Tensor | None, rotary: Rotary | None) -> Tensor:
    # A copy only of caches that the caller made himself.
    whole = cached._replace(k=make_last_dim_contiguous(cached.k), v=make_last_dim_contiguous(cached.v))
    turned = rotate_and_store(None if rotary is None else q, k, v, whole, cached.starts, counts, rotary)
    for x, to in ((whole.k, cached.k), (whole.v, cached.v)):
        if x is not to:
            to.copy_(x)
    return q if turned is None else turned


def rotate_and_store(
    q: Tensor | None, k: Tensor | None, v: Tensor | None, cached: CacheView | None, starts: Tensor,
    counts: Tensor | None, rotary: Rotary | None,
) -> Tensor | None:  # fmt: skip
    """One launch: returns q rotated, and stores k, rotated, and v in the cache, each if given."""
    q, k, v = (None if x is None else make_last_dim_contiguous(x) for x in (q, k, v))
    given = k if q is None else q
    assert given is not None
    batch, head_dim = starts.shape[0], given.shape[3]
    heads, seq_q = (0, 0) if q is None else q.shape[1:3]
    kv_heads, seq_new, head_dim_v = (0, 0, 1) if v is None else v.shape[1:]
    turned = None if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_d, block_dv = configs.next_power_of_2(head_dim), configs.next_power_of_2(head_dim_v)
    seq = max(seq_q, seq_new)
    block_rows = max(1, min(configs.next_power_of_2(seq), configs.ROTARY_ELEMENTS // max(block_d, block_dv)))
    programs = configs.cdiv(seq, block_rows) * (heads + 2 * kv_heads) * batch
    if not programs:
        return turned
    caches: tuple[Heads | None, Heads | None, PageTable | None] = None, None, None
    if cached is not None:
        caches = heads_arg(cached.k), heads_arg(cached.v), page_table_arg(cached.page_table, cached.k.shape[2])
    args = None
    if rotary is not None:
        cos, sin = rotary.cos.contiguous(), rotary.sin.contiguous()
        args = RotaryArgs(cos, sin, cos.stride(0))
    rotary_kernels.rotate_and_store[(programs,)](
        *(None if x is None else heads_arg(x) for x in (q, turned, k, v)), *caches, starts, counts, args, heads,
        kv_heads, seq_q, seq_new, N=0 if rotary is None else rotary.cos.shape[1],
        INTERLEAVED=rotary is not None and rotary.interleaved, HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v,
        BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_ROWS=block_rows, num_warps=4,
    )  # fmt: skip
    return turned


@launch_on_tensor_device
def decode(q: Tensor, cached: CacheView, score: Score) -> tuple[Tensor, Tensor]:
    q, k, v = (make_last_dim_contiguous(x) for x in (q, cached.k, cached.v))
    batch, heads, seq_q, _ = q.shape
    kv_heads, head_dim_v = k.shape[1], v.shape[3]
    out = torch.empty(batch, seq_q, heads, head_dim_v, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device)
    rows = batch * heads * seq_q
    if not rows:
        return out, lse
    limit = configs.SPLITS if seq_q <= configs.SPLIT_QUERIES else 1
    splits = decode_kernels.count_max_splits(cached.longest, seq_q, limit)
    statistics = torch.empty(rows, 2, splits, dtype=torch.float32, device=q.device)
    partial = torch.empty(rows, splits, head_dim_v, dtype=torch.float32, device=q.device)
    args, *_ = attention_args(q, k, v, score)
    meta = choose_attention_meta("decode", q, v, score)
    if cached.page_table is not None:
        meta["num_stages"] = configs.choose_paged_stages(meta["num_stages"])
    programs = splits * configs.cdiv(heads // kv_heads * seq_q, meta["BLOCK_M"]) * kv_heads * batch
    decode_kernels.attention_decode[(programs,)](
        heads_arg(q), heads_arg(k), heads_arg(v), page_table_arg(cached.page_table, k.shape[2]), statistics, partial,
        args, heads, kv_heads, seq_q, splits, **meta, SPLITS=limit,
    )  # fmt: skip
    block_rows = configs.SPLITS // limit
    decode_kernels.attention_merge[(configs.cdiv(rows, block_rows),)](
        statistics, partial, heads_arg(out), lse, args, heads, seq_q, rows, splits,
        HEAD_DIM_V=head_dim_v, BLOCK_DV=meta["BLOCK_DV"], BLOCK_ROWS=block_rows, SPLITS=limit, num_warps=4,
    )  # fmt: skip
    return out, lse


# ------------------------------------------------------------------------------------------------ norms


def row_arg(x: Tensor | None) -> RowView | None:
    if x is None:
        return None
    x = as_rows(x)
    return RowView(x, x.shape[1], x.shape[2], *x.stride()[:3])


def check_norm_heads(*parameters: Tensor | None) -> int:
    """The heads with parameters of their own: a dimension of the grid, which ends at 65,535."""
    heads = count_norm_heads(*parameters)
    if heads > 65535:
        raise ValueError(f"weight and bias must be of at most 65,535 heads on the triton backend, got {heads}")
    return heads


def choose_norm_meta(tile: configs.NormTile, norm: Norm) -> dict:
    registers = {} if tile.registers is None else {"maxnreg": tile.registers}
    return dict(CENTER=norm.center, BLOCK_ROWS=tile.rows, BLOCK_COLS=tile.cols, num_warps=tile.warps, **registers)


@launch_on_tensor_device
def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden_dtype: torch.dtype,
    keep_hidden: bool, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    width, row_count, device = x.shape[-1], x.shape[:-1].numel(), x.device
    y = torch.empty(x.shape, dtype=x.dtype, device=device)
    hidden = torch.empty(x.shape, dtype=hidden_dtype, device=device) if keep_hidden else None
    mean = torch.empty(row_count, dtype=torch.float32, device=device) if norm.center else None
    rstd = torch.empty(row_count, dtype=torch.float32, device=device)
    heads = check_norm_heads(weight, bias)
    tile = configs.choose_norm_tile("forward", width, hidden_dtype != x.dtype, norm.dropout_p > 0)
    if row_count:
        norm_kernels.norm_forward[(configs.cdiv(row_count // heads, tile.rows), heads)](
            row_arg(x), row_arg(residual), make_contiguous(weight), make_contiguous(bias), row_arg(y), row_arg(hidden),
            mean, rstd, dropout_arg(norm.dropout_p, norm.seed), row_count, width, heads, norm.eps, norm.weight_offset,
            HIDDEN=getattr(tl, str(hidden_dtype).removeprefix("torch.")), SINGLE=tile.single,
            **choose_norm_meta(tile, norm),
        )  # fmt: skip
    return y, hidden, mean, rstd


@launch_on_tensor_device
def norm_backward(
    grad_y: Tensor, grad_hidden: Tensor | None, saved: SavedNorm, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    hidden, weight, bias, _, rstd = saved
    width, row_count, device = hidden.shape[-1], hidden.shape[:-1].numel(), hidden.device
    grad_x = torch.empty(hidden.shape, dtype=x_dtype, device=device)
    grad_residual = None if residual_dtype is None else torch.empty(hidden.shape, dtype=residual_dtype, device=device)
    heads = check_norm_heads(weight, bias)
    hidden_arg, grad_arg, weight_arg = row_arg(hidden), row_arg(grad_y), make_contiguous(weight)
    mean, tile = saved.mean if norm.center else None, configs.choose_norm_tile("backward", width)
    means: tuple[Tensor | None, Tensor | None] = None, None
    if row_count and not tile.single:
        means = None if mean is None else torch.empty_like(mean), torch.empty_like(rstd)
        one_row = tile._replace(rows=1, cols=tile.rows * tile.cols)
        norm_kernels.norm_backward_means[(row_count // heads, heads)](
            grad_arg, hidden_arg, weight_arg, mean, rstd, *means, row_count, width, heads, norm.weight_offset,
            **choose_norm_meta(one_row, norm),
        )  # fmt: skip
    grid = choose_norm_grid(tile, row_count, heads, width, device)
    parts = new_parts(grid[0], weight, bias)
    if row_count:
        norm_kernels.norm_backward[grid](
            grad_arg, row_arg(grad_hidden), hidden_arg, weight_arg, mean, rstd, *means, row_arg(grad_x),
            row_arg(grad_residual), *parts, dropout_arg(norm.dropout_p, norm.seed), row_count, width, heads,
            norm.weight_offset, SINGLE=tile.single, STAGES=configs.NORM_STAGES, **choose_norm_meta(tile, norm),
        )  # fmt: skip
    grad_weight, grad_bias = sum_parts(parts, (weight, bias))
    return grad_x, grad_residual, grad_weight, grad_bias


def choose_norm_grid(
    tile: configs.NormTile, row_count: int, heads: int, width: int, device: torch.device
) -> tuple[int, int, int]:
    """Of a pass backward: (programs that share the rows of a head, heads, chunks of columns)."""
    chunks = configs.cdiv(width, tile.cols)
    programs = configs.count_norm_programs(configs.count_multiprocessors(device), tile, heads * chunks)
    return min(programs, configs.cdiv(row_count // heads, tile.rows)), heads, chunks


def new_parts(programs: int, *parameters: Tensor | None) -> list[Tensor | None]:
    """Memory for the partial sums of the programs, (programs, heads, width)."""
    return [
        None
        if p is None
        else torch.empty(programs, count_norm_heads(p), p.shape[-1], dtype=torch.float32, device=p.device)
        for p in parameters
    ]


def sum_parts(parts: list[Tensor | None], parameters: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    """The gradients of weight and bias from their (programs, heads, width) partial sums, added in a fixed order."""
    gradients = [None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    present = next((part for part in parts if part is not None), None)
    if present is not None:
        programs, heads, width = present.shape
        norm_kernels.norm_backward_parameters[(configs.cdiv(heads * width, 32),)](
            *parts, *gradients, programs, heads * width, BLOCK_PARTS=64, BLOCK_COLS=32, num_warps=4
        )
    return gradients


@launch_on_tensor_device
def norm_jvp(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, tangents: NormTangents,
    hidden_dtype: torch.dtype, keep_hidden: bool, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    width, row_count, device = x.shape[-1], x.shape[:-1].numel(), x.device
    y, tangent_y = (torch.empty(x.shape, dtype=x.dtype, device=device) for _ in range(2))
    hidden, tangent_hidden = (
        torch.empty(x.shape, dtype=hidden_dtype, device=device) if keep_hidden else None for _ in range(2)
    )
    mean = torch.empty(row_count, dtype=torch.float32, device=device) if norm.center else None
    rstd = torch.empty(row_count, dtype=torch.float32, device=device)
    heads, tile = check_norm_heads(weight, bias), configs.choose_norm_tile("jvp", width)
    direction = Direction(*map(row_arg, tangents[:2]), *map(make_contiguous, tangents[2:]))
    if row_count:
        norm_kernels.norm_jvp[(configs.cdiv(row_count // heads, tile.rows), heads)](
            row_arg(x), row_arg(residual), make_contiguous(weight), make_contiguous(bias), direction, row_arg(y),
            row_arg(hidden), mean, rstd, row_arg(tangent_y), row_arg(tangent_hidden),
            dropout_arg(norm.dropout_p, norm.seed), row_count, width, heads, norm.eps, norm.weight_offset,
            HIDDEN=getattr(tl, str(hidden_dtype).removeprefix("torch.")), SINGLE=tile.single,
            **choose_norm_meta(tile, norm),
        )  # fmt: skip
    return y, hidden, mean, rstd, tangent_y, tangent_hidden


@launch_on_tensor_device
def norm_hvp(
    grad_y: Tensor, saved: SavedNorm, tangent_hidden: Tensor, tangent_weight: Tensor | None, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    hidden, weight, _, _, rstd = saved
    width, row_count, device = hidden.shape[-1], hidden.shape[:-1].numel(), hidden.device
    grad_x = torch.empty(hidden.shape, dtype=x_dtype, device=device)
    grad_residual = None if residual_dtype is None else torch.empty(hidden.shape, dtype=residual_dtype, device=device)
    heads, tile = check_norm_heads(weight), configs.choose_norm_tile("hvp", width)
    rows = row_arg(grad_y), row_arg(hidden), row_arg(tangent_hidden)
    given = *rows, *map(make_contiguous, (weight, tangent_weight)), saved.mean if norm.center else None, rstd
    means = None
    if row_count and not tile.single:
        means = torch.empty(row_count, norm_kernels.MEANS.value, dtype=torch.float32, device=device)
        one_row = tile._replace(rows=1, cols=tile.rows * tile.cols)
        norm_kernels.norm_hvp_means[(row_count // heads, heads)](
            *given, means, row_count, width, heads, norm.weight_offset, **choose_norm_meta(one_row, norm)
        )
    grid = choose_norm_grid(tile, row_count, heads, width, device)
    parts = new_parts(grid[0], weight, None)
    if row_count:
        norm_kernels.norm_hvp[grid](
            *given, means, row_arg(grad_x), row_arg(grad_residual), parts[0], dropout_arg(norm.dropout_p, norm.seed),
            row_count, width, heads, norm.weight_offset, SINGLE=tile.single, STAGES=configs.NORM_STAGES,
            **choose_norm_meta(tile, norm),
        )  # fmt: skip
    return grad_x, grad_residual, sum_parts(parts, (weight, None))[0]


linear = reference.linear
