"""Decoding with caches on every backend against the float64 truth of each sequence alone; pages; what is refused."""

import pytest
import torch

import flashattn
from flashattn.backends import BACKENDS as BACKENDS_BY_NAME
from tests.attention.decode_cases import (
    LONG,
    STEPS,
    check,
    check_bits_of_batch_and_pages,
    check_bits_of_longest_row_and_capacity,
)
from tests.common import BACKENDS, DTYPES, find_device, randn, skip_if_wrong_there


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_against_float64(step, dtype, backend):
    skip_if_wrong_there(backend, dtype)
    check(step, dtype, backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", LONG, ids=lambda step: step.name)
def test_long_caches(step, dtype, backend):
    check(step, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [(1, 1, 1), (20, 3, 9)], ids=str)
def test_same_bits_whatever_the_batch_and_the_pages(counts, backend):
    check_bits_of_batch_and_pages(counts, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_whatever_the_longest_row_and_the_capacity(backend):
    check_bits_of_longest_row_and_capacity(backend)


def test_pages_are_found_by_multiplication():
    """As the kernels divide by the page size: exactly, for every number of 31 bits."""
    kernels = pytest.importorskip("flashattn.kernels.pages")
    last = 2**31 - 1
    for size in (*range(1, 70), 100, 127, 1000, 4096, 4097, 10**6, 2**30, 2**30 + 1, last):
        pages = kernels.page_table_arg(torch.zeros(1, 1, dtype=torch.int32), size)
        assert 2**31 <= pages.factor < 2**32  # of one type, for which the kernel is compiled once
        whole = last // size * size
        for j in {0, 1, size - 1, size, size + 1, 12345678, whole - 1, whole, last - 1, last}:
            assert 2 * j * pages.factor >> 32 >> pages.shift == j // size


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_attention(backend):
    """Token by token, or all at once: attention with a causal mask."""
    q, k, v = (randn(1, heads, 12, 16, dtype=torch.float32, device=find_device(backend)) for heads in (4, 2, 2))
    cache = flashattn.KVCache(1, 2, 12, 16, device=q.device)
    with flashattn.use_backend(backend):
        steps = [flashattn.decode(*(x[:, :, i : i + 1] for x in (q,)), cache, k[:, :, i : i + 1], v[:, :, i : i + 1])
                 for i in range(12)]  # fmt: skip
        torch.testing.assert_close(torch.cat(steps, 2), flashattn.attention(q, k, v, causal=True), rtol=1e-5, atol=1e-6)
        assert torch.equal(flashattn.decode(q[:, :, 11:], cache), steps[-1])  # nothing new: the same question again


def make_tokens(n, batch=1):
    return [torch.randn(batch, heads, n, 8) for heads in (2, 1, 1)]


def run_step(cache, n, batch=1):
    q, k, v = make_tokens(n, batch)
    return flashattn.decode(q, cache, k, v)


def test_forked_sequences_share_pages():
    cache = flashattn.PagedKVCache(pages=6, page_size=4, kv_heads=1, head_dim=8)
    first = cache.add()
    run_step(cache.select([first]), 6)
    second, third = cache.fork(first), cache.fork(first)
    assert cache.free_pages == 4
    q, k, v = make_tokens(1, 3)
    before = [flashattn.decode(q[:1], cache.select([s])) for s in (first, second, third)]
    assert torch.equal(before[0], before[1])
    assert torch.equal(before[0], before[2])
    out = flashattn.decode(q, cache.select([first, second, third]), k, v)
    assert cache.free_pages == 2  # two of three had to copy the page they share, the last kept it
    # Each sees the prefix and its own token.
    for b, sequence in enumerate((first, second, third)):
        alone = flashattn.KVCache(1, 1, 16, 8)
        pages = cache._pages[sequence]
        alone.k[0, :, :7] = cache.k[pages].transpose(0, 1).flatten(1, 2)[:, :7]
        alone.v[0, :, :7] = cache.v[pages].transpose(0, 1).flatten(1, 2)[:, :7]
        assert torch.equal(alone.k[0, :, 6], k[b, :, 0])
        alone._lengths = [7]
        assert torch.equal(flashattn.decode(q[b : b + 1], alone), out[b : b + 1])
    cache.free(second), cache.free(first), cache.free(third)
    assert cache.free_pages == 6
    assert cache.sequences == []


def test_the_last_of_those_that_share_a_page_keeps_it():
    """So one free page is enough for two sequences."""
    cache = flashattn.PagedKVCache(pages=3, page_size=4, kv_heads=1, head_dim=8)
    first = cache.add()
    run_step(cache.select([first]), 6)
    both = [first, cache.fork(first)]
    run_step(cache.select(both), 1, batch=2)
    assert cache.free_pages == 0
    assert [cache.length(sequence) for sequence in both] == [7, 7]


def test_truncate():
    cache = flashattn.KVCache(1, 1, 8, 8)
    q, k, v = make_tokens(6)
    flashattn.decode(q, cache, k, v)
    cache.truncate([3])
    again = flashattn.decode(q[:, :, 3:], cache, k[:, :, 3:], v[:, :, 3:])
    torch.testing.assert_close(again, flashattn.attention(q, k, v, causal=True)[:, :, 3:])
    paged = flashattn.PagedKVCache(4, 2, 1, 8)
    a = paged.add()
    run_step(paged, 7)
    paged.truncate(a, 3)
    assert (paged.length(a), paged.free_pages) == (3, 2)


@pytest.mark.parametrize("paged", [False, True])
def test_a_full_cache_is_left_as_it_is(paged):
    cache = flashattn.PagedKVCache(2, 4, 1, 8) if paged else flashattn.KVCache(1, 1, 8, 8)
    if paged:
        cache.add()
    run_step(cache, 6)
    q, k, v = make_tokens(3)
    before = cache.k.clone(), cache.v.clone()
    with pytest.raises(ValueError, match="cache must have room for the new tokens"):
        flashattn.decode(q, cache, k, v)
    for now, then in zip((cache.k, cache.v), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)  # nothing was ever written to the rest
    assert run_step(cache, 2).shape == (1, 2, 2, 8)


@pytest.mark.parametrize("paged", [False, True])
def test_a_step_that_breaks_off_leaves_lengths_and_pages(paged, monkeypatch):
    cache = flashattn.PagedKVCache(3, 4, 1, 8) if paged else flashattn.KVCache(1, 1, 12, 8)
    rows = cache.select([cache.add()]) if paged else cache
    q, k, v = make_tokens(5)
    flashattn.decode(q[:, :, :3], rows, k[:, :, :3], v[:, :, :3])

    def break_off(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(BACKENDS_BY_NAME["cpu"], "decode", break_off)
        with pytest.raises(MemoryError):
            run_step(rows, 6)
    assert rows.lengths == [3]
    assert not paged or cache.free_pages == 2
    again = flashattn.decode(q[:, :, 3:], rows, k[:, :, 3:], v[:, :, 3:])
    torch.testing.assert_close(again, flashattn.attention(q, k, v, causal=True)[:, :, 3:])


def test_a_batch_without_room_takes_no_page():
    cache = flashattn.PagedKVCache(3, 4, 1, 8)
    a, b = cache.add(), cache.add()
    with pytest.raises(ValueError, match="they need 4 pages of 4, 3 are free"):
        run_step(cache.select([a, b]), 5, batch=2)
    assert cache.free_pages == 3
    assert cache.length(a) == 0


Q, K, V = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8)
TABLE = torch.ones(4, 4)
WRONG = {
    "dropout": (dict(dropout_p=0.1), ValueError, "dropout_p must be 0: decode is for inference, got 0.1"),
    "gradient": (dict(q=Q.clone().requires_grad_()), ValueError, "q must not require a gradient"),
    "only_k": (dict(v=None), ValueError, "k and v must be given together"),
    "cache": (dict(cache=K), TypeError, "cache must be a KVCache or a PagedKVCache, got Tensor"),
    "dtype": (dict(q=Q.half()), TypeError, "q must have the cache's dtype torch.float32, got torch.float16"),
    "batch": (dict(q=Q.repeat(2, 1, 1, 1)), ValueError, "q must have the cache's batch 1, got 2"),
    "heads": (dict(k=K.repeat(1, 2, 1, 1)), ValueError, r"k must be \(batch, kv_heads, seq_q, dim\) = \(1, 1, 3, 8\)"),
    "head_dim": (dict(q=Q[..., :4]), ValueError, "q must have the cache's head_dim 8, got 4"),
    "rotary": (dict(rotary=(TABLE, TABLE)), TypeError, r"rotary must be a flashattn.Rotary\(cos, sin\), got tuple"),
    "rotary_wide": (dict(rotary=flashattn.Rotary(TABLE, TABLE.repeat(1, 2))), ValueError, "rotary.sin must be"),
    "rotary_short": (dict(rotary=flashattn.Rotary(TABLE[:2], TABLE[:2])), ValueError, "a row for each of 3 positions"),
    "rotary_of_the_past": (
        dict(k=None, v=None, rotary=flashattn.Rotary(TABLE, TABLE)), ValueError, "q must not have more tokens than"
    ),
    "window": (dict(window=(-2, 0)), ValueError, r"window must be \(left, right\).*\(-2, 0\)"),
    "mask": (dict(mask=torch.ones(3, 4).bool()), ValueError, r"mask must be.*\(1, 2, 3, 3\), got shape \(3, 4\)"),
    "q_lengths": (dict(q_lengths=torch.tensor([4])), ValueError, "q_lengths must be between 0 and.*3, got 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    changed, kind, message = WRONG[name]
    cache = flashattn.KVCache(1, 1, 16, 8)
    with pytest.raises(kind, match=message):
        flashattn.decode(**(dict(q=Q, cache=cache, k=K, v=V) | changed))
    assert cache.lengths == [0]


@pytest.mark.parametrize(
    "do, message",
    [
        (lambda cache: cache.fork(5), r"sequence must be one of the cache's \[0\], got 5"),
        (lambda cache: cache.free(-1), "sequence must be one of"),
        (lambda cache: cache.select([0, 0]), r"sequences must be different ones, got \[0, 0\]"),
        (lambda cache: cache.truncate(0, 3), "length must be between 0 and the 0 tokens that are there, got 3"),
        (lambda cache: flashattn.KVCache(1, 0, 4, 8), "kv_heads must be at least 1, got 0"),
        (lambda cache: flashattn.KVCache(2, 1, 4, 8).truncate([0]), "one number for each of 2 rows, got 1"),
    ],
)
def test_wrong_use_of_a_cache_is_named(do, message):
    cache = flashattn.PagedKVCache(2, 4, 1, 8)
    cache.add()
    with pytest.raises(ValueError, match=message):
        do(cache)
