"""The calls of flash_attn: signatures as the package has them, results as flashattn.attention's."""

import inspect

import numpy as np
import pytest
import torch

import flashattn
from flashattn.compat import flash_attn
from tests.common import BACKENDS, device_of

# FlashAttention-2's parameters, order and defaults, after the tensors.
REST = dict(
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
)  # fmt: skip
PACKED = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]


@pytest.mark.parametrize(
    "name, tensors",
    [
        ("flash_attn_func", ["q", "k", "v"]),
        ("flash_attn_kvpacked_func", ["q", "kv"]),
        ("flash_attn_qkvpacked_func", ["qkv"]),
        ("flash_attn_varlen_func", ["q", "k", "v", *PACKED]),
        ("flash_attn_varlen_kvpacked_func", ["q", "kv", *PACKED]),
        ("flash_attn_varlen_qkvpacked_func", ["qkv", "cu_seqlens", "max_seqlen"]),
    ],
)
def test_signatures(name, tensors):
    rest = REST | {"block_table": None} if name == "flash_attn_varlen_func" else REST
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert [*parameters] == [*tensors, *rest]
    assert {n: p.default for n, p in parameters.items() if n not in tensors} == rest


def test_signature_of_the_cache_call():
    parameters = inspect.signature(flash_attn.flash_attn_with_kvcache).parameters
    expected = dict(
        k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None,
        block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
        alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    )  # fmt: skip
    assert [*parameters] == ["q", "k_cache", "v_cache", *expected]
    assert {n: p.default for n, p in parameters.items() if n in expected} == expected


OPTIONS = {
    "plain": ({}, {}),
    "causal": (dict(causal=True), dict(causal=True)),
    "window": (dict(window_size=(7, -1)), dict(window=(7, None))),
    "window_causal": (dict(window_size=(7, 3), causal=True), dict(window=(7, 0))),
    "window_of_one": (dict(window_size=(0, 0)), dict(window=(0, 0))),
    "window_of_none": (dict(window_size=(None, None), softcap=None), {}),
    "window_of_a_tensor": (dict(window_size=torch.tensor([7, -1])), dict(window=(7, None))),
    "scale_of_a_tensor": (dict(softmax_scale=torch.tensor(0.25)), dict(scale=0.25)),
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


STARTS_Q, STARTS_K = torch.tensor([0, 7, 7, 20]).int(), torch.tensor([0, 10, 14, 40]).int()


@pytest.mark.parametrize("name", OPTIONS)
def test_varlen_as_attention_varlen(name):
    theirs, ours = OPTIONS[name]
    q, kv = torch.randn(20, 4, 16), torch.randn(40, 2, 2, 16)
    out, lse, weights = flash_attn.flash_attn_varlen_kvpacked_func(
        q, kv, STARTS_Q, STARTS_K, 13, 26, **theirs, return_attn_probs=True
    )
    expected, expected_lse = flashattn.attention_varlen(
        q, *kv.unbind(1), STARTS_Q, STARTS_K, 13, 26, **ours, return_lse=True
    )
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert weights is None
    again = flash_attn.flash_attn_varlen_func(q, *kv.unbind(1), STARTS_Q, STARTS_K, 13, 26, **theirs)
    assert torch.equal(again, out)


def test_varlen_lengths_of_tensors():
    """As a batch has them that nobody has made ints of."""
    q, kv = torch.randn(20, 4, 16), torch.randn(40, 2, 2, 16)
    out = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, STARTS_Q, STARTS_K, STARTS_Q.diff().max(), np.int64(26))
    assert torch.equal(out, flash_attn.flash_attn_varlen_kvpacked_func(q, kv, STARTS_Q, STARTS_K, 13, 26))


def test_varlen_qkvpacked():
    qkv = torch.randn(20, 3, 4, 16)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, STARTS_Q, 13, causal=True)
    assert torch.equal(out, flashattn.attention_varlen(*qkv.unbind(1), STARTS_Q, STARTS_Q, causal=True))


