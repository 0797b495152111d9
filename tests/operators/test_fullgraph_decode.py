"""Decoding in one graph of torch.compile, with a cache that the graph moves on, and the operators by which it does."""

import copy
import pickle
import threading

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import flashattn
from flashattn.compat.flash_attn import flash_attn_with_kvcache
from flashattn.score import SCORE_FIELDS, Score
from tests.operators.graphs import compiled, no_graphs  # noqa: F401  (a fixture)

OPS = torch.ops.flashattn
ROTARY = flashattn.Rotary(torch.randn(40, 4), torch.randn(40, 4))


pytestmark = pytest.mark.usefixtures("no_graphs")


def step_inputs(seq: int, batch: int = 2, heads: int = 4) -> list[torch.Tensor]:
    return [torch.randn(batch, n, seq, 8) for n in (heads, 2, 2)]


def contiguous():
    return flashattn.KVCache(2, 2, 30, 8)


def paged(sequences: int = 2):
    cache = flashattn.PagedKVCache(30, 4, 2, 8)
    for _ in range(sequences):
        cache.add()
    return cache


def selected():
    return paged(3).select([2, 0])


def assert_same(found, expected) -> None:
    for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(x, y)


def assert_steps_same(ours, plain, make, calls) -> list:
    """The graph's results on a cache and those without it on another; returns both caches."""
    caches = make(), make()
    for arguments in calls:
        assert_same(ours(caches[0], *arguments), plain(caches[1], *arguments))
    return caches


def step(cache, q, k, v):
    return flashattn.decode(q, cache, k, v, rotary=ROTARY, return_lse=True)


@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("make", [contiguous, paged, selected])
def test_steps(make, dynamic):
    """A prompt, then tokens: no length makes another graph, nor does another cache."""
    ours = compiled(step, dynamic)
    calls = [step_inputs(seq) for seq in (5, 1, 1, 1)]
    found, expected = assert_steps_same(ours, step, make, calls)
    frames = ours.counter.frame_count
    lengths = (
        cache.lengths if make is not paged else [*map(cache.length, cache.sequences)] for cache in (found, expected)
    )
    assert next(lengths) == next(lengths) == [8, 8]
    assert_steps_same(ours, step, make, calls)
    assert ours.counter.frame_count == frames


def test_every_option():
    def every(cache, q, k, v, counts, mask):
        return flashattn.decode(
            q, cache, k, v, window=(9, None), mask=mask, softcap=3.0, sinks=torch.ones(4), bias=torch.ones(4, 1, 1),
            alibi_slopes=torch.full((4,), 0.2), q_lengths=counts, scale=0.3, return_lse=True,
        )  # fmt: skip

    counts = torch.tensor([5, 2]), torch.tensor([1, 3]), torch.tensor([4, 0])
    calls = [(*step_inputs(5), n, torch.rand(5, 1) > 0.2) for n in counts]
    ours = compiled(every)
    assert_steps_same(ours, every, contiguous, calls)
    assert ours.counter.frame_count == 1


def test_sequences_that_change():
    """Which ones is decided in the graph; a page that they share is copied when it runs."""

    def forked():
        cache = paged(5)
        flashattn.decode(torch.ones(1, 4, 6, 8), cache.select([0]), *torch.ones(2, 1, 2, 6, 8))
        cache.fork(0)
        return cache

    def of_two(cache, a, b, q, k, v):
        return flashattn.decode(q, cache.select([a, b]), k, v)

    ours, pairs = compiled(of_two), ((2, 3), (0, 5), (5, 4), (3, 0))
    found, expected = assert_steps_same(ours, of_two, forked, [(*pair, *step_inputs(1)) for pair in pairs])
    assert found.free_pages == expected.free_pages
    assert ours.counter.frame_count <= 2
    with pytest.raises(ValueError, match=r"sequence must be one of the cache's .*, got 77"):
        ours(found, 77, 5, *step_inputs(1))


@torch.inference_mode()
def test_inductor_writes_to_the_caches_themselves():
    def layers(caches, q, k, v):
        for cache in caches:
            q = flashattn.decode(q, cache, k, v) + q
        return flashattn.decode(q, caches[0])

    caches, arguments = [[contiguous() for _ in range(2)] for _ in range(2)], step_inputs(3)
    found, (code,) = run_and_get_code(torch.compile(layers, fullgraph=True), caches[0], *arguments)
    torch.testing.assert_close(found, layers(caches[1], *arguments))
    assert [cache.lengths for cache in caches[0]] == [[3, 3]] * 2
    assert code.count("flashattn.step.default(") == 3
    assert "copy_" not in code
    assert "clone" not in code


