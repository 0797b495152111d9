"""score_mod and block_mask against FlexAttention (eager), and gradients, captured tensors' too, against float64."""

import concurrent.futures
import functools
import inspect
import math
import subprocess
import sys
import types
from typing import NamedTuple

import pytest
import torch
from torch.nn.attention import flex_attention as theirs

import flashattn
from flashattn import score_mod
from flashattn.compat.flex import flex_attention
from flashattn.score_mod import trace
from tests.common import BACKENDS, find_device, randn
from tests.compat.flex_cases import (
    BATCH,
    BLOCK_MASKS,
    DIM,
    HEADS,
    SCORE_MODS,
    SEQ_K,
    SEQ_Q,
    attend_densely,
    causal,
    check_as_flex_attention,
    check_every_operation,
    check_gradients,
    check_hidden_pairs,
    check_with_every_other_feature,
    create_block_mask,
    inputs,
    logarithms,
    long_rows,
    make_captured,
    roots,
    short_table,
)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """FlexAttention's own mathematics, not a compiled kernel."""
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def default_device(request):
    """All tensors of a test lie where its backend takes them."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with find_device(parameters.get("backend", "cpu")):
        yield


def test_signature():
    """Names, order, kinds and defaults, as PyTorch has them."""

    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(flex_attention) == parameters(theirs.flex_attention)


def pairs_of_callables():
    """Every score_mod with every block mask."""
    return pair(SCORE_MODS, [None, *BLOCK_MASKS], 3)


def pairs_with_gradients():
    return pair(
        ["identity", "alibi", "relative_bias", "softcap_and_scale"],
        [None, "documents", "by_head", "nothing_in_some_rows"],
        2,
    )


def pair(mods, block_masks, interpreted):
    """On each backend; in Triton's interpreter, which is slow, one of `interpreted`."""
    for n, mod in enumerate(mods):
        for m, block_mask in enumerate(block_masks):
            if (n + m) % interpreted == 0:
                yield pytest.param(mod, block_mask, "triton", marks=pytest.mark.interpreter)
            yield from ((mod, block_mask, backend) for backend in ("cpu", "reference"))


@pytest.mark.parametrize("mod, block_mask, backend", [*pairs_of_callables()])
def test_as_flex_attention(mod, block_mask, backend):
    check_as_flex_attention(mod, block_mask, backend)


