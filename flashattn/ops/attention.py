"""The torch.library operators of attention: schema, implementation, fake and autograd of each.

They take a Score field by field, its callables as text (`mod_text.py`) with the tensors that these captured, and the
backend by name, so that forward and backward use the same one and a compiled graph says which. A tensor that a call
does not produce is returned empty, of size (0,).

The dispatcher and the autograd of an operator cost several times what a kernel launch does. A call that needs neither
runs the implementation itself, under an autograd function of the same formulas where it needs a gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import mod_text, mods_in_graph, tracing
from ..backends import BACKENDS
from ..protocol import Saved
from ..score import SCORE_FIELDS, Score, write_operator_schema
from ..score_mod import BlockMask, Traced
from ..tensors import cast_like, find_accumulation_dtype, new_result, replace_none
from . import folding
from .register import implement_with_autograd

# A Score as operators take it: its fields, the backend, the blocks of a block mask, and the callables.
BLOCKS = "Tensor? partial, Tensor? full, SymInt? block_q, SymInt? block_k"
MODS = "Tensor[] captured, str? score_mod, Tensor[] mask_captured, str? mask_mod"
SCORE = f"{write_operator_schema(Score)}, str backend, {BLOCKS}, {MODS}"

# Positions in these arguments: of two fields from the start, of the callables from the end.
BIAS, SINKS = Score._fields.index("bias"), Score._fields.index("sinks")
CAPTURED, MOD, MASK_CAPTURED, MASK = range(-4, 0)

SAVED_TENSORS = 8  # of the autograd function, before the captured ones: q, k, v, out, lse, rest, bias, sinks

torch.library.define(
    "flashattn::attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {SCORE}) -> (Tensor out, Tensor lse, Tensor rest)",
)
torch.library.define(
    "flashattn::attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rest, "
    f"bool with_grad_bias, bool[] with_grad_captured, {SCORE}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_sinks, Tensor[] grad_captured)",
)
torch.library.define(
    "flashattn::attention_stats",
    f"(Tensor q, Tensor k, {SCORE}) -> (Tensor max_scores, Tensor max_logit, Tensor entropy, Tensor column_sums)",
)


# ------------------------------------------------------------------------------------------------ scores as arguments


def flatten(score: Score, backend: str) -> tuple:
    """A score and the backend as operators take them, up to the callables."""
    blocks = (None,) * 4 if score.block_mask is None else score.block_mask[1:]
    return *score[:SCORE_FIELDS], backend, *blocks


def flatten_mods(score: Score) -> tuple:
    """A score's callables as operators take them."""
    written: tuple = ()
    for mod, arguments in ((score.score_mod, 5), (score.block_mask and score.block_mask.mask, 4)):
        written += ([], None) if mod is None else (list(mod.captured), mod_text.write(mod.graph.graph, arguments))
    return written


def unflatten(flat: Sequence) -> tuple[Score, str]:
    """(score, backend) from the arguments of an operator."""
    fields, (backend, *blocks, captured, mod, mask_captured, mask) = flat[:SCORE_FIELDS], flat[SCORE_FIELDS:]
    score_mod = None if mod is None else Traced(mod_text.read(mod), tuple(captured))
    block_mask = None if mask is None else BlockMask(Traced(mod_text.read(mask), tuple(mask_captured)), *blocks)
    return Score._make((*fields, score_mod, block_mask)), backend


def has_mods(score: Score) -> bool:
    return score.score_mod is not None or score.block_mask is not None


def dispatch(operator: str, tensors: tuple, score: Score, backend: str):
    """Call an operator of ours. The first of the tensors is q."""
    operands = (*tensors, *flatten(score, backend))
    if has_mods(score) and torch.compiler.is_dynamo_compiling():
        mask = None if score.block_mask is None else score.block_mask.mask
        return mods_in_graph.call(operator, operands, score.score_mod, mask)
    return getattr(torch.ops.flashattn, operator).default(*operands, *flatten_mods(score))


# ------------------------------------------------------------------------------------------------ the calls


