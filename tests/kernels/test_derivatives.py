"""The kernels of forward mode and of second derivatives: what the compiler makes of them, and their results against
float64, in Triton's interpreter and on the PTX machine. `tests/derivatives` has the operators on every backend."""

import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from tests.common import INTERPRETED

pytest.importorskip("triton")

from bench import ptx, sass
from flashattn.arguments import build_score
from flashattn.backends import triton as backend
from flashattn.kernels import codegen, configs
from flashattn.protocol import Saved, Tangents
from flashattn.score import Score
from flashattn.score_mod import trace
from tests.attention.cases import CASES, pairwise
from tests.attention.truth import Case
from tests.kernels import compile_cases
from tests.kernels.derivative_cases import NAMES, check_hvp, check_jvp
from tests.ptx.run_text import STRICT

COMPILED = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
BF16, FLOAT32 = torch.bfloat16, torch.float32
SMALL = Case("small", 1, 2, 1, 17, 35, 24, 9, causal=True, bias="hqk", sinks=True)
CHECKS = [check_jvp, check_hvp]


def named(*names: str) -> list[Case]:
    by_name = {case.name: case for case in CASES}
    return [by_name[name] for name in names]


# ------------------------------------------------------------------------------------------------ in the interpreter

# `tests/derivatives` runs all of them, with every tangent.
EVERYTHING = pairwise()[1]._replace(
    name="everything", batch=2, heads=2, kv_heads=1, q_lengths=(33, 70), kv_lengths=(64, 0)
)
SOME = [EVERYTHING, *named("no_keys", "grouped", "window_of_one")]


@pytest.mark.interpreter
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_features(case, check):
    check(case, torch.float16 if len(case.name) % 2 else FLOAT32)


@pytest.mark.interpreter
@pytest.mark.parametrize("check", CHECKS)
def test_each_tangent_alone_and_with_another(check):
    for count in range(3):
        for n, given in enumerate(itertools.combinations(NAMES, count)):
            check(SMALL._replace(softcap=3.0 if n % 2 else None), FLOAT32, given)


def compute_both(q, k, v, score, tangents, grad) -> list[torch.Tensor]:
    """out, lse, their tangents and the Hessian's product."""
    out, lse, rest, *moved = backend.jvp(q, k, v, score, tangents)
    saved = Saved(q, k, v, out, lse, rest)
    return [out, lse, *moved, *backend.hvp(grad, None, saved, score, tangents, *moved, False, [])[:3]]


