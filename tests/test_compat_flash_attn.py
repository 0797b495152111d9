"""The dense calls of flash_attn: signatures as the package has them, results as flashattn.attention's."""

import inspect

import pytest
import torch

import flashattn
from flashattn.compat import flash_attn

# FlashAttention-2's parameters, order and defaults, after the tensors.
REST = dict(
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "name, tensors",
    [
        ("flash_attn_func", ["q", "k", "v"]),
        ("flash_attn_kvpacked_func", ["q", "kv"]),
        ("flash_attn_qkvpacked_func", ["qkv"]),
    ],
)
def test_signatures(name, tensors):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert [*parameters] == [*tensors, *REST]
    assert {n: p.default for n, p in parameters.items() if n not in tensors} == REST


OPTIONS = {
    "plain": ({}, {}),
    "causal": (dict(causal=True), dict(causal=True)),
    "window": (dict(window_size=(7, -1)), dict(window=(7, None))),
    "window_causal": (dict(window_size=(7, 3), causal=True), dict(window=(7, 0))),
    "window_of_one": (dict(window_size=(0, 0)), dict(window=(0, 0))),
    "scale": (dict(softmax_scale=0.2), dict(scale=0.2)),
    "softcap": (dict(softcap=2.0), dict(softcap=2.0)),
    "slopes": (dict(alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4])),) * 2,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_as_attention(name):
    theirs, ours = OPTIONS[name]
    q = torch.randn(2, 20, 4, 16, requires_grad=True)
    kv = torch.randn(2, 33, 2, 2, 16, requires_grad=True)
    out, lse, weights = flash_attn.flash_attn_kvpacked_func(q, kv, **theirs, return_attn_probs=True)
    expected, expected_lse = flashattn.attention(q.transpose(1, 2), *kv.permute(2, 0, 3, 1, 4), **ours, return_lse=True)
    assert torch.equal(out, expected.transpose(1, 2))
    assert torch.equal(lse, expected_lse)
    assert weights is None
    assert out.is_contiguous()
    again = flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **theirs)
    assert torch.equal(again, out)
    gradients = [torch.autograd.grad(x.square().sum(), (q, kv)) for x in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_qkvpacked():
    qkv = torch.randn(2, 20, 3, 4, 16)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(out, flash_attn.flash_attn_func(*qkv.unbind(2), causal=True))


def test_dropout_comes_from_the_generator():
    x = torch.randn(1, 40, 2, 16)
    torch.manual_seed(3)
    first = flash_attn.flash_attn_func(x, x, x, dropout_p=0.4)
    torch.manual_seed(3)
    assert torch.equal(first, flash_attn.flash_attn_func(x, x, x, dropout_p=0.4))


X = torch.zeros(1, 5, 2, 8)
WRONG = {
    "window": (lambda: flash_attn.flash_attn_func(X, X, X, window_size=(-2, 0)), "window_size must be"),
    "softcap": (lambda: flash_attn.flash_attn_func(X, X, X, softcap=-1.0), "softcap must be at least 0"),
    "rank": (lambda: flash_attn.flash_attn_func(X[0], X, X), r"q must be a tensor \(batch, seq, heads, head_dim\)"),
    "packed": (lambda: flash_attn.flash_attn_qkvpacked_func(X), r"qkv must be a tensor \(batch, seq, 3, heads"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