def in_pages(x, starts, page_size):
    """(pages, page table) of packed rows, the pages in no order."""
    lengths = starts.diff().tolist()
    width = max(-(-n // page_size) for n in lengths)
    table = torch.randperm(len(lengths) * width + 2)[: len(lengths) * width].view(len(lengths), width).int()
    pages = torch.full((len(lengths) * width + 2, page_size, *x.shape[1:]), torch.nan)
    for rows, own in zip(x.split(lengths), table, strict=True):
        for i, row in enumerate(rows):
            pages[own[i // page_size], i % page_size] = row
    return pages, table


def test_varlen_of_pages():
    q, k = torch.randn(20, 4, 16), torch.randn(40, 2, 16)
    pages, table = in_pages(k, STARTS_K, 8)
    out = flash_attn.flash_attn_varlen_func(q, pages, pages, STARTS_Q, STARTS_K, 13, 26, causal=True, block_table=table)
    assert torch.equal(out, flashattn.attention_varlen(q, k, k, STARTS_Q, STARTS_K, 13, 26, causal=True))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lies", ["rows", "pages", "chosen"])
def test_with_kvcache(lies, name):
    """Each row is attention over its own keys, the new ones among them."""
    theirs, ours = OPTIONS[name]
    lengths, seq = (10, 4, 26), 3
    q, k, v = (torch.randn(3, seq, heads, 16) for heads in (4, 2, 2))
    old = torch.randn(2, 3, 32, 2, 16)
    options = dict(cache_seqlens=torch.tensor(lengths).int())
    if lies == "rows":
        caches = old.clone()
    elif lies == "chosen":
        caches = torch.full((2, 7, 32, 2, 16), torch.nan)
        options["cache_batch_idx"] = torch.tensor([5, 0, 3]).int()
        caches[:, [5, 0, 3]] = old
    else:
        starts = torch.tensor([0, 32, 64, 96])
        caches, tables = zip(*(in_pages(x.flatten(0, 1), starts, 8) for x in old), strict=True)
        caches = torch.stack([caches[0], in_table(caches[1], tables[1], tables[0])])
        options["block_table"] = tables[0]
    out, lse = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, **options, **theirs, return_softmax_lse=True)
    for b, n in enumerate(lengths):
        keys, values = (torch.cat([x[b, :n], y[b]])[None].transpose(1, 2) for x, y in ((old[0], k), (old[1], v)))
        expected, expected_lse = flashattn.attention(
            q[b : b + 1].transpose(1, 2), keys, values, **ours, return_lse=True
        )
        torch.testing.assert_close(out[b : b + 1].transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b : b + 1], expected_lse, rtol=1e-5, atol=1e-5)
    again = flash_attn.flash_attn_with_kvcache(
        q, *caches, **(options | {"cache_seqlens": torch.tensor(lengths).int() + seq}), **theirs
    )
    assert torch.equal(again, out)  # what was written is there


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_kvcache_of_any_strides(backend):
    """Caches whose last dimension is not contiguous, and a part of a page table: written and read as others are."""
    device = device_of(backend)
    q, k, v = (torch.randn(2, 3, heads, 16).to(device) for heads in (4, 2, 2))
    caches = torch.randn(2, 6, 8, 2, 16).to(device)
    table = torch.arange(6, dtype=torch.int32, device=device).view(2, 3)
    strided = caches.mT.contiguous().mT, torch.cat([table, table - 9], 1).view(2, 2, 3).mT.contiguous()[..., 0]
    lengths = torch.tensor([10, 4], dtype=torch.int32, device=device)
    results = []
    for (keys, values), own in ((caches, table), strided):
        with flashattn.use_backend(backend):
            out = flash_attn.flash_attn_with_kvcache(
                q, keys, values, k, v, cache_seqlens=lengths, block_table=own, causal=True
            )
        results.append([out, keys, values])
    assert all(map(torch.equal, *results))


def in_table(pages, table, wanted):
    """Pages moved so that another table reads the same."""
    moved = torch.full_like(pages, torch.nan)
    moved[wanted.flatten().long()] = pages[table.flatten().long()]
    return moved


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_with_kvcache_rotates(causal, interleaved):
    q, k, v = (torch.randn(2, 3, 2, 16) for _ in range(3))
    angles = torch.rand(16, 5) * 6
    caches = torch.zeros(2, 2, 16, 2, 16)
    out = flash_attn.flash_attn_with_kvcache(
        q, *caches, k, v, angles.cos(), angles.sin(), cache_seqlens=torch.tensor([0, 4]).int(), causal=causal,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    position = torch.arange(3) if causal else torch.zeros(3).long()
    turned = turn(q[:1], angles[position], interleaved), turn(k[:1], angles[:3], interleaved), v[:1]
    expected = flashattn.attention(*(x.transpose(1, 2) for x in turned), causal=causal)
    torch.testing.assert_close(out[:1].transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches[0, 1, 4:7], turn(k[1:], angles[4:7], interleaved)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_with_kvcache_rotates_more_queries_than_new_keys(causal):
    """A causal query past the new keys has a position too, for which the table must have a row."""
    q, k, v, caches = torch.randn(1, 6, 2, 16), *torch.randn(2, 1, 1, 2, 16), torch.zeros(2, 1, 16, 2, 16)
    angles = torch.rand(16, 5)

    def call(rows):
        table = angles[:rows].cos(), angles[:rows].sin()
        options = dict(cache_seqlens=4, causal=causal, window_size=(-1, -1) if causal else (9, 9))
        return flash_attn.flash_attn_with_kvcache(q, *caches.clone(), k, v, *table, **options)

    assert torch.equal(call(10), call(16))
    with pytest.raises(ValueError, match=r"rotary.cos must have a row for each of 10 positions, got 9"):
        call(9)


def turn(x, angles, interleaved):
    """Pairs of the first 10 numbers of (1, seq, heads, 16) as complex numbers."""
    part = x[..., :10].unflatten(-1, (5, 2)) if interleaved else torch.stack(x[..., :10].split(5, -1), -1)
    turned = torch.view_as_real(
        torch.view_as_complex(part.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat((turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1), x[..., 10:]), -1)


def test_with_kvcache_leftpad_and_whole_cache():
    q, caches = torch.randn(2, 1, 4, 16), torch.randn(2, 2, 12, 2, 16)
    out = flash_attn.flash_attn_with_kvcache(q, *caches, cache_leftpad=torch.tensor([0, 5]).int())
    for b, begin in enumerate((0, 5)):
        own = (x[b : b + 1, begin:].transpose(1, 2) for x in caches)
        expected = flashattn.attention(q[b : b + 1].transpose(1, 2), *own)
        torch.testing.assert_close(out[b : b + 1].transpose(1, 2), expected, rtol=1e-5, atol=1e-6)


def test_dropout_comes_from_the_generator():
    x = torch.randn(1, 40, 2, 16)
    torch.manual_seed(3)
    first = flash_attn.flash_attn_func(x, x, x, dropout_p=0.4)
    torch.manual_seed(3)
    assert torch.equal(first, flash_attn.flash_attn_func(x, x, x, dropout_p=0.4))


X, CU = torch.zeros(1, 5, 2, 8), torch.tensor([0, 5]).int()
WRONG = {
    "window": (lambda: flash_attn.flash_attn_func(X, X, X, window_size=(-2, 0)), "window_size must be"),
    "softcap": (lambda: flash_attn.flash_attn_func(X, X, X, softcap=-1.0), "softcap must be at least 0"),
    "rank": (lambda: flash_attn.flash_attn_func(X[0], X, X), r"q must be a tensor \(batch, seq, heads, head_dim\)"),
    "full": (
        lambda: flash_attn.flash_attn_with_kvcache(X, X, X, X, X, cache_seqlens=1),
        "k_cache must have room for 6",
    ),
    "page": (
        lambda: flash_attn.flash_attn_with_kvcache(X, X, X, cache_seqlens=5, block_table=torch.ones(1, 2).int()),
        "block_table must point at pages 0 to 0 of the cache, got 1",
    ),
    "varlen_page": (
        lambda: flash_attn.flash_attn_varlen_func(
            X[0], X, X, CU, CU, 5, 5, block_table=torch.full((1, 1), -1, dtype=torch.int32)
        ),
        "block_table must point at pages 0 to 0 of the cache, got -1",
    ),
    "cache_heads": (
        lambda: flash_attn.flash_attn_with_kvcache(X, X[..., :4], X, cache_seqlens=5),
        "k_cache must have q's head_dim 8",
    ),
    "cache_batch": (
        lambda: flash_attn.flash_attn_with_kvcache(X, X[:0], X[:0]),
        "k_cache must have q's batch 1, got 0",
    ),
    "only_k": (lambda: flash_attn.flash_attn_with_kvcache(X, X, X, X), "k and v must be given together"),
    "dropout": (lambda: flash_attn.flash_attn_func(X, X, X, dropout_p=1.0), r"dropout_p must be in \[0, 1\), got 1.0"),
    "rows": (
        lambda: flash_attn.flash_attn_with_kvcache(X, X, X, cache_batch_idx=torch.zeros(1, 1).int()),
        r"cache_batch_idx must be \(batch,\) = \(1,\), got shape \(1, 1\)",
    ),
    "packed": (lambda: flash_attn.flash_attn_qkvpacked_func(X), r"qkv must be a tensor \(batch, seq, 3, heads"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    call, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message) as caught:  # as the package raises
        call()
    assert isinstance(caught.value, ValueError)


WRONG_TYPES = {
    "rows": (
        lambda: flash_attn.flash_attn_with_kvcache(X, X, X, cache_batch_idx=[0]),
        r"cache_batch_idx must be a torch\.Tensor, got list",
    ),
    "window": (
        lambda: flash_attn.flash_attn_func(X, X, X, window_size=("a", 1)),
        r"window_size must be \(left, right\), each an int or None, got \('a', 1\)",
    ),
    "mixed": (lambda: flash_attn.flash_attn_func(X, X.half(), X), r"k must have q's dtype torch\.float32"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types_are_named(name):
    call, message = WRONG_TYPES[name]
    with pytest.raises(RuntimeError, match=message) as caught:
        call()
    assert isinstance(caught.value, TypeError)