def attention(q: Tensor, k: Tensor, v: Tensor, score: Score, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable in q, k, v, bias, sinks and the tensors that a score_mod captured."""
    captured: tuple = ()
    if has_mods(score) and not torch.compiler.is_dynamo_compiling():
        captured = () if score.score_mod is None else score.score_mod.captured
        _refuse_capture_of_mods(score, captured, backend)
    inputs = (q, k, v, score.bias, score.sinks, *captured)
    must_dispatch, requires_grad = tracing.choose_path(*inputs)
    if must_dispatch:
        if (vmap := tracing.find_vmap()) is not None:
            run = functools.partial(attention, backend=backend)
            mapped = folding.map_call(vmap, q, k, v, score, run)
            if mapped is not None:
                return mapped
        tracing.refuse_onnx("attention_forward")
        out, lse, _ = dispatch("attention_forward", (q, k, v), score, backend)
        return out, lse
    if requires_grad:
        return FlashAttention.apply(*inputs[:5], score, backend, *captured)
    out, lse, _ = BACKENDS[backend].forward(q, k, v, score)
    return out, lse


def _refuse_capture_of_mods(score: Score, captured: tuple[Tensor, ...], backend: str) -> None:
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in captured)
    if needs_gradients or not BACKENDS[backend].CAPABILITIES.captures_mods:
        name = "block_mask" if score.score_mod is None else "score_mod"
        tracing.refuse_capture(name, "only the triton kernels can be, which sum no gradients of captured tensors")


def replace_trained(score: Score, bias: Tensor | None, sinks: Tensor | None) -> Score:
    """The score with these; itself where nothing changes, since `_replace` takes as long as a launch."""
    if score.bias is bias and score.sinks is sinks:
        return score
    return score._replace(bias=bias, sinks=sinks)


BIAS_INPUT, INPUTS = 3, 7  # of q, k, v, bias, sinks, score and backend, which precede the captured tensors


class FlashAttention(torch.autograd.Function):
    """The operator's shortcut past the dispatcher."""

    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, score, backend, *captured):
        out, lse, rest = BACKENDS[backend].forward(q, k, v, score)
        ctx.score, ctx.backend, ctx.captured = replace_trained(score, None, None), backend, len(captured)
        ctx.save_for_backward(q, k, v, out, lse, rest, bias, sinks, *captured, *score.saved_tensors())
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, rest, bias, sinks, *captured = ctx.saved_tensors[: SAVED_TENSORS + ctx.captured]
        if grad_out is None and grad_lse is None:
            return (None,) * (INPUTS + len(captured))
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        score = replace_trained(ctx.score, bias, sinks)
        needed = bias is not None and ctx.needs_input_grad[BIAS_INPUT], ctx.needs_input_grad[INPUTS:]
        *gradients, grad_captured = call_backward(
            grad_out, grad_lse, Saved(q, k, v, out, lse, rest), score, ctx.backend, *needed
        )
        return *gradients, None, None, *grad_captured


def call_backward(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, backend: str, with_grad_bias: bool,
    with_grad_captured: Sequence[bool],
) -> tuple:  # fmt: skip
    """`differentiate`, through the dispatcher where `must_dispatch` says so."""
    # Gradients are computed with gradients enabled only to be differentiated again, by the operator's rules.
    dispatched = tracing.choose_path(grad_out)[0] or any(map(tracing.is_legacy_batched, (grad_out, grad_lse)))
    if not (dispatched or torch.is_grad_enabled()):
        return differentiate(grad_out, grad_lse, saved, score, backend, with_grad_bias, with_grad_captured)
    gradients = torch.ops.flashattn.attention_backward.default(
        grad_out, grad_lse, *saved[:5], replace_none(saved.rest, saved.lse), with_grad_bias, list(with_grad_captured),
        *flatten(score, backend), *flatten_mods(score),
    )  # fmt: skip
    return drop_unneeded(gradients, with_grad_bias, score.sinks is not None, with_grad_captured)


def drop_unneeded(gradients: tuple, with_grad_bias: bool, has_sinks: bool, with_grad_captured: Sequence[bool]) -> tuple:
    """`differentiate`'s result from the operator's, which has an empty tensor where that has None."""
    *of_qkv, of_bias, of_sinks, of_captured = gradients
    kept = [x if needed else None for x, needed in zip(of_captured, with_grad_captured, strict=True)]
    return *of_qkv, of_bias if with_grad_bias else None, of_sinks if has_sinks else None, kept


def differentiate(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, backend: str, with_grad_bias: bool,
    with_grad_captured: Sequence[bool],
) -> tuple:  # fmt: skip
    """The gradients of q, k, v, bias and sinks, and a list of those of the tensors that a score_mod captured; None for
    one that is not needed."""
    captured = () if score.score_mod is None else score.score_mod.captured
    totals = new_totals(captured, with_grad_captured, saved.lse.dtype)
    *gradients, grad_bias = BACKENDS[backend].backward(grad_out, grad_lse, saved, score, with_grad_bias, totals)
    grad_sinks = None if score.sinks is None else compute_sink_gradient(grad_out, grad_lse, saved, score.sinks)
    return *gradients, grad_bias, grad_sinks, cast_totals(totals, captured)


