"""The native CPU backend: the verbs are the operators of `csrc/ops.cpp`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..norm_settings import Norm
from ..score import Score
from . import cpu_blocks, reference
from .common import last_dim_contiguous

if TYPE_CHECKING:
    from ..cache import Cached
    from ..decode import Rotary

TENSORS = Score._fields.index("score_mod")  # the fields before callables, which the engine reads
ISAS = ("avx512bf16", "avx512", "avx2", "portable")


def why_missing(error: ImportError) -> str:
    """What stands in the way of the engine. "cannot import name" is what a missing file reads as; any other text says
    why an existing one did not load."""
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
    from .. import _C  # noqa: F401  (registers the operators of csrc/ops.cpp)

    ops = torch.ops.flashattn_cpu
    missing = None  # why the engine is not there
    if not ops.isa.default():
        raise ValueError(
            f"FLASHATTN_CPU_ISA must be one of {', '.join(ISAS)}, and one this processor has; "
            f"got {os.environ['FLASHATTN_CPU_ISA']!r}"
        )
except ImportError as error:
    missing = why_missing(error)


def isa() -> str:
    """The instruction set the engine runs on here: one of ISAS; "not built" without the engine."""
    return "not built" if missing is not None else ops.isa.default()


def isas() -> list[str]:
    """Those this processor has, the best first; FLASHATTN_CPU_ISA may name one of them."""
    return [] if missing is not None else [name for name in ISAS if ops.supports.default(name)]


def unusable(device: torch.device) -> str | None:
    if missing is not None:
        return missing
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    return None


def refuses(dtype: torch.dtype, wide: bool) -> str | None:
    if dtype == torch.float64:
        return "it does not take float64"
    if wide:
        return "it does not take a head_dim over 256"
    return None


# ------------------------------------------------------------------------------------------------ attention


def forward(q: Tensor, k: Tensor, v: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor | None]:
    if score.score_mod is None and score.block_mask is None:
        return engine_forward(q, k, v, score)
    if cpu_blocks.takes(score):
        return cpu_blocks.forward(engine_forward, q, k, v, score)
    return reference.forward(q, k, v, score)


def engine_forward(q: Tensor, k: Tensor, v: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor]:
    return ops.attention_forward.default(q, k, v, *score[:TENSORS])


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rest: Tensor | None, score: Score, with_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    args = (grad_out, grad_lse, q, k, v, out, lse, rest, score, with_grad_bias)
    if score.score_mod is None and score.block_mask is None:
        return engine_backward(*args)
    if cpu_blocks.takes(score):
        return cpu_blocks.backward(engine_backward, *args)
    return reference.backward(*args)


def engine_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rest: Tensor | None, score: Score, with_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    *gradients, grad_bias = ops.attention_backward.default(
        grad_out, grad_lse, q, k, v, out, lse, rest, *score[:TENSORS], with_grad_bias
    )
    return *gradients, None if grad_bias is None else grad_bias.to(score.bias.dtype)


# ------------------------------------------------------------------------------------------------ decoding


def rotate(x: Tensor, starts: Tensor, counts: Tensor | None, rotary: Rotary) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ops.rotate_and_store.default(x, out, None, starts, counts, *rotary, False)
    return out


def append(q: Tensor, k: Tensor, v: Tensor, cached: Cached, counts: Tensor | None, rotary: Rotary | None) -> Tensor:
    store(k, cached.k, cached, counts, rotary)
    store(v, cached.v, cached, counts, None)
    return q if rotary is None else rotate(q, cached.starts, counts, rotary)


def store(x: Tensor, cache: Tensor, cached: Cached, counts: Tensor | None, rotary: Rotary | None) -> None:
    if cache.stride(3) != 1 and cache.shape[3] != 1:  # only a cache of the caller's own can be like that
        return reference.store(x, cache, cached, counts, rotary)
    tables = (None, None, False) if rotary is None else rotary
    ops.rotate_and_store.default(x, cache, cached.page_table, cached.starts, counts, *tables, True)


def decode(q: Tensor, cached: Cached, score: Score) -> tuple[Tensor, Tensor]:
    k, v = (last_dim_contiguous(x) for x in (cached.k, cached.v))
    return ops.attention_decode.default(
        q, k, v, cached.page_table, cached.longest, score.scale, score.left, score.right, score.q_lengths,
        score.kv_lengths, score.softcap, score.slopes, score.mask, score.bias, score.sinks,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ norms


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    hidden_dtype: torch.dtype,
    keep_hidden: bool,
    norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    return ops.norm_forward.default(x, residual, weight, bias, hidden_dtype, keep_hidden, *norm)


def norm_backward(
    grad_y: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    norm: Norm,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return ops.norm_backward.default(
        grad_y, grad_hidden, hidden, weight, bias, mean, rstd, x_dtype, residual_dtype, *norm
    )
