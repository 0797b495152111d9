"""The native CPU backend: its verbs call the operators of `csrc/bindings*.cpp`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from .. import reference
from ..protocol import Capabilities, Saved, SavedNorm
from ..score import SCORE_FIELDS, Norm, Score
from ..tensors import cast_like, make_last_dim_contiguous
from . import cpu_block_mask

if TYPE_CHECKING:
    from ..cache import CacheView, Rotary
    from ..protocol import NormTangents, Tangents

ISAS = ("avx512bf16", "avx512", "avx2", "portable")


def find_missing_reason(error: ImportError) -> str:
    """Why the engine does not load. The import of a missing file fails with "cannot import name"; any other text is the
    reason why an existing one did not load."""
    if "cannot import name" not in str(error):
        return f"the extension flashattn._C does not load: {error}"
    package = Path(__file__).parent.parent
    note = package / "no_engine.txt"  # setup.py leaves it where it could not build the engine
    if note.exists():
        return f"flashattn was built without it: {note.read_text(encoding='utf-8')}"
    return (
        f"the extension flashattn._C is not in {package}: it was never built there "
        "(pip install --no-build-isolation --editable . builds it in a clone)"
    )


try:
    from .. import _C  # noqa: F401  (registers the operators of csrc/bindings*.cpp)

    ops = torch.ops.flashattn_cpu
    missing_reason = None  # why the engine is unavailable
    if not ops.isa.default():
        raise ValueError(
            f"FLASHATTN_CPU_ISA must be one of {', '.join(ISAS)}, and one this processor has; "
            f"got {os.environ['FLASHATTN_CPU_ISA']!r}"
        )
except ImportError as error:
    missing_reason = find_missing_reason(error)


def get_isa() -> str:
    """The instruction set that the engine uses: one of ISAS, or "not built"."""
    return "not built" if missing_reason is not None else ops.isa.default()


def list_isas() -> list[str]:
    """The instruction sets that this processor supports, the best first; FLASHATTN_CPU_ISA may name one of them."""
    return [] if missing_reason is not None else [name for name in ISAS if ops.supports.default(name)]


CAPABILITIES = Capabilities(refused_dtypes={torch.float64: "it does not take float64"}, max_head_dim=256)


def unavailable_reason(device: torch.device) -> str | None:
    if missing_reason is not None:
        return missing_reason
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    return None


# ------------------------------------------------------------------------------------------------ attention


def forward(q: Tensor, k: Tensor, v: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor]:
    if score.score_mod is None and score.block_mask is None:
        return engine_forward(q, k, v, score)
    if cpu_block_mask.supports(score):
        return cpu_block_mask.forward(engine_forward, q, k, v, score)
    return reference.forward(q, k, v, score)


def engine_forward(q: Tensor, k: Tensor, v: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor]:
    return ops.attention_forward.default(q, k, v, *score[:SCORE_FIELDS])


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, with_grad_bias: bool,
    grad_captured: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    if score.score_mod is None and score.block_mask is None:
        return engine_backward(grad_out, grad_lse, saved, score, with_grad_bias)
    if cpu_block_mask.supports(score):
        return cpu_block_mask.backward(engine_backward, grad_out, grad_lse, saved, score, with_grad_bias)
    return reference.backward(grad_out, grad_lse, saved, score, with_grad_bias, grad_captured)


def engine_backward(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, with_grad_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    *gradients, grad_bias = ops.attention_backward.default(
        grad_out, grad_lse, *saved, *score[:SCORE_FIELDS], with_grad_bias
    )
    return *gradients, cast_like(grad_bias, score.bias)


def jvp(
    q: Tensor, k: Tensor, v: Tensor, score: Score, tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if score.score_mod is None and score.block_mask is None:
        return engine_jvp(q, k, v, score, tangents)
    if cpu_block_mask.supports(score):
        return cpu_block_mask.jvp(engine_jvp, q, k, v, score, tangents)
    return reference.jvp(q, k, v, score, tangents)


def engine_jvp(
    q: Tensor, k: Tensor, v: Tensor, score: Score, tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return ops.attention_jvp.default(q, k, v, *tangents[:5], *score[:SCORE_FIELDS])


def hvp(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, tangents: Tangents, tangent_out: Tensor,
    tangent_lse: Tensor, with_grad_bias: bool, grad_captured: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    arguments = grad_out, grad_lse, saved, score, tangents, tangent_out, tangent_lse, with_grad_bias
    if score.score_mod is None and score.block_mask is None:
        return engine_hvp(*arguments)
    if cpu_block_mask.supports(score):
        return cpu_block_mask.hvp(engine_hvp, *arguments)
    return reference.hvp(*arguments, grad_captured)


def engine_hvp(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, tangents: Tangents, tangent_out: Tensor,
    tangent_lse: Tensor, with_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    *gradients, grad_bias = ops.attention_hvp.default(
        grad_out, grad_lse, *saved, *tangents[:4], tangent_out, tangent_lse, *score[:SCORE_FIELDS], with_grad_bias
    )
    return *gradients, cast_like(grad_bias, score.bias)


attention_stats, has_rest = reference.attention_stats, reference.has_rest


# ------------------------------------------------------------------------------------------------ decoding


def rotate(x: Tensor, starts: Tensor, counts: Tensor | None, rotary: Rotary) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ops.rotate_and_store.default(x, out, None, starts, counts, *rotary, False)
    return out


def append(q: Tensor, k: Tensor, v: Tensor, cached: CacheView, counts: Tensor | None, rotary: Rotary | None) -> Tensor:
    store(k, cached.k, cached, counts, rotary)
    store(v, cached.v, cached, counts, None)
    return q if rotary is None else rotate(q, cached.starts, counts, rotary)


def store(x: Tensor, cache: Tensor, cached: CacheView, counts: Tensor | None, rotary: Rotary | None) -> None:
    if cache.stride(3) != 1 and cache.shape[3] != 1:  # possible only if the caller allocated the cache
        return reference.store(x, cache, cached, counts, rotary)
    tables = (None, None, False) if rotary is None else rotary
    ops.rotate_and_store.default(x, cache, cached.page_table, cached.starts, counts, *tables, True)


def decode(q: Tensor, cached: CacheView, score: Score) -> tuple[Tensor, Tensor]:
    k, v = (make_last_dim_contiguous(x) for x in (cached.k, cached.v))
    return ops.attention_decode.default(q, k, v, cached.page_table, cached.longest, *score[:SCORE_FIELDS])


# ------------------------------------------------------------------------------------------------ norms


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden_dtype: torch.dtype,
    keep_hidden: bool, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    return ops.norm_forward.default(x, residual, weight, bias, hidden_dtype, keep_hidden, *norm)


def norm_backward(
    grad_y: Tensor, grad_hidden: Tensor | None, saved: SavedNorm, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    return ops.norm_backward.default(grad_y, grad_hidden, *saved, x_dtype, residual_dtype, *norm)


def norm_jvp(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, tangents: NormTangents,
    hidden_dtype: torch.dtype, keep_hidden: bool, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    return ops.norm_jvp.default(x, residual, weight, bias, *tangents, hidden_dtype, keep_hidden, *norm)


def norm_hvp(
    grad_y: Tensor, saved: SavedNorm, tangent_hidden: Tensor, tangent_weight: Tensor | None, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    hidden, weight, _, mean, rstd = saved
    given = grad_y, hidden, weight, mean, rstd, tangent_hidden, tangent_weight
    return ops.norm_hvp.default(*given, x_dtype, residual_dtype, *norm)


# ------------------------------------------------------------------------------------------------ linear layers

MAX_ENGINE_ROWS = 32  # more of them are faster in PyTorch's product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _fits_engine(x, weight, bias):
        return functional.linear(x, weight, bias)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    ops.linear.default(x.contiguous(), weight, None if bias is None else bias.float(), y)
    return y


def _fits_engine(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    # Counted in microseconds: a decode step asks it hundreds of times. Cheap tests that often fail come first.
    count, shape = x.numel(), weight.shape
    if len(shape) != 2 or not 0 < count <= MAX_ENGINE_ROWS * shape[1] or x.shape[-1:] != shape[1:]:
        return False
    if weight.dtype != x.dtype or weight.stride(1) != 1:
        return False
    return bias is None or (bias.dtype == x.dtype and bias.shape == shape[:1])