def new_totals(captured: Sequence[Tensor], needed: Sequence[bool], dtype: torch.dtype) -> list[Tensor | None]:
    """Memory for the gradients of captured tensors that are needed."""
    return [torch.zeros_like(x, dtype=dtype) if n else None for x, n in zip(captured, needed, strict=True)]


def cast_totals(totals: Sequence[Tensor | None], captured: Sequence[Tensor]) -> list[Tensor | None]:
    return [cast_like(total, x) for total, x in zip(totals, captured, strict=True)]


def compute_sink_gradient(grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, sinks: Tensor) -> Tensor:
    """A sink is a key of value 0 that every query attends to: its ds is p (0 - delta)."""
    p, delta = compute_sink_weights(grad_out, grad_lse, saved, sinks)
    return (-p * delta).sum((0, 2)).to(sinks.dtype)


def compute_sink_weights(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, sinks: Tensor
) -> tuple[Tensor, Tensor]:
    """(p, delta), (batch, heads, seq_q): the weights of sinks, exp(sink - lse - rest), 0 in fully masked rows, and
    delta = rowsum(grad_out * out) - grad_lse."""
    lse = saved.lse
    delta = (grad_out.to(lse.dtype) * saved.out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    exponent = sinks.to(lse.dtype)[:, None] - lse
    p = torch.exp(exponent if saved.rest is None else exponent - saved.rest)
    return torch.where(lse == -math.inf, 0, p), torch.where(lse == -math.inf, 0, delta)


# ------------------------------------------------------------------------------------------------ attention_forward


@implement_with_autograd("attention_forward")
def _(q, k, v, *flat):
    score, backend = unflatten(flat)
    out, lse, rest = BACKENDS[backend].forward(q, k, v, score)
    return out, lse, replace_none(rest, lse)


@torch.library.register_fake("flashattn::attention_forward")
def fake_forward(q, k, v, *flat):
    fields, backend, mod = flat[:SCORE_FIELDS], flat[SCORE_FIELDS], flat[MOD]
    score = Score._make((*fields, mod, None))  # with the text: reading it takes long
    lse = q.new_empty(q.shape[:3], dtype=find_accumulation_dtype(q))
    rest = lse.new_empty(q.shape[:3] if BACKENDS[backend].has_rest(q, score) else 0)
    return new_result(q, v.shape[-1], score.cu_seqlens is not None), lse, rest


# ------------------------------------------------------------------------------------------------ attention_backward


def make_saved(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: Tensor) -> Saved:
    return Saved(q, k, v, out, lse, rest if rest.shape == lse.shape else None)


@implement_with_autograd("attention_backward")
def _(grad_out, grad_lse, q, k, v, out, lse, rest, with_grad_bias, with_grad_captured, *flat):
    score, backend = unflatten(flat)
    saved = make_saved(q, k, v, out, lse, rest)
    gradients = differentiate(grad_out, grad_lse, saved, score, backend, with_grad_bias, with_grad_captured)
    return fill_unneeded(*gradients, like=lse)


def fill_unneeded(grad_q, grad_k, grad_v, grad_bias, grad_sinks, grad_captured, *, like: Tensor) -> tuple:
    """The operator's result from `differentiate`'s: the reverse of `drop_unneeded`."""
    others = (replace_none(x, like) for x in (grad_bias, grad_sinks))
    return grad_q, grad_k, grad_v, *others, [replace_none(x, like) for x in grad_captured]


@torch.library.register_fake("flashattn::attention_backward")
def fake_gradients(grad_out, grad_lse, q, k, v, out, lse, rest, with_grad_bias, with_grad_captured, *flat):
    score, captured = Score(*flat[:SCORE_FIELDS]), flat[CAPTURED]
    packed = score.cu_seqlens is not None
    needed = (score.bias if with_grad_bias else None, score.sinks)
    others = (lse.new_empty(0) if x is None else x.new_empty(x.shape) for x in needed)
    grad_captured = [
        x.new_empty(x.shape) if needed else lse.new_empty(0)
        for x, needed in zip(captured, with_grad_captured, strict=True)
    ]
    return *(new_result(x, x.shape[-1], packed) for x in (q, k, v)), *others, grad_captured


# ------------------------------------------------------------------------------------------------ attention_stats


@implement_with_autograd("attention_stats")
@torch.no_grad()
def _(q, k, *flat):
    score, backend = unflatten(flat)
    return BACKENDS[backend].attention_stats(q, k, score)


@torch.library.register_fake("flashattn::attention_stats")
def _(q, k, *_):
    batch, heads, seq_q, _ = q.shape
    shapes = (batch, heads, seq_q), (heads,), (batch, heads, seq_q), (batch, heads, k.shape[2])
    return tuple(q.new_empty(shape, dtype=find_accumulation_dtype(q)) for shape in shapes)
