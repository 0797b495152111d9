"""The calls of flash_attn: signatures as the package has them, results as flashattn.attention's."""

import inspect

import numpy as np
import pytest
import torch

import flashattn
from flashattn.compat import flash_attn
from tests.common import BACKENDS, find_device
from tests.compat.flash_attn_cases import (
    OPTIONS,
    STARTS_K,
    STARTS_Q,
    check_as_attention,
    check_kvcache,
    check_kvcache_rotates,
    check_varlen_of_pages,
)

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


@pytest.mark.parametrize("name", OPTIONS)
def test_as_attention(name):
    check_as_attention(name)


def test_qkvpacked():
    qkv = torch.randn(2, 20, 3, 4, 16)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(out, flash_attn.flash_attn_func(*qkv.unbind(2), causal=True))


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


def test_varlen_of_pages():
    check_varlen_of_pages()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lies", ["rows", "pages", "chosen"])
def test_with_kvcache(lies, name):
    check_kvcache(lies, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_kvcache_of_any_strides(backend):
    """Caches whose last dimension is not contiguous, and a part of a page table: written and read as others are."""
    device = find_device(backend)
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


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_with_kvcache_rotates(causal, interleaved):
    check_kvcache_rotates(causal, interleaved)


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
    "only_cos": (
        lambda: flash_attn.flash_attn_with_kvcache(X, X, X, X[:, :1], X[:, :1], X[0, :, 0, :4], cache_seqlens=1),
        "rotary_sin must be given with rotary_cos",
    ),
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