def test_a_step_that_is_refused_changes_nothing():
    cache, ours = contiguous(), compiled(step)
    ours(cache, *step_inputs(20))
    kept = cache.k.clone()
    with pytest.raises(ValueError, match="cache must have room for the new tokens: row 0 has 20 of 30, 20 are new"):
        ours(cache, *step_inputs(20))
    with pytest.raises(ValueError, match="q must have the cache's batch 2, got 3"):
        compiled(step)(cache, *step_inputs(1, batch=3))
    assert cache.lengths == [20, 20]
    assert torch.equal(cache.k[:, :, :20], kept[:, :, :20])


UNSEEN = {
    "lengths": lambda cache, pages: cache.lengths,
    "truncate": lambda cache, pages: cache.truncate([0, 0]),
    "made": lambda cache, pages: contiguous().k,
    "length": lambda cache, pages: pages.length(0),
    "add": lambda cache, pages: pages.add(),
    "fork": lambda cache, pages: pages.fork(0),
    "free": lambda cache, pages: pages.free(0),
    "free_pages": lambda cache, pages: pages.free_pages,
    "sequences": lambda cache, pages: pages.sequences,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_a_graph_cannot_see_is_said(name):
    """Dynamo would take what was there when it traced for what is there when the graph runs."""
    with pytest.raises(Exception, match=r"a cache must be .* outside of what torch.compile traces"):
        compiled(lambda q, *caches: (q + 1, UNSEEN[name](*caches)))(torch.ones(2), contiguous(), paged())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_is_another_cache(duplicate):
    cache, ours = contiguous(), compiled(step)
    ours(cache, *step_inputs(3))
    other = duplicate(cache)
    ours(other, *step_inputs(2))
    assert (cache.lengths, other.lengths) == ([3, 3], [5, 5])
    assert torch.equal(cache.k[:, :, :3], other.k[:, :, :3])


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_step_moves_the_cache_on(strict):
    cache, arguments = contiguous(), step_inputs(2)

    class Step(torch.nn.Module):
        def forward(self, q, k, v):
            return step(cache, q, k, v)

    program = torch.export.export(Step(), tuple(arguments), strict=strict).module()
    assert cache.lengths == [0, 0]
    for _ in range(2):
        program(*arguments)
    assert cache.lengths == [4, 4]


def test_what_an_operator_got_of_a_cache_that_is_gone():
    number = contiguous()._number
    q, k, v = step_inputs(1)
    options = (None, None, None, False, *Score(0.3, right=0)[:SCORE_FIELDS], "cpu")
    with pytest.raises(ValueError, match="cache must be one of this process"):
        OPS.step(q, *torch.zeros(2, 2, 2, 30, 8), k, v, number, *options)


# ------------------------------------------------------------------------------------------------ flash_attn


def int32(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def caches(rows: int = 2, seq: int = 16):
    torch.manual_seed(3)
    return torch.randn(rows, seq, 2, 8), torch.randn(rows, seq, 2, 8)


def pages():
    return caches(7, 4)


TABLE = int32([1, 3, 4], [0, 2, 5])
WITH_KVCACHE = {
    "rotary": (caches, lambda c, n, q, k, v: dict(rotary_cos=ROTARY.cos, rotary_sin=ROTARY.sin, causal=True)),
    "one position": (caches, lambda c, n, q, k, v: dict(rotary_cos=ROTARY.cos, rotary_sin=ROTARY.sin)),
    "window": (caches, lambda c, n, q, k, v: dict(window_size=(3, 1), softcap=2.0, cache_leftpad=n - 1)),
    "alibi": (caches, lambda c, n, q, k, v: dict(alibi_slopes=torch.ones(4), return_softmax_lse=True)),
    "pages": (pages, lambda c, n, q, k, v: dict(block_table=TABLE, causal=True)),
    "rows": (lambda: caches(4), lambda c, n, q, k, v: dict(cache_batch_idx=int32(3, 1))),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", WITH_KVCACHE)
def test_with_kvcache(name, dynamic):
    """No lengths make another graph."""
    make, options = WITH_KVCACHE[name]

    def plain(cache, lengths, q, k, v):
        return flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=lengths, **options(cache, lengths, q, k, v))

    ours = compiled(plain, dynamic)
    calls = [(int32(n, 2), *(x.transpose(1, 2) for x in step_inputs(2))) for n in (3, 5, 7)]
    found, expected = assert_steps_same(ours, plain, make, calls[:1])
    frames = ours.counter.frame_count
    assert_same(found, expected)
    assert_same(*assert_steps_same(ours, plain, make, calls))
    assert ours.counter.frame_count == frames


def test_with_kvcache_of_one_length():
    def plain(cache, length, q, k, v):
        return flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=length), flash_attn_with_kvcache(q, *cache)

    ours = compiled(plain)
    calls = [(n, *(x.transpose(1, 2) for x in step_inputs(2))) for n in (3, 5, 7, 14)]
    assert_same(*assert_steps_same(ours, plain, caches, calls))
    assert ours.counter.frame_count == 2


@pytest.mark.parametrize("lengths", [int32(3, 15), int32(-1, 3)])
def test_lengths_are_checked_when_the_graph_runs(lengths):
    (q, k, v), cache = (x.transpose(1, 2) for x in step_inputs(2)), caches()
    for options in ({}, dict(rotary_cos=ROTARY.cos[:17], rotary_sin=ROTARY.sin[:17])):
        ours = compiled(lambda n, o=options: flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=n, **o))
        ours(int32(3, 14))
        with pytest.raises(ValueError, match=r"cache_seqlens must be between 0 and 1[456], got (15|-1)"):
            ours(lengths)


