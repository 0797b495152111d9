"""The cases of MultiheadAttention, and what compares one with torch.nn's."""

import pytest
import torch

import flashattn
from tests.common import assert_as_exact_as_torch

CONSTRUCTORS = {
    "plain": {},
    "batch_first": dict(batch_first=True),
    "no_bias": dict(bias=False),
    "other_widths": dict(kdim=20, vdim=12),
    "bias_kv": dict(add_bias_kv=True, batch_first=True),
    "zero_attn": dict(add_zero_attn=True),
    "everything": dict(add_bias_kv=True, add_zero_attn=True, kdim=20, vdim=12, batch_first=True),
}
# (attn_mask, key_padding_mask): "bool", "float", "heads" (of every batch row and head) or None
MASKS = {
    "none": (None, None),
    "attn": ("bool", None),
    "attn_float": ("float", None),
    "attn_of_heads": ("heads", None),
    "padding": (None, "bool"),
    "both": ("bool", "bool"),
    "both_float": ("float", "float"),
    "attn_float_padding": ("float", "bool"),
    "attn_of_heads_padding_float": ("heads", "float"),
}
BATCH, HEADS, SEQ_Q, SEQ_K, WIDTH = 3, 4, 19, 23, 32


def make_modules(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, **CONSTRUCTORS[kind])
    ours = flashattn.MultiheadAttention(WIDTH, HEADS, **CONSTRUCTORS[kind])
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert not any(ours.load_state_dict(theirs.state_dict()))
    return ours, theirs


def make_inputs(kind: str, batched: bool = True) -> list[torch.Tensor]:
    options = CONSTRUCTORS[kind]
    widths = (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    shapes = [(seq, BATCH, width) for seq, width in zip((SEQ_Q, SEQ_K, SEQ_K), widths, strict=True)]
    if not batched:
        return [torch.randn(seq, width) for seq, _, width in shapes]
    return [torch.randn(s).transpose(0, 1) if options.get("batch_first") else torch.randn(s) for s in shapes]


def make_masks(name: str) -> dict[str, torch.Tensor]:
    attn, padding = MASKS[name]
    shape = (BATCH * HEADS, SEQ_Q, SEQ_K) if attn == "heads" else (SEQ_Q, SEQ_K)
    made = {}
    if attn is not None:
        made["attn_mask"] = torch.randn(shape) if attn == "float" else torch.rand(shape) > 0.7
    if padding is not None:
        keys = torch.rand(BATCH, SEQ_K) > 0.8
        made["key_padding_mask"] = keys if padding == "bool" else keys * -3.0
    return made


def check(kind: str, name: str, need_weights: bool) -> None:
    compare(*make_modules(kind), make_inputs(kind), need_weights=need_weights, **make_masks(name))


def compare(ours, theirs, x, **options) -> None:
    """Under the error rule; the truth is torch.nn's module in float64."""

    def run(layer, dtype):
        layer = layer.to(dtype)
        leaves = [t.to(dtype).requires_grad_() for t in x]
        given = {n: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for n, t in options.items()}
        out, weights = layer(*leaves, **given)
        gradients = torch.autograd.grad(out.square().sum(), [*leaves, *layer.parameters()])
        return [out, *([] if weights is None else [weights]), *gradients]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
        results, by_torch, truth = run(ours, torch.float32), run(theirs, torch.float32), run(theirs, torch.float64)
    for i, (a, b, t) in enumerate(zip(results, by_torch, truth, strict=True)):
        assert_as_exact_as_torch(a, b, t, f"result {i}")