@pytest.mark.parametrize("mod, block_mask, backend", [*pairs_with_gradients()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_against_float64(dtype, mod, block_mask, backend):
    check_gradients(dtype, mod, block_mask, backend)


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_every_other_feature(backend, by_position):
    check_with_every_other_feature(backend, by_position)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
def test_strides_as_flex_attention(order):
    sizes = [(BATCH, HEADS, 8, DIM)[d] for d in order]
    q = torch.randn(sizes).permute(*(order.index(d) for d in range(4)))
    for value in (q, q[..., :4]):
        ours, expected = (f(q, q, value, score_mod=causal) for f in (flex_attention, theirs.flex_attention))
        torch.testing.assert_close(ours, expected, check_stride=True)
        out, _ = flex_attention(q, q, value, return_lse=True)
        assert out.stride() == expected.stride()


def test_flex_attentions_own_request():
    """Its max_scores are not to be had on the CPU from PyTorch, so they are compared with the whole matrix."""
    q, k, v = (x.detach() for x in inputs())
    request = theirs.AuxRequest(lse=True, max_scores=True)
    scores = q @ k.mT * DIM**-0.5
    i, j = torch.arange(SEQ_Q)[:, None], torch.arange(SEQ_K)
    window = dict(block_mask=BLOCK_MASKS["window"]())
    for options, keep in ((dict(score_mod=causal), i >= j), (window, (i >= j) & (i - j < 40))):
        out, aux = flex_attention(q, k, v, **options, return_aux=request)
        expected, their_aux = theirs.flex_attention(q, k, v, **options, return_aux=theirs.AuxRequest(lse=True))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(aux.lse, their_aux.lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(aux.max_scores, scores.masked_fill(~keep, -torch.inf).amax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_auxiliary_outputs(backend):
    """Of the whole matrix of weights, which is there in the test only."""
    q, k, v = inputs(kv_heads=2)
    sinks = make_captured(HEADS)
    asked = flashattn.AuxRequest(True, True, True, True, True)
    with flashattn.use_backend(backend):
        out, aux = flashattn.attention(q, k, v, causal=True, softcap=4.0, sinks=sinks, return_aux=asked)
        expected, lse = flashattn.attention(q, k, v, causal=True, softcap=4.0, sinks=sinks, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(aux.lse, lse)
    assert torch.autograd.grad(aux.lse.sum(), q)[0].abs().sum() > 0
    scores = 4 * torch.tanh(q.double() @ k.double().repeat_interleave(2, 1).mT * DIM**-0.5 / 4)
    scores = scores.masked_fill(~torch.ones(SEQ_Q, SEQ_K, dtype=torch.bool).tril(SEQ_K - SEQ_Q), -torch.inf)
    joined = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(BATCH, -1, SEQ_Q, 1)], -1)
    p = joined.softmax(-1)[..., :-1]
    truth = dict(
        max_scores=scores.amax(-1), max_logit=scores.amax((0, 2, 3)), entropy=torch.special.entr(p).sum(-1),
        column_sums=p.sum(2),
    )  # fmt: skip
    for name, expected in truth.items():
        torch.testing.assert_close(getattr(aux, name).double(), expected, rtol=1e-5, atol=1e-5)
    only = flashattn.attention(q, k, v, return_aux=flashattn.AuxRequest(entropy=True))[1]
    assert [x is None for x in only] == [True, True, True, False, True]


def test_auxiliary_outputs_of_nothing():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8)
    _, aux = flashattn.attention(
        q, k, k, return_aux=flashattn.AuxRequest(max_scores=True, entropy=True, column_sums=True)
    )
    assert (aux.max_scores == -torch.inf).all()
    assert (aux.entropy == 0).all()
    assert aux.column_sums.shape == (1, 2, 0)


MEMORY = """
import resource, torch, flashattn
from torch.nn.attention.flex_attention import create_block_mask
N = 16384
q, k, v = (torch.randn(1, 1, N, 8).requires_grad_() for _ in range(3))
table = torch.randn(1, 2 * N, requires_grad=True)
mod = lambda score, b, h, i, j: score + table[h, i - j + N]
block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, "cpu")
flashattn.attention(q[:, :, :256], k[:, :, :256], v[:, :, :256], score_mod=mod, block_mask=block_mask).sum().backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
flashattn.attention(q, k, v, score_mod=mod).sum().backward()
flashattn.attention(q, k, v, return_aux=flashattn.AuxRequest(entropy=True, column_sums=True))
print(peak() - before)
"""


def test_memory_is_linear():
    """Over 16,384 tokens, where one matrix of scores would be 1,024 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 800


def control_flow(score, b, h, i, j):
    return score if i > 3 else score * 2


def reduction(score, b, h, i, j):
    return score.sum() + score


def mutates_the_score(score, b, h, i, j):
    return score.add_(1)


def mutates_a_captured_tensor():
    counter = torch.zeros(())

    def mod(score, b, h, i, j):
        counter.add_(1)
        return score

    return mod


WRONG = {
    "control_flow": (dict(score_mod=control_flow), TypeError, "score_mod must be traceable for one score"),
    "reduction": (dict(score_mod=reduction), TypeError, "score_mod must work on one score at a time.*sum"),
    "mutation": (dict(score_mod=mutates_the_score), TypeError, "score_mod must not change a tensor, got.*add_"),
    "captured": (dict(score_mod=mutates_a_captured_tensor()), TypeError, "score_mod must not change a tensor"),
    "arguments": (dict(score_mod=lambda score: score), TypeError, "score_mod must be traceable.*arguments"),
    "not_callable": (dict(score_mod=3), TypeError, "score_mod must be a callable, got int"),
    "mask_type": (dict(block_mask=torch.ones(3)), TypeError, "block_mask must be a BlockMask.*got Tensor"),
    "aux": (dict(return_aux=True), TypeError, "return_aux must be a flashattn.AuxRequest, got bool"),
    "lse_and_aux": (
        dict(return_lse=True, return_aux=flashattn.AuxRequest()), ValueError, "return_lse must be False with return_aux"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    options, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        flex_attention(*inputs(), **options)


def test_a_block_mask_of_other_sizes_is_refused():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"block_mask must be made for.*\(2, 4, 100, 170\), got \(1, 1, 150, 170\)"):
        flex_attention(q[:, :, :100], k, v, block_mask=BLOCK_MASKS["causal"]())


def test_a_sliced_block_mask_is_refused_as_by_flex_attention():
    q, k, v = (x.detach() for x in inputs())
    sliced = BLOCK_MASKS["causal"]()[:, :, :1]
    for function in (flex_attention, theirs.flex_attention):
        with pytest.raises(RuntimeError, match="sliced"):
            function(q, k, v, block_mask=sliced)


def test_what_triton_cannot_generate_is_named():
    codegen = pytest.importorskip("flashattn.kernels.codegen")
    traced = trace("score_mod", lambda score, b, h, i, j: torch.special.bessel_j0(score), 1)
    with pytest.raises(TypeError, match=r"score_mod uses aten.special_bessel_j0.default, which the triton backend"):
        codegen.mod_arg(traced)


def test_a_trace_is_used_again_only_while_it_is_the_same():
    """The callable's captured tensors and numbers may have changed in between."""
    q, k, v = inputs()
    table, factor = torch.zeros(HEADS), 1.0

    def mod(score, b, h, i, j):
        return score * factor + table[h] * j

    twice = torch.equal(*(flex_attention(q, k, v, score_mod=mod) for _ in range(2)))
    assert twice
    factor = 2.0
    doubled = flex_attention(q, k, v, scale=DIM**-0.5 * 2)
    torch.testing.assert_close(flex_attention(q, k, v, score_mod=mod), doubled, rtol=1e-5, atol=1e-5)
    table = torch.ones(HEADS)
    assert (flex_attention(q, k, v, score_mod=mod) - doubled).abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [short_table, long_rows, roots, logarithms], ids=lambda make: make.__name__)
def test_pairs_that_are_hidden_are_not_asked(make, backend):
    check_hidden_pairs(make, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_that_attends_must_not_point_outside(backend):
    """An IndexError, as in PyTorch; a GPU's kernel cannot raise, so the scores are NaN there."""
    table, q = torch.zeros(9), torch.randn(1, 2, 40, DIM)
    call = functools.partial(flashattn.attention, q, q, q, score_mod=lambda score, b, h, i, j: score + table[i - j])
    with flashattn.use_backend(backend):
        call(window=(8, 0))
        if backend == "triton":
            out = call(window=(9, 0))
            assert out[:, :, 9:].isnan().all()
            assert out[:, :, :9].isfinite().all()
        else:
            with pytest.raises(IndexError, match="out of bounds"):
                call(window=(9, 0))


SETTINGS = types.ModuleType("settings")
FACTOR = 1.0


def by_global_in_a_lambda():
    def mod(score, b, h, i, j):
        return (lambda x: x * FACTOR)(score)

    return mod, lambda value: globals().update(FACTOR=value)


def by_global_in_a_generator():
    def mod(score, b, h, i, j):
        return sum(score * FACTOR for _ in range(1))

    return mod, lambda value: globals().update(FACTOR=value)


def by_attribute_of_a_module():
    SETTINGS.factor = 1.0
    return lambda score, *_: score * SETTINGS.factor, lambda value: setattr(SETTINGS, "factor", value)


def by_attribute_of_itself():
    def mod(score, b, h, i, j):
        return score * mod.factor

    mod.factor = 1.0
    return mod, lambda value: setattr(mod, "factor", value)


def by_attribute_set_later():
    def mod(score, b, h, i, j):
        return score * getattr(mod, "factor", 1.0)

    return mod, lambda value: setattr(mod, "factor", value)


def by_default_of_an_inner_function():
    def inner(x, factor=1.0):
        return x * factor

    return lambda score, *_: inner(score), lambda value: setattr(inner, "__defaults__", (value,))


def by_method_of_a_dictionary():
    settings = {"factor": 1.0}
    get = settings.get
    return lambda score, *_: score * get("factor"), lambda value: settings.update(factor=value)


def by_number_read_off_a_tensor():
    factor = torch.tensor(1.0)
    return lambda score, *_: score * float(factor), factor.fill_


def by_list_read_off_a_tensor():
    factor = torch.ones(1)
    return lambda score, *_: score * factor.tolist()[0], factor.fill_


def by_number_that_an_operation_reads():
    factor = torch.tensor(1.0)
    return lambda score, *_: score * torch.full_like(score, factor), factor.fill_


def by_tensor_computed_from_another():
    factor = torch.tensor(0.5)
    return lambda score, *_: score * (factor * 2), lambda value: factor.fill_(value / 2)


def by_import():
    sys.modules["settings_of_a_test"] = SETTINGS
    SETTINGS.factor = 1.0

    def mod(score, b, h, i, j):
        from settings_of_a_test import factor

        return score * factor

    return mod, lambda value: setattr(SETTINGS, "factor", value)


def by_globals():
    return lambda score, *_: score * globals()["FACTOR"], lambda value: globals().update(FACTOR=value)


def by_shape_of_a_selection():
    ones = torch.tensor([1, 0])
    return lambda score, *_: score * ones.nonzero().shape[0], lambda value: ones.fill_(1)


def by_comparison_of_tensors():
    ones, same = torch.ones(2), torch.ones(2)
    return lambda score, *_: score * (1.0 if torch.equal(ones, same) else 2.0), ones.fill_


def by_kind_of_a_tuple():
    class Order(NamedTuple):
        factor: float
        other: float

    class Reverse(NamedTuple):
        other: float
        factor: float

    pair = Order(1.0, 2.0)

    def change(value):
        nonlocal pair
        pair = Reverse(1.0, 2.0)

    return lambda score, *_: score * pair.factor, change


def by_wrapper_of_a_function_of_torch():
    @functools.wraps(torch.nn.functional.relu)
    def scaled(x):
        return x * FACTOR

    return lambda score, *_: scaled(score), lambda value: globals().update(FACTOR=value)


def by_attribute_of_a_tensor():
    table = torch.ones(1)
    table.factor = 1.0
    return lambda score, *_: score * table.factor, lambda value: setattr(table, "factor", value)


def by_sign_of_zero():
    zero = 0.0

    def mod(score, b, h, i, j):
        return score * (1.0 if math.copysign(1, zero) > 0 else 2.0)

    def change(value):
        nonlocal zero
        zero = -0.0

    return mod, change


SEEN = [value for name, value in globals().items() if name.startswith("by_")]


@pytest.mark.parametrize("make", SEEN, ids=lambda make: make.__name__)
def test_what_a_score_mod_sees_may_change(make):
    """A trace serves only where all that the callable sees is as it was."""
    q, k, v = (x.detach()[:1, :2, :20] for x in inputs(kv_heads=HEADS))
    mod, change = make()
    for _ in range(2):
        assert torch.equal(flex_attention(q, k, v, score_mod=mod), flex_attention(q, k, v, score_mod=lambda s, *_: s))
    change(2.0)
    doubled = flex_attention(q, k, v, score_mod=lambda score, *_: score * 2)
    found = flex_attention(q, k, v, score_mod=mod)
    globals().update(FACTOR=1.0)
    torch.testing.assert_close(found, doubled, rtol=1e-6, atol=1e-6)


def test_traces_are_kept():
    """Where nothing changed, nothing is traced again: not for a new function of the same code either."""
    table = torch.zeros(HEADS)

    def make(factor):
        return lambda score, b, h, i, j: torch.where(i >= j, score * factor, -math.inf) + table[h]

    assert trace("score_mod", make(2.0), 1) is trace("score_mod", make(2.0), 1)
    assert trace("score_mod", make(2.0), 1) is not trace("score_mod", make(3.0), 1)


def test_threads_trace_at_once():
    q = torch.randn(1, 1, 16, 8)

    def call(factor):
        return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score * factor + (i - j))

    expected = [call(n) for n in range(6)]
    score_mod._traces.clear()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for found, truth in zip(pool.map(call, range(6)), expected, strict=True):
            assert torch.equal(found, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operation(backend):
    check_every_operation(backend)


def test_block_mask_of_several_parts_on_the_engine():
    """More queries than the engine takes at a time, with what counts from the diagonal and from the beginning."""
    seq_q, seq_k = 600, 700
    q, k, v = (randn(2, heads, seq, 16, dtype=torch.float32) for heads, seq in ((4, seq_q), (2, seq_k), (2, seq_k)))
    width = torch.tensor([30, 200, 400, 600])
    block_mask = create_block_mask(lambda b, h, i, j: (i - j).abs() <= width[h], None, 4, seq_q, seq_k, 32)
    bias, sinks = randn(4, seq_q, 1, dtype=torch.float32), randn(4, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v, bias, sinks)]
    lengths = dict(kv_lengths=torch.tensor([700, 333]), q_lengths=torch.tensor([333, 600]))
    mask = torch.rand(2, 1, seq_q, seq_k) > 0.2
    results = []
    for backend in ("cpu", "reference"):
        with flashattn.use_backend(backend):
            out, lse = flashattn.attention(
                q, k, v, bias=bias, sinks=sinks, window=(250, 90), softcap=5.0, mask=mask, block_mask=block_mask,
                **lengths, return_lse=True,
            )  # fmt: skip
            loss = out.square().sum() + lse[lse.isfinite()].sum()
            results.append([out, lse, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_from_the_end(backend):
    q, k, v = (x.detach() for x in inputs())
    table = torch.randn(HEADS, SEQ_Q + SEQ_K)

    def mod(score, b, h, i, j):
        return score + table[h, i - j]  # before the diagonal from the end

    with flashattn.use_backend(backend):
        ours = flex_attention(q, k, v, score_mod=mod)
    torch.testing.assert_close(ours, attend_densely(mod, None, q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_blocks_are_not_asked(backend):
    """A mask made by hand: its first blocks attend whatever mask_mod says, its second as it says, no other."""
    q, k, v = (x.detach() for x in inputs())
    size = 16
    rows = -(-SEQ_Q // size)
    counts = torch.ones(1, 1, rows, dtype=torch.int32)
    indices = torch.zeros(1, 1, rows, -(-SEQ_K // size), dtype=torch.int32)
    block_mask = theirs.BlockMask.from_kv_blocks(
        counts,
        indices + 1,
        counts,
        indices,
        BLOCK_SIZE=size,
        mask_mod=lambda b, h, i, j: j >= 24,
        seq_lengths=(SEQ_Q, SEQ_K),
    )
    with flashattn.use_backend(backend):
        ours = flex_attention(q, k, v, block_mask=block_mask)
    j = torch.arange(SEQ_K)
    keep = (j < 16) | ((j >= 24) & (j < 32))
    expected = flashattn.attention(q, k, v, mask=keep)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
