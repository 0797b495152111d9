"""Attention with a `score_mod` or a `block_mask`.

On a GPU the kernels take Triton functions generated from the callables. On the CPU the scores are formed by blocks of
queries, in PyTorch's own operations, forward and backward, so that memory stays linear. Blocks of keys that a mask
leaves out are never looked at. Gradients of captured tensors are always summed by blocks, in one order: a kernel would
have to add them atomically.

PyTorch's operators hold no callables: these take each as text (`mod_text.py`) and the tensors that it captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from . import checks, mod_text, mods_in_graph, ops
from . import score as score_settings
from .backends import BACKENDS, reference
from .score import Score
from .score_mod import BlockMask, Traced

# What an operator carries of a BlockMask besides its callable, and its callables.
BLOCKS = "Tensor? partial, Tensor? full, SymInt? block_q, SymInt? block_k"
MODS = "Tensor[] captured, str? score_mod, Tensor[] mask_captured, str? mask_mod"

torch.library.define(
    "flashattn::flex_forward",
    f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, {score_settings.SCHEMA}, str backend, "
    f"{BLOCKS}, {MODS}) -> (Tensor out, Tensor lse, Tensor rest)",
)
torch.library.define(
    "flashattn::flex_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor out, "
    f"Tensor lse, Tensor rest, bool with_grad_bias, bool[] with_grad_captured, {score_settings.SCHEMA}, str backend, "
    f"{BLOCKS}, {MODS}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_sinks, Tensor[] grad_captured)",
)
FIELDS = ops.fields_of(Score)


def flat(score: Score, backend: str) -> tuple:
    """A score's fields, the backend and the blocks, as operators take them."""
    blocks = (None,) * 4 if score.block_mask is None else score.block_mask[1:]
    return *score[:FIELDS], backend, *blocks


def mods(score: Score) -> tuple:
    """A score's callables, as operators take them."""
    written = []
    for mod, arguments in ((score.score_mod, 5), (score.block_mask and score.block_mask.mask, 4)):
        written += ([], None) if mod is None else (list(mod.captured), mod_text.write(mod.graph.graph, arguments))
    return tuple(written)


def unflat(bias: Tensor | None, sinks: Tensor | None, settings: tuple) -> tuple[Score, str]:
    """(score, backend) from what `flat` and `mods` give."""
    fields, (backend, *blocks, captured, mod, mask_captured, mask) = settings[:FIELDS], settings[FIELDS:]
    return Score(
        *fields, bias, sinks,
        None if mod is None else Traced(mod_text.read(mod), tuple(captured)),
        None if mask is None else BlockMask(Traced(mod_text.read(mask), tuple(mask_captured)), *blocks),
    ), backend  # fmt: skip


def call(operator: str, inputs: tuple, score: Score, backend: str):
    """An operator of ours, of inputs and a score that may have callables. The first of the inputs is q."""
    operands = (*inputs, *flat(score, backend))
    if not torch.compiler.is_dynamo_compiling():
        return getattr(torch.ops.flashattn, operator).default(*operands, *mods(score))
    mask = None if score.block_mask is None else score.block_mask.mask
    return mods_in_graph.call(operator, operands, score.score_mod, mask)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, score: Score, backend: str
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable in q, k, v, bias, sinks and what the score_mod captured."""
    if torch.compiler.is_dynamo_compiling():
        out, lse, _ = call("flex_forward", (q, k, v, bias, sinks), score, backend)
        return out, lse
    captured = () if score.score_mod is None else score.score_mod.captured
    checks.refuse_tangents(q, k, v, bias, sinks, *captured)
    if backend != "triton" or (torch.is_grad_enabled() and any(x.requires_grad for x in captured)):
        name = "block_mask" if score.score_mod is None else "score_mod"
        checks.refuse_capture(name, "only the triton kernels can be, which sum no gradients of captured tensors")
    if ops.is_watched() or q.is_meta:
        checks.refuse_onnx("flex_forward")
        out, lse, _ = call("flex_forward", (q, k, v, bias, sinks), score, backend)
        return out, lse
    return Flex.apply(q, k, v, bias, sinks, score, backend, *captured)


class Flex(torch.autograd.Function):
    """The operator's shortcut, past the dispatcher."""

    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, score, backend, *captured):
        score = ops.whole(score, bias, sinks)
        out, lse, rest = BACKENDS[backend].forward(q, k, v, score)
        ctx.score, ctx.backend = score._replace(bias=None, sinks=None), backend
        ctx.captured = len(captured)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse, rest, *captured, *score.tensors())
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, bias, sinks, out, lse, rest, *captured = ctx.saved_tensors[: 8 + ctx.captured]
        checks.refuse_tangents(grad_out, grad_lse)
        if grad_out is None and grad_lse is None:
            return (None,) * (7 + len(captured))
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        score = ops.whole(ctx.score, bias, sinks)
        with_grad_bias = bias is not None and ctx.needs_input_grad[3]
        *gradients, sums = differentiate(
            grad_out, grad_lse, q, k, v, out, lse, rest, with_grad_bias, ctx.needs_input_grad[7:], score, ctx.backend
        )
        return *gradients, None, None, *sums


