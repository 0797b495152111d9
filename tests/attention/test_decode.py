"""Decoding with caches on every backend against the float64 truth of each sequence alone; pages; what is refused."""

import itertools
from typing import NamedTuple

import pytest
import torch

import flashattn
from flashattn.backends import BACKENDS as BACKENDS_BY_NAME
from flashattn.cache import CacheView
from flashattn.score import Score
from tests.attention.truth import Case, names_of, torch_attention
from tests.common import BACKENDS, DTYPES, assert_as_exact_as_torch, device_of, randn, skip_if_wrong_there


class Step(NamedTuple):
    """A step of a batch: tokens each sequence has, tokens that are new, and how the keys lie."""

    name: str
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    features: Case
    page_size: int | None = None
    rotary: int | None = None  # rotated pairs
    interleaved: bool = False


def features(**options) -> Case:
    return Case("", **(dict(heads=4, kv_heads=2, head_dim=24, head_dim_v=16, causal=True) | options))


STEPS = [
    Step("one_token", (40, 7, 63), (1, 1, 1), features(head_dim=64, head_dim_v=64)),
    Step("pages", (40, 7, 63), (1, 1, 1), features(), 16),
    Step("pages_of_one", (5, 17), (1, 1), features(kv_heads=4), 1),
    Step("pages_of_seven", (33, 0, 70), (2, 5, 1), features(), 7),
    Step("several_tokens", (40, 0, 63), (3, 5, 0), features(window=(20, None))),
    Step("prompts", (0, 0, 0), (33, 40, 1), features(), 16),
    Step("a_chunk", (10, 40), (20, 33), features(sinks=True), 16),
    Step("rotary", (40, 7, 63), (1, 2, 1), features(), None, 12),
    Step("rotary_partial", (40, 7, 63), (3, 3, 3), features(), 7, 5),
    Step("rotary_interleaved", (40, 7), (1, 1), features(), 16, 12, True),
    Step("rotary_partial_interleaved", (40, 7), (9, 20), features(), None, 8, True),
    Step("window_sinks", (63, 40), (1, 2), features(window=(17, None), sinks=True), 16),
    Step("window_of_everything", (63, 40), (1, 2), features(window=(2**31 - 1, None)), 16),
    Step("softcap", (63, 40), (1, 2), features(softcap=2.0), 16),
    Step("slopes", (63, 40), (1, 2), features(slopes="bh")),
    Step("mask", (63, 40), (2, 2), features(mask="bqk"), 7),
    Step("bias", (63, 40), (1, 2), features(bias="hqk")),
    Step("not_causal", (63, 40), (4, 4), features(causal=False), 16),
    Step(
        "everything", (63, 40, 9), (3, 2, 1),
        features(window=(50, None), softcap=4.0, slopes="h", mask="bk", bias="bhqk", sinks=True), 16, 8,
    ),
]  # fmt: skip
LONG = [
    Step("long", (1200, 700, 3), (1, 1, 1), features(heads=8, head_dim=64, head_dim_v=64), 64),
    Step("long_window", (1200, 700, 3), (2, 1, 2), features(heads=8, window=(600, None), sinks=True)),
]


def make_cache(step: Step, dtype, device):
    """(cache, what decode takes)."""
    case, batch, capacity = step.features, len(step.lengths), max(map(sum, zip(step.lengths, step.counts, strict=True)))
    sizes, kind = (case.head_dim, case.head_dim_v), dict(dtype=dtype, device=device)
    if step.page_size is None:
        cache = flashattn.KVCache(batch, case.kv_heads, capacity, *sizes, **kind)
        cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)  # nothing that is not there may be read
        return cache
    pages = batch * -(-capacity // step.page_size)
    cache = flashattn.PagedKVCache(pages, step.page_size, case.kv_heads, *sizes, **kind)
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)
    ids = [cache.add() for _ in range(batch)]
    return cache.select(ids[::-1])


def rotate(x, positions, table, interleaved):
    """By complex numbers, in the dtype's accumulation type."""
    angles = torch.complex(*table)[positions]  # (positions, pairs)
    n = angles.shape[1]
    wide = x.double() if x.dtype == torch.float64 else x.float()
    part = wide[..., : 2 * n]
    pairs = part.unflatten(-1, (n, 2)) if interleaved else torch.stack(part.split(n, -1), -1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angles.to(pairs.dtype.to_complex()))
    turned = turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * n :]), -1)