@pytest.mark.interpreter
def test_packed_sequences():
    """Each as by itself; 0 and -inf past the last one."""
    queries, keys, sizes = (0, 5, 40, 40), (0, 9, 59, 66), ((2, 47, 16), (1, 70, 16), (1, 70, 24))
    starts = torch.tensor([queries, keys], dtype=torch.int32)
    (q, k, v), tangents = ([torch.randn(1, *size) for size in sizes] for _ in range(2))
    grad = torch.randn(1, 2, 47, 24)
    packed = Score(0.3, right=0, softcap=2.0, cu_seqlens=starts, max_seqlen_q=35, max_seqlen_k=50)
    found = compute_both(q, k, v, packed, Tangents(*tangents, None, None), grad)
    for x, past in zip(found, (0.0, -torch.inf, 0.0, 0.0, 0.0), strict=False):
        assert (x[:, :, 40:] == past).all()
    for n in range(3):
        i, j = slice(*queries[n : n + 2]), slice(*keys[n : n + 2])
        own = [x[:, :, part] for x, part in zip((q, k, v), (i, j, j), strict=True)]
        moved = [x[:, :, part] for x, part in zip(tangents, (i, j, j), strict=True)]
        alone = compute_both(*own, packed._replace(cu_seqlens=None), Tangents(*moved, None, None), grad[:, :, i])
        for x, y, part in zip(found, alone, (i, i, i, i, i, j, j), strict=True):
            torch.testing.assert_close(x[:, :, part], y, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
def test_block_masks():
    """One that is a window is the window; some of its blocks are full, some hidden."""
    (q, k, v), tangents = ([torch.randn(1, 2, 100, 16) for _ in range(3)] for _ in range(2))
    window = create_block_mask(lambda b, h, i, j: (j <= i + 3) & (j >= i - 40), None, None, 100, 100, "cpu", 16)
    grad, found = torch.randn_like(v), []
    for options in (dict(block_mask=window), dict(window=(40, 3))):
        score = build_score(q, (1, 2, 100, 100), **options)
        found.append(compute_both(q, k, v, score, Tangents(*tangents, None, None), grad))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def modify(score, b, h, i, j):
    """With derivatives of every order, by the score and by both captured tensors."""
    return torch.sin(score * FACTORS[h]) + TABLE[b, i - j + 30] * score


def modify_hidden(score, b, h, i, j):
    """Whose derivatives are NaN or infinite where the window hides them."""
    return score * torch.sqrt(i - j + 1.0) + torch.log(i - j + 1.5)


FACTORS, TABLE = torch.linspace(0.5, 1.5, 2), torch.linspace(-1, 1, 120).view(2, 60).cos()


def attend(q, k, v, bias, mod, keep):
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    b, h, i, j = (torch.arange(n).view(-1, *[1] * (3 - d)) for d, n in enumerate(scores.shape))
    pairs = torch.where(keep.expand_as(scores))
    seen = mod(scores[pairs], *(x.expand_as(scores)[pairs] for x in (b, h, i, j)))
    return torch.full_like(scores, -torch.inf).index_put(pairs, seen).softmax(-1) @ v


@pytest.mark.interpreter
@pytest.mark.parametrize("mod", [modify, modify_hidden])
def test_score_mods(mod, monkeypatch):
    """The Hessian's product too, and the gradient of a bias, which comes before the score_mod."""
    q, k, v = (torch.randn(2, 2, 30, 16) for _ in range(3))
    bias, factors, table = torch.randn(1, 2, 30, 1), FACTORS.clone(), TABLE.clone()
    inputs = [q, k, v, bias, factors, table]
    tangents, grad = [torch.randn_like(x) for x in inputs], torch.randn_like(v)
    i, j = torch.arange(30)[:, None], torch.arange(30)
    keep = (j <= i) & (j >= i - 9)

    def exact(*x):
        monkeypatch.setitem(globals(), "FACTORS", x[4])
        monkeypatch.setitem(globals(), "TABLE", x[5])
        return attend(*x[:4], mod, keep)

    wide, moved = [x.double().requires_grad_() for x in inputs], [t.double() for t in tangents]
    truth = torch.func.jvp(exact, tuple(wide), tuple(moved))
    first = torch.autograd.grad(exact(*wide), wide, grad.double(), create_graph=True, materialize_grads=True)
    pairs = [(x, t) for x, t in zip(first, moved, strict=True) if x.requires_grad]
    second = torch.autograd.grad([x for x, _ in pairs], wide, [t for _, t in pairs], materialize_grads=True)

    monkeypatch.setitem(globals(), "FACTORS", factors)
    monkeypatch.setitem(globals(), "TABLE", table)
    score = build_score(q, (2, 2, 30, 30), window=(9, 0), bias=bias, score_mod=mod)
    of_captured = {id(x): t for x, t in zip(inputs[4:], tangents[4:], strict=True)}
    captured = tuple(of_captured[id(x)] for x in score.score_mod.captured)
    given = Tangents(*tangents[:4], None, captured)
    out, lse, rest, *moved = backend.jvp(q, k, v, score, given)
    saved = Saved(q, k, v, out, lse, rest)
    gradients = backend.backward(grad, None, saved, score, True, [])
    results = [out, moved[0], *gradients, *backend.hvp(grad, None, saved, score, given, *moved, True, [])]
    for x, y in zip(results, [*truth, *first[:4], *second[:4]], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=3e-5 * max(1.0, y.abs().max().item()))


def test_tangents_of_a_callable_are_generated_for_those_that_are_given():
    traced = trace("score_mod", modify, 1)
    tangent = torch.ones_like(traced.captured[0])
    some = [codegen.mod_tangent_args(traced, (t, None), True) for t in (tangent, None)]
    assert [len(args["captured"]) for args in some] == [3, 2]
    assert some[0]["mod_value"] is codegen.mod_tangent_args(traced, (tangent, None), False)["mod_value"]
    assert some[0]["mod_value"] is not some[1]["mod_value"]


# ------------------------------------------------------------------------------------------------ compiled

STEADY = [
    ("sm_80", 64, torch.float16), ("sm_90", 64, BF16), ("sm_80", 128, BF16), ("sm_90", 128, torch.float16),
    ("sm_80", 128, FLOAT32),
]  # fmt: skip


@COMPILED
@pytest.mark.parametrize("architecture, head_dim, dtype", STEADY)
def test_no_local_memory_in_loops_over_full_tiles(architecture, head_dim, dtype):
    kernels = compile_cases.compile_derivatives(architecture, head_dim, dtype, causal=False)
    for kernel in kernels:
        assert kernel.shared_bytes <= configs.SHARED_MEMORY[architecture], kernel
        if dtype == FLOAT32:  # no tensor cores, by which loops are found
            assert kernel.spills == 0 or kernel.name == "attention_hvp_kv", kernel
        else:
            assert kernel.tensor_instructions > 0, kernel
            assert not any(loop.mix.get("local") for loop in sass.find_full_tile_loops(kernel.code)), kernel


SOME_FEATURES = compile_cases.FEATURES["bias"] | compile_cases.FEATURES["dropout"]
RELATIVE = dict(score_mod=trace("score_mod", compile_cases.relative_bias, 1))


@COMPILED
@pytest.mark.parametrize(
    "architecture, head_dim, options",
    [("sm_120", 256, dict(dtype=FLOAT32)), ("sm_100", 32, {}), ("gfx942", 16, dict(given="qkvb", **SOME_FEATURES)),
     ("sm_80", 16, dict(given="kc", **RELATIVE)), ("sm_90", 1, dict(given="v"))],
    ids=["float32 on sm_120", "sm_100", "features on gfx942", "score_mod", "a stride of 1"],
)  # fmt: skip
def test_compiles_and_fits(architecture, head_dim, options):
    for kernel in compile_cases.compile_derivatives(architecture, head_dim, **options):
        assert kernel.shared_bytes <= configs.SHARED_MEMORY[architecture], kernel


@COMPILED
def test_a_tangent_that_is_0_is_compiled_away():
    all_of_them, some = (compile_cases.compile_derivatives("sm_80", 16, given=given) for given in ("qkv", "q"))
    assert all(a.tensor_instructions > b.tensor_instructions for a, b in zip(all_of_them, some, strict=True))


# ------------------------------------------------------------------------------------------------ on the PTX machine

GPUS, HALVES = ("sm_80", "sm_86", "sm_90"), (BF16, torch.float16)
PAIRS = [case._replace(heads=2, kv_heads=case.kv_heads // 2) for case in pairwise()]  # of two fields of a Score each


@COMPILED
@pytest.mark.parametrize(
    "architecture, case, dtype, given",
    [("sm_90", Case("plain", 1, 1, 1, 130, 140, 64, 64), BF16, NAMES),
     ("sm_86", Case("widest", 1, 1, 1, 5, 9, 256, 256, causal=True), FLOAT32, ("q", "k")),
     *((GPUS[n % 3], case, HALVES[n % 2], NAMES) for n, case in enumerate(PAIRS))],
    ids=lambda x: getattr(x, "name", None) or str(x),
)  # fmt: skip
def test_results_as_compiled(architecture, case, dtype, given):
    torch.manual_seed(0)
    with ptx.device(architecture, on_fault=STRICT) as gpu:
        check_hvp(case, dtype, given)  # of what jvp returns
    assert {launch.kernel for launch in gpu.launches} >= {"attention_jvp", "attention_hvp_q", "attention_hvp_kv"}