def differentiate(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rest: Tensor | None, with_grad_bias: bool, with_grad_captured, score: Score, backend: str,
) -> tuple:  # fmt: skip
    """The gradients of q, k, v, bias and sinks, and a list of those of what the score_mod captured; None for one that
    is not asked for."""
    captured = () if score.score_mod is None else score.score_mod.captured
    sums = [
        torch.zeros_like(x, dtype=lse.dtype) if needed else None
        for x, needed in zip(captured, with_grad_captured, strict=True)
    ]
    sums_captured = any(x is not None for x in sums)
    if sums_captured:
        *gradients, grad_bias = reference.dense_backward(
            grad_out, grad_lse, q, k, v, score, with_grad_bias, grad_captured=sums
        )
    if not sums_captured or backend == "triton":
        *gradients, grad_bias = BACKENDS[backend].backward(
            grad_out, grad_lse, q, k, v, out, lse, rest, score, with_grad_bias
        )
    grad_bias = grad_bias.to(score.bias.dtype) if with_grad_bias else None
    grad_sinks = None if score.sinks is None else ops.sink_gradient(grad_out, grad_lse, out, lse, rest, score)
    sums = [None if total is None else total.to(x.dtype) for total, x in zip(sums, captured, strict=True)]
    return *gradients, grad_bias, grad_sinks, sums


# ------------------------------------------------------------------------------------------------ operators


def implement_with_autograd(operator: str) -> Callable:
    """Register the implementation of an operator that differentiates callables. The dispatcher runs it below autograd,
    where that would give zeros."""

    def register(run: Callable) -> None:
        def implementation(*args):
            checks.refuse_tangents(*args)
            if torch.is_inference_mode_enabled():  # which has no autograd to bring back
                return run(*args)
            keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
            with contextlib.ExitStack() as enabled:
                for key in keys:
                    enabled.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
                return run(*args)

        ops.implement(operator)(implementation)

    return register


@implement_with_autograd("flex_forward")
def _(q, k, v, bias, sinks, *settings):
    score, backend = unflat(bias, sinks, settings)
    out, lse, rest = BACKENDS[backend].forward(q, k, v, score)
    return out, lse, ops.empty_if_none(rest, lse)


@torch.library.register_fake("flashattn::flex_forward")
def _(q, k, v, bias, sinks, *settings):
    out, lse, rest = ops.fake_forward(q, k, v, bias, sinks, *settings[: FIELDS + 1])
    return out, lse, rest if settings[-3] is None else lse.new_empty(lse.shape)  # no score_mod leaves scores raw


def _context(ctx, inputs, output):
    q, k, v, bias, sinks, *ctx.settings, captured, ctx.mod, mask_captured, ctx.mask = inputs
    ctx.captured = len(captured)
    # The last ones, as `Score.tensors` says, so that autograd notices where one is changed.
    watched = [x for x in (*ctx.settings, *mask_captured) if isinstance(x, Tensor) and not x.is_inference()]
    ctx.mask_captured = mask_captured
    ctx.save_for_backward(q, k, v, bias, sinks, *output, *captured, *watched)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx, grad_out, grad_lse, grad_rest):
    q, k, v, bias, sinks, out, lse, rest, *captured = ctx.saved_tensors[: 8 + ctx.captured]
    nothing = (None,) * len(ctx.settings)
    nothing_of_mask = [None] * len(ctx.mask_captured)
    if grad_out is None and grad_lse is None:
        return *[None] * 5, *nothing, [None] * ctx.captured, None, nothing_of_mask, None
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    with_grad_bias = bias is not None and ctx.needs_input_grad[3]
    with_grad_captured = list(ctx.needs_input_grad[-4])
    *gradients, grad_bias, grad_sinks, sums = torch.ops.flashattn.flex_backward.default(
        grad_out, grad_lse, q, k, v, bias, sinks, out, lse, rest, with_grad_bias, with_grad_captured, *ctx.settings,
        captured, ctx.mod, ctx.mask_captured, ctx.mask,
    )  # fmt: skip
    sums = [x if wanted else None for x, wanted in zip(sums, with_grad_captured, strict=True)]
    return (
        *gradients, grad_bias if with_grad_bias else None, None if sinks is None else grad_sinks, *nothing, sums, None,
        nothing_of_mask, None,
    )  # fmt: skip


torch.library.register_autograd("flashattn::flex_forward", _gradients, setup_context=_context)


@implement_with_autograd("flex_backward")
def _(
    grad_out, grad_lse, q, k, v, bias, sinks, out, lse, rest, with_grad_bias, with_grad_captured, *settings
):  # fmt: skip
    score, backend = unflat(bias, sinks, settings)
    rest = rest if rest.shape == lse.shape else None
    *gradients, grad_bias, grad_sinks, sums = differentiate(
        grad_out, grad_lse, q, k, v, out, lse, rest, with_grad_bias, with_grad_captured, score, backend
    )
    missing = (ops.empty_if_none(x, lse) for x in (grad_bias, grad_sinks))
    return *gradients, *missing, [ops.empty_if_none(x, lse) for x in sums]


@torch.library.register_fake("flashattn::flex_backward")
def _(
    grad_out, grad_lse, q, k, v, bias, sinks, out, lse, rest, with_grad_bias, with_grad_captured, *settings
):  # fmt: skip
    captured = settings[-4]
    gradients = ops.fake_backward(
        grad_out, grad_lse, q, k, v, bias, sinks, out, lse, rest, with_grad_bias, *settings[: FIELDS + 1]
    )
    sums = [
        x.new_empty(x.shape) if wanted else lse.new_empty(0)
        for x, wanted in zip(captured, with_grad_captured, strict=True)
    ]
    return *gradients, sums


torch.library.register_autograd("flashattn::flex_backward", ops.not_twice)
