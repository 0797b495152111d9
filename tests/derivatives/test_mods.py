"""The derivatives of a score_mod, its captured tensor and a block mask, with each other feature, on every backend."""

import functools

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashattn
from flashattn import reference
from flashattn.reference import naive
from tests.attention.cases import FEATURES
from tests.attention.truth import (
    Case,
    dropout_multiplier,
    list_inputs,
    make_gradients,
    make_inputs,
    make_naive_options,
    run,
)
from tests.common import INTERPRETED, assert_as_exact_as_torch, find_device
from tests.compat.flex_cases import (
    check_second_derivatives_of_hidden_pairs,
    logarithms,
    long_rows,
    roots,
    short_table,
)
from tests.derivatives.cases import (
    compute,
    list_results,
    make_directions,
    second_derivatives,
    sum_sink_magnitudes,
)

BASE = Case("", batch=3, heads=4, kv_heads=2, seq_q=70, seq_k=90, head_dim=24, head_dim_v=40)
WITH = {"nothing": {}} | {name: {name: value} for name, value in FEATURES.items() if name != "kv_heads"}
WITH["everything"] = FEATURES
FACTORS = torch.tensor([0.5, 2.0])


def change(score, factor, i, j):
    return torch.sin(score) * factor + factor * factor * 0.01 * (i - j)