def plane(x, b, counts, length):
    x = x if x.shape[0] == 1 else x[b : b + 1]
    return x[:, :, : counts if x.shape[2] > 1 else 1, : length if x.shape[3] > 1 else 1]


def expected(step: Step, options, others, table, q, k, v):
    """(out, lse) of the new tokens of each row, from all keys of the row."""
    case, outs, lses = step.features, [], []
    for b, (before, count) in enumerate(zip(step.lengths, step.counts, strict=True)):
        length = before + count
        q_b, k_b, v_b = q[b : b + 1, :, :count], k[b : b + 1, :, :length], v[b : b + 1, :, :length]
        if table is not None:
            q_b = rotate(q_b, torch.arange(before, length, device=q.device), table, step.interleaved)
            k_b = rotate(k_b, torch.arange(length, device=q.device), table, step.interleaved)
        own = dict(options)
        if "mask" in own:
            own["mask"] = plane(own["mask"], b, count, length)
        if case.slopes == "bh":
            own["alibi_slopes"] = own["alibi_slopes"][b : b + 1]
        mine = [plane(x, b, count, length).to(q) if x.dim() == 4 else x.to(q) for x in others]
        out, lse = torch_attention(case._replace(batch=1, seq_q=count, seq_k=length), own, q_b, k_b, v_b, *mine)
        outs.append(out[0].transpose(0, 1)), lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def inputs_of(step: Step, dtype, device):
    case, batch = step.features, len(step.lengths)
    longest, seq_q = max(map(sum, zip(step.lengths, step.counts, strict=True))), max(step.counts)
    q = randn(batch, case.heads, seq_q, case.head_dim, dtype=dtype, device=device)
    k = randn(batch, case.kv_heads, longest, case.head_dim, dtype=dtype, device=device)
    v = randn(batch, case.kv_heads, longest, case.head_dim_v, dtype=dtype, device=device)
    whole = case._replace(batch=batch, seq_q=seq_q, seq_k=longest)
    options = dict(causal=case.causal, window=case.window, softcap=case.softcap)
    if case.slopes is not None:
        options["alibi_slopes"] = torch.rand(*whole.shape(case.slopes)[2 - len(case.slopes) : 2], device=device)
    if case.mask is not None:
        options["mask"] = torch.rand(*whole.shape(case.mask), device=device) > 0.3
    others = [randn(*whole.shape(case.bias), dtype=dtype, device=device)] if case.bias is not None else []
    others += [randn(case.heads, dtype=dtype, device=device)] if case.sinks else []
    table = None
    if step.rotary is not None:
        angles = torch.rand(longest, step.rotary, device=device) * 6
        table = angles.cos(), angles.sin()
    return q, k, v, options, others, table


def decoded(step: Step, cache, options, others, table, q, k, v, backend):
    """(out, lse) of the new tokens, after the others were appended."""
    named = dict(zip(names_of(step.features)[3:], others, strict=True))
    rotary = None if table is None else flashattn.Rotary(*table, step.interleaved)
    lengths, counts = torch.tensor(step.lengths), torch.tensor(step.counts)
    before = max(step.lengths)
    with flashattn.use_backend(backend):
        if before:
            history = q.new_zeros(*q.shape[:2], before, q.shape[3])
            flashattn.decode(history, cache, k[:, :, :before], v[:, :, :before], rotary, q_lengths=lengths)
        new_k, new_v = (
            torch.stack([x[b].roll(-n, 1)[:, : q.shape[2]] for b, n in enumerate(step.lengths)]) for x in (k, v)
        )
        out, lse = flashattn.decode(
            q, cache, new_k, new_v, rotary, q_lengths=counts, return_lse=True, **options, **named
        )
    assert cache.lengths == [a + b for a, b in zip(step.lengths, step.counts, strict=True)]
    for b, n in enumerate(step.counts):
        assert (out[b, :, n:] == 0).all()
        assert (lse[b, :, n:] == -torch.inf).all()
    return (torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(step.counts)]) for x in (out, lse))


