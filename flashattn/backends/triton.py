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
from ..protocol import Capabilities, Saved
from ..score import Score
from ..tensors import (
    make_contiguous,
    make_last_dim_contiguous,
    new_lse,
    new_result,
)
from .setting import Setting

if TYPE_CHECKING:
    from ..cache import CacheView, Rotary
    from ..protocol import Tangents

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from ..kernels import backward as backward_kernels
    from ..kernels import codegen, compiler, configs, tune
    from ..kernels import decode as decode_kernels
    from ..kernels import forward as forward_kernels
    from ..kernels import hvp as hvp_kernels
    from ..kernels import jvp as jvp_kernels
    from ..kernels import rotary as rotary_kernels
    from ..kernels.backward import StatsPointers
    from ..kernels.dropout import dropout_arg
    from ..kernels.hvp import DualPointers
    from ..kernels.pages import PageTable, page_table_arg
    from ..kernels.precision import choose_input_precision
    from ..kernels.rotary import RotaryArgs
    from ..kernels.scores import ScoreArgs, TangentArgs, score_tensor_arg
    from ..kernels.tiles import Heads
    from . import triton_hopper, triton_norm
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


if triton is not None:
    norm_forward = launch_on_tensor_device(triton_norm.norm_forward)
    norm_backward = launch_on_tensor_device(triton_norm.norm_backward)
    norm_jvp = launch_on_tensor_device(triton_norm.norm_jvp)
    norm_hvp = launch_on_tensor_device(triton_norm.norm_hvp)
linear = reference.linear