def test_pages_are_checked_when_the_graph_runs():
    q, cache = torch.randn(2, 1, 4, 8), pages()
    ours = compiled(lambda table: flash_attn_with_kvcache(q, *cache, cache_seqlens=int32(3, 9), block_table=table))
    ours(TABLE)
    with pytest.raises(
        ValueError, match="block_table or cache_batch_idx must point at pages 0 to 6 of the cache, got 7"
    ):
        ours(TABLE + 2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    q, k, v = step_inputs(2)
    starts = int32(3, 8)
    torch.library.opcheck(OPS.rotate.default, (q, starts, *ROTARY, backend))
    score = Score(0.3, right=0, kv_lengths=starts + 2, softcap=3.0, sinks=torch.randn(4))[:SCORE_FIELDS]
    contiguous, paged = (x.transpose(1, 2) for x in caches()), (x.transpose(1, 2) for x in pages())
    for cache, table in ((contiguous, None), (paged, TABLE)):
        arguments = q, *cache, k, v, table, starts, 10, *ROTARY, *score, backend
        torch.library.opcheck(OPS.decode.default, arguments)


def test_a_graph_is_the_thread_s_that_traces_it():
    """While one thread exports, another decodes and looks at its cache, and its lengths are checked."""
    inside, done = threading.Event(), threading.Event()

    class Waiting(torch.nn.Module):
        def forward(self, x):
            inside.set()
            assert done.wait(60)
            return x + 1

    thread = threading.Thread(target=lambda: torch.export.export(Waiting(), (torch.ones(2),), strict=False))
    thread.start()
    try:
        assert inside.wait(60)
        cache = contiguous()
        flashattn.decode(step_inputs(3)[0], cache, *step_inputs(3)[1:])
        assert cache.lengths == [3, 3]
        cache.truncate([1, 1])
        q = torch.zeros(2, 2, 5, 8)
        with pytest.raises(ValueError, match="kv_lengths must be between 0 and the sequence length 5, got 6"):
            flashattn.attention(q, q, q, kv_lengths=torch.tensor([3, 6]))
    finally:
        done.set()
        thread.join()


def test_no_two_processes_give_caches_the_same_numbers():
    """A program that one saved would find the other's cache."""
    numbers = {int(contiguous()._number) for _ in range(8)}
    assert len(numbers) == 8
    assert min(numbers) > 2**32


@pytest.mark.parametrize("name", ["bias", "sinks", "alibi_slopes"])
def test_gradients_that_decode_does_not_have_are_refused(name):
    x = {"bias": torch.zeros(1, 3), "sinks": torch.zeros(4), "alibi_slopes": torch.zeros(4)}[name].requires_grad_()
    cache, (q, k, v) = contiguous(), step_inputs(3)
    with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
        flashattn.decode(q, cache, k, v, **{name: x})
    with torch.no_grad():
        flashattn.decode(q, cache, k, v, **{name: x})


def test_a_refused_tangent_leaves_the_cache_as_it_was():
    cache, (q, k, v) = contiguous(), step_inputs(3)
    with torch.no_grad(), forward_ad.dual_level():
        bias = forward_ad.make_dual(torch.zeros(1, 3), torch.ones(1, 3))
        with pytest.raises(NotImplementedError):
            flashattn.decode(q, cache, k, v, bias=bias)
    assert cache.lengths == [0, 0]