def check(step: Step, dtype, backend):
    device = device_of(backend)
    q, k, v, options, others, table = inputs_of(step, dtype, device)
    exact_table = None if table is None else [x.double() for x in table]
    truth = expected(step, options, others, exact_table, q.double(), k.double(), v.double())
    theirs = expected(step, options, others, table, q, k, v)
    ours = decoded(step, make_cache(step, dtype, device), options, others, table, q, k, v, backend)
    for name, x, y, t in zip(("out", "lse"), ours, theirs, truth, strict=True):
        assert_as_exact_as_torch(x, y, t, name)


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
    device = device_of(backend)
    step = Step("", (40, 63, 9), counts, features(window=(50, None), sinks=True), None, 8)
    q, k, v, options, others, table = inputs_of(step, torch.float32, device)

    def run(step, *x):
        return list(decoded(step, make_cache(step, torch.float32, device), options, others, table, *x, backend))

    together = run(step, q, k, v)
    for page_size in (1, 7, 64):
        assert all(map(torch.equal, run(step._replace(page_size=page_size), q, k, v), together))
    ends = list(itertools.accumulate(counts))
    for b in range(3):
        one = step._replace(lengths=step.lengths[b : b + 1], counts=counts[b : b + 1])
        one_q = q[b : b + 1] if len(set(counts)) > 1 else q[b : b + 1, :, : counts[b]]
        if one_q.shape[2] > counts[b]:  # padded to the same seq_q, with a second row of that length
            one = one._replace(lengths=(*one.lengths, 0), counts=(*one.counts, one_q.shape[2]))
            alone = run(one, one_q.repeat(2, 1, 1, 1), k[[b, 0]], v[[b, 0]])
        else:
            alone = run(one, one_q, k[b : b + 1], v[b : b + 1])
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x[: counts[b]], y[ends[b] - counts[b] : ends[b]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_whatever_the_longest_row_and_the_capacity(backend):
    """Rows of 1, 2 and 17 splits on a GPU, alone and beside each other, and in a cache with room for 32."""
    skip_if_wrong_there(backend, torch.float32)
    device, lengths = device_of(backend), (100, 300, 4200)
    q = randn(3, 2, 1, 16, dtype=torch.float32, device=device)
    k, v = (randn(3, 1, max(lengths), 16, dtype=torch.float32, device=device) for _ in range(2))
    score = Score(0.25, left=4150, right=0, sinks=randn(2, dtype=torch.float32, device=device))

    def run(row: slice, keys: int, capacity: int, longest: int, dtype=torch.float32, backend=backend):
        ends = torch.tensor(lengths[row], dtype=torch.int32, device=device)
        room = torch.full((len(ends), 1, capacity - keys, 16), torch.nan, device=device)
        caches = [torch.cat([x[row, :, :keys], room], 2).to(dtype) for x in (k, v)]
        own = score._replace(kv_lengths=ends, sinks=score.sinks.to(dtype))
        return BACKENDS_BY_NAME[backend].decode(
            q[row].to(dtype), CacheView(*caches, None, ends - 1, ends, longest), own
        )

    together = run(slice(0, 3), 4200, 4200, 4200)
    truth = run(slice(0, 3), 4200, 4200, 4200, torch.float64, "reference")
    theirs = run(slice(0, 3), 4200, 4200, 4200, torch.float32, "reference")
    for name, x, y, t in zip(("out", "lse"), together, theirs, truth, strict=True):
        assert_as_exact_as_torch(x, y, t, name)
    assert all(map(torch.equal, run(slice(0, 3), 4200, 9000, 9000), together))
    for b, n in enumerate(lengths):
        alone = run(slice(b, b + 1), n, n, n)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))


