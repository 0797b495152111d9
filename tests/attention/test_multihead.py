"""flashattn.MultiheadAttention against torch.nn's, with the same parameters: outputs, weights and gradients."""

import inspect

import pytest
import torch

import flashattn
from flashattn import modules
from tests.attention.multihead_cases import (
    CONSTRUCTORS,
    HEADS,
    MASKS,
    SEQ_K,
    SEQ_Q,
    WIDTH,
    check,
    compare,
    make_inputs,
    make_modules,
)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", CONSTRUCTORS)
def test_as_torch(kind, name, need_weights):
    check(kind, name, need_weights)


def test_weights_of_each_head():
    compare(*make_modules("plain"), make_inputs("plain"), average_attn_weights=False)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["plain", "batch_first"])
def test_without_a_batch(kind, need_weights):
    padding = torch.rand(SEQ_K) > 0.8
    x = make_inputs(kind, batched=False)
    compare(
        *make_modules(kind), x, need_weights=need_weights, key_padding_mask=padding, attn_mask=torch.randn(SEQ_Q, SEQ_K)
    )


def test_self_attention_with_a_causal_hint():
    ours, theirs = make_modules("batch_first")
    x, mask = torch.randn(2, 20, WIDTH), torch.ones(20, 20).triu(1).bool()
    expected = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0], expected)
    with pytest.raises(ValueError, match="attn_mask must be given where is_causal"):
        ours(x, x, x, is_causal=True)


def test_same_interface():
    ours, theirs = flashattn.MultiheadAttention, torch.nn.MultiheadAttention
    for method in ("__init__", "forward"):
        a, b = (inspect.signature(getattr(c, method)).parameters for c in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in a.values()] == [(p.name, p.default, p.kind) for p in b.values()]


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_padded_row_gives_zeros(need_weights):
    ours, _ = make_modules("batch_first")
    x = torch.randn(2, 7, WIDTH, requires_grad=True)
    padding = torch.tensor([[False] * 7, [True] * 7])
    for options in ({}, {"attn_mask": torch.zeros(7, 7, dtype=torch.bool)}):
        out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights, **options)
        assert torch.equal(out[1], ours.out_proj.bias.expand(7, -1))
        assert weights is None or (weights[1] == 0).all()
        out.sum().backward()
    assert x.grad.isfinite().all()


def test_dropout_in_training_only():
    ours = flashattn.MultiheadAttention(WIDTH, HEADS, dropout=0.5)
    x = torch.randn(9, 2, WIDTH)
    assert not torch.equal(*(ours(x, x, x, need_weights=False)[0] for _ in range(2)))
    ours.eval()
    assert torch.equal(*(ours(x, x, x, need_weights=False)[0] for _ in range(2)))


def test_in_a_transformer_layer():
    """torch.nn's own layer, with its attention replaced."""
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
    x, padding = torch.randn(2, 9, WIDTH), torch.tensor([[False] * 9, [False] * 5 + [True] * 4])
    expected = layer(x, src_key_padding_mask=padding)
    ours = flashattn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    torch.testing.assert_close(layer(x, src_key_padding_mask=padding), expected)


def test_an_encoder_layer_calls_it_in_evaluation(monkeypatch):
    """PyTorch's fast path, which takes the parameters and calls no module, is left alone."""
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True).eval()
    ours = flashattn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    ours.load_state_dict(layer.self_attn.state_dict())
    x = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        expected = layer(x)
        layer.self_attn = ours
        called = []
        monkeypatch.setattr(modules, "attention", lambda *a, **o: called.append(a) or flashattn.attention(*a, **o))
        for encoder in (layer, torch.nn.TransformerEncoder(layer, 2).layers[1]):
            torch.testing.assert_close(encoder(x), expected)
    assert len(called) == 2


@pytest.mark.parametrize("norm", [flashattn.RMSNorm(WIDTH, eps=1e-5), flashattn.LayerNorm(WIDTH, weight_offset=1.0)])
def test_an_encoder_layer_calls_other_norms_in_evaluation(norm):
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
    layer.norm1 = norm
    x = torch.randn(2, 9, WIDTH)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_masks_of_whole_numbers_are_refused(name):
    """They would be added to the scores."""
    ours = flashattn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x, mask = torch.randn(2, 9, WIDTH), torch.ones((9, 9) if name == "attn_mask" else (2, 9), dtype=torch.uint8)
    with pytest.raises(TypeError, match=f"{name} must be bool .* or floating .*, got torch.uint8"):
        ours(x, x, x, **{name: mask})


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("kind", ["batch_first", "no_bias", "other_widths"])
def test_nested(kind, layout):
    """Each sequence as alone, with gradients of parameters."""
    ours, theirs = make_modules(kind)
    theirs.batch_first = True
    lengths, widths = (5, 1, 9), (WIDTH, theirs.kdim, theirs.vdim)
    parts = [[torch.randn(n, width) for n in lengths] for width in widths]
    x = [torch.nested.nested_tensor(p, layout=layout) for p in parts]
    if kind == "batch_first":
        x, parts = x[:1] * 3, parts[:1] * 3
    out, weights = ours(*x, need_weights=False)
    assert weights is None
    expected = [theirs(*(t[None] for t in alone), need_weights=False)[0][0] for alone in zip(*parts, strict=True)]
    for a, b in zip(out.unbind(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    gradients = (
        torch.autograd.grad(sum(y.square().sum() for y in ys), [*layer.parameters()])
        for ys, layer in ((out.unbind(), ours), (expected, theirs))
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_nested_inputs_do_not_take():
    ours, _ = make_modules("batch_first")
    x, y = (
        torch.nested.nested_tensor([torch.randn(n, WIDTH) for n in ns], layout=torch.jagged) for ns in ((2, 3), (3, 2))
    )
    wrong = [
        ((x, x, x), {}, "need_weights must be False where query is nested"),
        (
            (x, x, x),
            dict(need_weights=False, attn_mask=torch.zeros(3, 3)),
            "attn_mask must be None where query is nested",
        ),
        ((x, torch.zeros(2, 3, WIDTH), x), dict(need_weights=False), "key must be nested"),
        ((x, x, y), dict(need_weights=False), r"value must have key's lengths, \[2, 3\], got \[3, 2\]"),
    ]
    for given, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            ours(*given, **options)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_all(need_weights):
    ours, theirs = (m(WIDTH, HEADS, dropout=1.0) for m in (flashattn.MultiheadAttention, torch.nn.MultiheadAttention))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(9, 2, WIDTH)
    results = [layer(x, x, x, need_weights=need_weights) for layer in (ours, theirs)]
    torch.testing.assert_close(*(out for out, _ in results))
