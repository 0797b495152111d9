"""The cases of decoding with caches, and what checks one against the float64 truth of each sequence alone."""

import itertools
from typing import NamedTuple

import torch

import flashattn
from flashattn.backends import BACKENDS as BACKENDS_BY_NAME
from flashattn.cache import CacheView
from flashattn.score import Score
from tests.attention.truth import Case, list_inputs, torch_attention
from tests.common import Truth, assert_as_exact_as_torch, find_device, once_per_case, randn, skip_if_wrong_there


class Step(NamedTuple):
    """A step of a batch: tokens each sequence has, tokens that are new, and how the keys lie."""

    name: str
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    features: Case
    page_size: int | None = None
    rotary: int | None = None  # rotated pairs
    interleaved: bool = False


def make_case(**options) -> Case:
    return Case("", **(dict(heads=4, kv_heads=2, head_dim=24, head_dim_v=16, causal=True) | options))


STEPS = [
    Step("one_token", (40, 7, 63), (1, 1, 1), make_case(head_dim=64, head_dim_v=64)),
    Step("pages", (40, 7, 63), (1, 1, 1), make_case(), 16),
    Step("pages_of_one", (5, 17), (1, 1), make_case(kv_heads=4), 1),
    Step("pages_of_seven", (33, 0, 70), (2, 5, 1), make_case(), 7),
    Step("several_tokens", (40, 0, 63), (3, 5, 0), make_case(window=(20, None))),
    Step("prompts", (0, 0, 0), (33, 40, 1), make_case(), 16),
    Step("a_chunk", (10, 40), (20, 33), make_case(sinks=True), 16),
    Step("rotary", (40, 7, 63), (1, 2, 1), make_case(), None, 12),
    Step("rotary_partial", (40, 7, 63), (3, 3, 3), make_case(), 7, 5),
    Step("rotary_interleaved", (40, 7), (1, 1), make_case(), 16, 12, True),
    Step("rotary_partial_interleaved", (40, 7), (9, 20), make_case(), None, 8, True),
    Step("window_sinks", (63, 40), (1, 2), make_case(window=(17, None), sinks=True), 16),
    Step("window_of_everything", (63, 40), (1, 2), make_case(window=(2**31 - 1, None)), 16),
    Step("softcap", (63, 40), (1, 2), make_case(softcap=2.0), 16),
    Step("slopes", (63, 40), (1, 2), make_case(slopes="bh")),
    Step("mask", (63, 40), (2, 2), make_case(mask="bqk"), 7),
    Step("bias", (63, 40), (1, 2), make_case(bias="hqk")),
    Step("not_causal", (63, 40), (4, 4), make_case(causal=False), 16),
    Step(
        "everything", (63, 40, 9), (3, 2, 1),
        make_case(window=(50, None), softcap=4.0, slopes="h", mask="bk", bias="bhqk", sinks=True), 16, 8,
    ),
]  # fmt: skip
LONG = [
    Step("long", (1200, 700, 3), (1, 1, 1), make_case(heads=8, head_dim=64, head_dim_v=64), 64),
    Step("long_window", (1200, 700, 3), (2, 1, 2), make_case(heads=8, window=(600, None), sinks=True)),
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


def slice_row(x, b, counts, length):
    x = x if x.shape[0] == 1 else x[b : b + 1]
    return x[:, :, : counts if x.shape[2] > 1 else 1, : length if x.shape[3] > 1 else 1]


def compute_expected(step: Step, options, others, table, q, k, v):
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
            own["mask"] = slice_row(own["mask"], b, count, length)
        if case.slopes == "bh":
            own["alibi_slopes"] = own["alibi_slopes"][b : b + 1]
        mine = [slice_row(x, b, count, length).to(q) if x.dim() == 4 else x.to(q) for x in others]
        out, lse = torch_attention(case._replace(batch=1, seq_q=count, seq_k=length), own, q_b, k_b, v_b, *mine)
        outs.append(out[0].transpose(0, 1)), lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def make_inputs(step: Step, dtype, device):
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


def run_decode(step: Step, cache, options, others, table, q, k, v, backend):
    """(out, lse) of the new tokens, after the others were appended."""
    named = dict(zip(list_inputs(step.features)[3:], others, strict=True))
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


@once_per_case
def compute_truth(step: Step, dtype, device) -> Truth:
    q, k, v, options, others, table = make_inputs(step, dtype, device)
    exact_table = None if table is None else [x.double() for x in table]
    exact = compute_expected(step, options, others, exact_table, q.double(), k.double(), v.double())
    by_torch = compute_expected(step, options, others, table, q, k, v)
    return Truth((q, k, v, others, table), options, (), exact, by_torch, [0.0, 0.0])


def check(step: Step, dtype, backend):
    device = find_device(backend)
    truth = compute_truth(step, dtype, device)
    (q, k, v, others, table), options, _ = truth.fresh()
    results = run_decode(step, make_cache(step, dtype, device), options, others, table, q, k, v, backend)
    for name, x, y, t in zip(("out", "lse"), results, truth.by_torch, truth.exact, strict=True):
        assert_as_exact_as_torch(x, y, t, name)


def check_bits_of_batch_and_pages(counts, backend):
    device = find_device(backend)
    step = Step("", (40, 63, 9), counts, make_case(window=(50, None), sinks=True), None, 8)
    q, k, v, options, others, table = make_inputs(step, torch.float32, device)

    def run(step, *x):
        return list(run_decode(step, make_cache(step, torch.float32, device), options, others, table, *x, backend))

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


def check_bits_of_a_window(backend):
    """A window of 512 keys, two splits on a GPU, has the same bits at the end of 9,000 keys as without the others,
    though those 9,000 would be split into longer parts."""
    skip_if_wrong_there(backend, torch.float32)
    device = find_device(backend)
    q = randn(1, 2, 1, 16, dtype=torch.float32, device=device)
    k, v = (randn(1, 1, 9000, 16, dtype=torch.float32, device=device) for _ in range(2))

    def run(keys: int):
        ends = torch.tensor([keys], dtype=torch.int32, device=device)
        view = CacheView(k[:, :, -keys:], v[:, :, -keys:], None, ends - 1, ends, keys)
        return BACKENDS_BY_NAME[backend].decode(q, view, Score(0.25, left=511, right=0, kv_lengths=ends))

    assert all(map(torch.equal, run(9000), run(512)))


def check_bits_of_longest_row_and_capacity(backend):
    """Rows of 1, 2 and 17 splits on a GPU, alone and beside each other, and in a cache with room for 32."""
    skip_if_wrong_there(backend, torch.float32)
    device, lengths = find_device(backend), (100, 300, 4200)
    q = randn(3, 2, 1, 16, dtype=torch.float32, device=device)
    k, v = (randn(3, 1, max(lengths), 16, dtype=torch.float32, device=device) for _ in range(2))
    score = Score(0.25, left=4150, right=0, sinks=randn(2, dtype=torch.float32, device=device))

    def run(row: slice, keys: int, capacity: int, longest: int, dtype=torch.float32, backend=backend):
        ends = torch.tensor(lengths[row], dtype=torch.int32, device=device)
        room = torch.full((len(ends), 1, capacity - keys, 16), torch.nan, device=device)
        caches = [torch.cat([x[row, :, :keys], room], 2).to(dtype) for x in (k, v)]
        own = score._replace(kv_lengths=ends, sinks=score.sinks.to(dtype))
        view = CacheView(*caches, None, ends - 1, ends, longest)
        return BACKENDS_BY_NAME[backend].decode(q[row].to(dtype), view, own)

    together = run(slice(0, 3), 4200, 4200, 4200)
    truth = run(slice(0, 3), 4200, 4200, 4200, torch.float64, "reference")
    theirs = run(slice(0, 3), 4200, 4200, 4200, torch.float32, "reference")
    for name, x, y, t in zip(("out", "lse"), together, theirs, truth, strict=True):
        assert_as_exact_as_torch(x, y, t, name)
    assert all(map(torch.equal, run(slice(0, 3), 4200, 9000, 9000), together))
    for b, n in enumerate(lengths):
        alone = run(slice(b, b + 1), n, n, n)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))