def attends_to_blocks(b, h, i, j):
    return (i // 16 + j // 16 + h) % 3 != 0


def name_inputs(case: Case, inputs) -> dict[str, torch.Tensor]:
    """With what the score_mod captures, if there is one."""
    return dict(zip([*list_inputs(case), "table"], inputs, strict=False))


def attend(case: Case, options: dict, has_blocks: bool, *inputs):
    """PyTorch's own operations: `naive.attention` with the score_mod before the masks."""
    named = name_inputs(case, inputs)
    q, k, v = (named[name] for name in "qkv")
    own = make_naive_options(case, options, q.device)
    group = case.heads // case.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    distance = naive.diagonal_distance(case.seq_q, case.seq_k, q.device)
    s = q @ k.mT * (case.head_dim**-0.5 if case.scale is None else case.scale)
    if case.softcap is not None:
        s = case.softcap * torch.tanh(s / case.softcap)
    if case.slopes is not None:
        s = s - (own["alibi_slopes"][..., None, None] * distance.abs()).to(s.dtype)
    s = s + named["bias"] if case.bias is not None else s
    i, j = torch.arange(case.seq_q, device=q.device)[:, None], torch.arange(case.seq_k, device=q.device)
    if "table" in named:
        table = named["table"]
        s = change(s, table if table.dim() == 4 else table.view(-1, 1, 1), i, j)
    mask = own.get("mask")
    if has_blocks:
        heads = torch.arange(case.heads, device=q.device).view(1, -1, 1, 1)
        blocks = attends_to_blocks(0, heads, i, j)
        mask = blocks if mask is None else mask & blocks
    # The scores take the place of the products, of keys that are a matrix of ones and zeros.
    eye = torch.eye(case.seq_k, dtype=s.dtype, device=s.device).expand(case.batch, case.heads, -1, -1)
    masks = {name: own[name] for name in ("causal", "window", "q_lengths", "kv_lengths")}
    dropout = dropout_multiplier(case, q.device)
    return naive.attention(s, eye, v, scale=1.0, mask=mask, sinks=named.get("sinks"), dropout=dropout, **masks)


def ours(case: Case, options: dict, blocks, *inputs):
    named = name_inputs(case, inputs)
    table = named.pop("table", None)
    mod = None if table is None else lambda score, b, h, i, j: change(score, table[h], i, j)
    return flashattn.attention(**named, score_mod=mod, block_mask=blocks, **options, return_lse=True)


GIVEN = pytest.mark.parametrize("given", ["score_mod", "block_mask", "both"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@GIVEN
@pytest.mark.parametrize("name", WITH)
def test_against_float64(name, given, backend):
    check(name, given, backend)


def assert_same(found: dict, expected: dict, **tolerances) -> None:
    """What `compute` returns."""
    for kind, results in found.items():
        for x, y in zip(results, expected[kind], strict=True):
            torch.testing.assert_close(x, y, **tolerances)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pairs_that_are_hidden_need_no_derivative(backend):
    """It may be NaN or infinite there."""
    inputs, gradients = [torch.randn(1, 2, 40, 8) for _ in range(3)], [torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40)]
    directions = make_directions(inputs)

    def attend(past, *x):
        def change(score, b, h, i, j):
            return score * torch.sqrt(past(i - j) + 0.0) + torch.log(past(i - j) + 1.0)

        return flashattn.attention(*x, causal=True, score_mod=change, return_lse=True)

    with flashattn.use_backend(backend):
        found, expected = (
            compute(functools.partial(attend, past), inputs, gradients, directions)
            for past in (lambda d: d, lambda d: torch.clamp(d, min=0))
        )
    assert_same(found, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("make", [short_table, long_rows, roots, logarithms], ids=lambda make: make.__name__)
def test_pairs_that_are_hidden_are_not_asked(make, backend):
    check_second_derivatives_of_hidden_pairs(make, backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mod", [None, lambda s, b, h, i, j: s * 1.5, lambda s, b, h, i, j: s * FACTORS[h]])
def test_a_bias_of_minus_infinity(mod, backend):
    """Is a mask, with a score_mod that keeps it so."""
    inputs, gradients = [torch.randn(1, 2, 20, 8) for _ in range(3)], [torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20)]
    keep = torch.rand(1, 2, 20, 20) < 0.5
    keep[..., 0] = True
    masks = dict(bias=torch.where(keep, 0.0, -torch.inf)), dict(mask=keep)
    directions = make_directions(inputs)

    def attend(*x, **masks):
        return flashattn.attention(*x, score_mod=mod, return_lse=True, **masks)

    with flashattn.use_backend(backend):
        found, expected = (compute(functools.partial(attend, **m), inputs, gradients, directions) for m in masks)
    assert_same(found, expected, rtol=1e-4, atol=1e-4)


def attends_in_parts(b, h, i, j):
    """Queries 256 to 511, a part of their own on the CPU, attend to nothing, the others to some keys around theirs."""
    return ((i < 256) | (i >= 512)) & (i - j < 90) & (j - i < 200)


def test_parts_of_a_block_mask(monkeypatch):
    """On the engine, as with the mask written out."""
    monkeypatch.delattr(reference, "jvp")
    monkeypatch.delattr(reference, "hvp")
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 600, 16) for heads in (4, 2, 2)] + [torch.randn(1, 4, 600, 600), torch.randn(4)]
    gradients = torch.randn_like(inputs[0]), torch.randn(2, 4, 600)
    directions = make_directions(inputs)
    blocks = create_block_mask(attends_in_parts, None, None, 600, 600, "cpu", BLOCK_SIZE=32)
    i, j = torch.arange(600).view(-1, 1), torch.arange(600)
    lengths = dict(q_lengths=torch.tensor([600, 530]), kv_lengths=torch.tensor([400, 600]))

    def attend(*x, **masks):
        q, k, v, bias, sinks = x
        return flashattn.attention(q, k, v, bias=bias, sinks=sinks, **masks, **lengths, return_lse=True)

    with flashattn.use_backend("cpu"):
        masks = dict(block_mask=blocks), dict(mask=attends_in_parts(0, 0, i, j))
        found, expected = (compute(functools.partial(attend, **m), inputs, gradients, directions) for m in masks)
    assert_same(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_triton():
    """Both callables beside every other field: so each pair of fields meets on the PTX machine."""
    pytest.importorskip("triton")
    from bench import ptx
    from tests.ptx.run_text import STRICT

    with ptx.device("sm_80", on_fault=STRICT):
        check("everything", "both", "triton")


def check(name: str, given: str, backend: str) -> None:
    torch.manual_seed(0)
    case, device = BASE._replace(**WITH[name]), find_device(backend)
    inputs, options = make_inputs(case, torch.float32, device)
    has_mod, has_blocks = given != "block_mask", given != "score_mod"
    if has_mod:
        inputs.append(torch.rand(case.heads, device=device) + 0.5)
    gradients, directions = make_gradients(case, options, torch.float32, device), make_directions(inputs)
    blocks = None
    if has_blocks:
        blocks = create_block_mask(attends_to_blocks, None, case.heads, case.seq_q, case.seq_k, device, BLOCK_SIZE=16)
        masked = attend(case, options, True, *inputs)[1] == -torch.inf
        gradients = gradients[0], torch.where(masked, 0, gradients[1])

    def theirs(*x):
        return attend(case, options, has_blocks, *x)

    wide = [[x.double() for x in xs] for xs in (inputs, gradients, directions)]
    exact, by_torch = compute(theirs, *wide), compute(theirs, inputs, gradients, directions)
    terms = {"second_table": sum_table_magnitudes(theirs, *wide)} if has_mod else {}
    if case.sinks:
        at = len(list_inputs(case)) - 1
        moved = [inputs[at]], exact["forward"], gradients, [directions[at]]
        terms["second_sinks"] = sum_sink_magnitudes(*moved)
    with flashattn.use_backend(backend):
        found = compute(lambda *x: ours(case, options, blocks, *x), inputs, gradients, directions)
        first = run(lambda *x: ours(case, options, blocks, *x), inputs, *gradients)
    first_exact, first_by_torch = run(theirs, wide[0], *wide[1]), run(theirs, inputs, *gradients)
    for result, x, y, t in zip(list_inputs(case), first[2:], first_by_torch[2:], first_exact[2:], strict=False):
        if result != "sinks":  # a sum over all queries, which no score_mod changes
            assert_as_exact_as_torch(x, y, t, f"grad_{result}")
    for kind, results in list_results(case).items():
        names = results if kind == "forward" else [*results[:-2], *["second_table"] * has_mod, *results[-2:]]
        for result, x, y, t in zip(names, found[kind], by_torch[kind], exact[kind], strict=True):
            assert_as_exact_as_torch(x, y, t, result, terms.get(result, 0.0))


def sum_table_magnitudes(theirs, inputs, gradients, directions) -> torch.Tensor:
    """How large the terms are that the second derivative by the table sums: those of a number for each score."""
    (q, k), table = inputs[:2], inputs[-1]
    shape = (*q.shape[:3], k.shape[2])
    own = [[*xs[:-1], xs[-1].view(-1, 1, 1).expand(shape)] for xs in (inputs, directions)]
    of_scores = second_derivatives(theirs, own[0], gradients, own[1])[len(inputs) - 1]
    return of_scores.abs().sum((0, 2, 3)).view(table.shape)