def test_pages_are_found_by_multiplication():
    """As the kernels divide by the page size: exactly, for every number of 31 bits."""
    kernels = pytest.importorskip("flashattn.kernels.decode")
    last = 2**31 - 1
    for size in (*range(1, 70), 100, 127, 1000, 4096, 4097, 10**6, 2**30, 2**30 + 1, last):
        pages = kernels.pages_arg(torch.zeros(1, 1, dtype=torch.int32), size)
        assert 2**31 <= pages.factor < 2**32  # of one type, for which the kernel is compiled once
        whole = last // size * size
        for j in {0, 1, size - 1, size, size + 1, 12345678, whole - 1, whole, last - 1, last}:
            assert 2 * j * pages.factor >> 32 >> pages.shift == j // size


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_attention(backend):
    """Token by token, or all at once: attention with a causal mask."""
    q, k, v = (randn(1, heads, 12, 16, dtype=torch.float32, device=device_of(backend)) for heads in (4, 2, 2))
    cache = flashattn.KVCache(1, 2, 12, 16, device=q.device)
    with flashattn.use_backend(backend):
        steps = [flashattn.decode(*(x[:, :, i : i + 1] for x in (q,)), cache, k[:, :, i : i + 1], v[:, :, i : i + 1])
                 for i in range(12)]  # fmt: skip
        torch.testing.assert_close(torch.cat(steps, 2), flashattn.attention(q, k, v, causal=True), rtol=1e-5, atol=1e-6)
        assert torch.equal(flashattn.decode(q[:, :, 11:], cache), steps[-1])  # nothing new: the same question again


def tokens(n, batch=1):
    return [torch.randn(batch, heads, n, 8) for heads in (2, 1, 1)]


def step(cache, n, batch=1):
    q, k, v = tokens(n, batch)
    return flashattn.decode(q, cache, k, v)


def test_forked_sequences_share_pages():
    cache = flashattn.PagedKVCache(pages=6, page_size=4, kv_heads=1, head_dim=8)
    first = cache.add()
    step(cache.select([first]), 6)
    second, third = cache.fork(first), cache.fork(first)
    assert cache.free_pages == 4
    q, k, v = tokens(1, 3)
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


def test_truncate():
    cache = flashattn.KVCache(1, 1, 8, 8)
    q, k, v = tokens(6)
    flashattn.decode(q, cache, k, v)
    cache.truncate([3])
    again = flashattn.decode(q[:, :, 3:], cache, k[:, :, 3:], v[:, :, 3:])
    torch.testing.assert_close(again, flashattn.attention(q, k, v, causal=True)[:, :, 3:])
    paged = flashattn.PagedKVCache(4, 2, 1, 8)
    a = paged.add()
    step(paged, 7)
    paged.truncate(a, 3)
    assert (paged.length(a), paged.free_pages) == (3, 2)


@pytest.mark.parametrize("paged", [False, True])
def test_a_full_cache_is_left_as_it_is(paged):
    cache = flashattn.PagedKVCache(2, 4, 1, 8) if paged else flashattn.KVCache(1, 1, 8, 8)
    if paged:
        cache.add()
    step(cache, 6)
    q, k, v = tokens(3)
    before = cache.k.clone(), cache.v.clone()
    with pytest.raises(ValueError, match="cache must have room for the new tokens"):
        flashattn.decode(q, cache, k, v)
    for now, then in zip((cache.k, cache.v), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)  # nothing was ever written to the rest
    assert step(cache, 2).shape == (1, 2, 2, 8)


@pytest.mark.parametrize("paged", [False, True])
def test_a_step_that_breaks_off_leaves_lengths_and_pages(paged, monkeypatch):
    cache = flashattn.PagedKVCache(3, 4, 1, 8) if paged else flashattn.KVCache(1, 1, 12, 8)
    rows = cache.select([cache.add()]) if paged else cache
    q, k, v = tokens(5)
    flashattn.decode(q[:, :, :3], rows, k[:, :, :3], v[:, :, :3])

    def break_off(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(BACKENDS_BY_NAME["cpu"], "decode", break_off)
        with pytest.raises(MemoryError):
            step(rows, 6)
    assert rows.lengths == [3]
    assert not paged or cache.free_pages == 2
    again = flashattn.decode(q[:, :, 3:], rows, k[:, :, 3:], v[:, :, 3:])
    torch.testing.assert_close(again, flashattn.attention(q, k, v, causal=True)[:, :, 3:])


def test_a_batch_without_room_takes_no_page():
    cache = flashattn.PagedKVCache(3, 4, 1, 8)
    a, b = cache.add(), cache.add()
    with pytest.raises(ValueError, match="they need 4 pages of 4, 3 are free"):
        step(cache.select([a, b]), 5, batch=2)
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
