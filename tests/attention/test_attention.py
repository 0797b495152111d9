"""Attention on every backend against the float64 reference, gradients included; and what it refuses."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask

import flashattn
from tests.attention.cases import CASES, FEATURES, VIEWS, check, check_strides, make_truth, pairwise
from tests.attention.truth import (
    Case,
    make_gradients,
    make_inputs,
    ours,
    run,
    torch_attention,
)
from tests.common import (
    BACKENDS,
    DTYPES,
    INTERPRETED,
    assert_as_exact_as_torch,
    find_device,
    randn,
    skip_if_wrong_there,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case, dtype, backend):
    skip_if_wrong_there(backend, dtype)
    check(case, dtype, backend)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_is_the_truth_in_float64(case):
    inputs, options = make_inputs(case, torch.float64, "cpu")
    gradients = make_gradients(case, options, torch.float64, "cpu")
    truth = run(lambda *x: torch_attention(case, options, *x), inputs, *gradients)
    for x, t in zip(run(ours(case, options), inputs, *gradients), truth, strict=True):
        torch.testing.assert_close(x, t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dimensions", ["bhqk", "k", "q"])
def test_a_mask_of_any_bytes(dimensions, backend):
    """A view of other bytes as bool: what is not 0 is True."""
    case = Case("", batch=2, seq_q=40, seq_k=70, mask=dimensions)
    inputs, options = make_inputs(case, torch.float32, find_device(backend))
    mask = options["mask"]
    odd = torch.where(mask, torch.randint_like(mask, 2, 256, dtype=torch.uint8), 0).view(torch.bool)
    blocks = create_block_mask(lambda b, h, i, j: i >= i, None, None, 40, 70, mask.device, BLOCK_SIZE=16)
    with flashattn.use_backend(backend):
        for others in ({}, {"block_mask": blocks}):
            found, expected = (flashattn.attention(*inputs, mask=m, **others) for m in (odd, mask))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_a_subclass_with_operations_of_its_own_is_refused(name):
    """The memory of PyTorch's CausalBias does not hold its values."""
    x = torch.randn(1, 2, 6, 8)
    other = causal_lower_right(6, 6)
    other = other.bool().as_subclass(type(other)) if name == "mask" else other
    with pytest.raises(TypeError, match=f"{name} must be a plain tensor, got CausalBias"):
        flashattn.attention(x, x, x, **{name: other})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", pairwise(), ids=lambda case: case.name)
def test_pairs_of_features(case, dtype, backend):
    skip_if_wrong_there(backend, dtype)
    check(case, dtype, backend)


def test_pairs_are_all_there():
    present = [{name for name in FEATURES if getattr(case, name) == FEATURES[name]} for case in pairwise()]
    for a, b in itertools.permutations(FEATURES, 2):
        assert any(a in p and b in p for p in present)
        assert any(a in p and b not in p for p in present)
        assert any(a not in p and b not in p for p in present)


dimensions = st.sampled_from(["".join(d) for n in range(5) for d in itertools.combinations("bhqk", n)])


# test_instruction_sets runs them on each of the other builds.
EXAMPLES = 15 if "FLASHATTN_CPU_ISA" in os.environ else 60


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_cases(data):
    """At least 16 keys: on fewer numbers an error is a matter of luck, PyTorch's as well as ours (CASES has those)."""
    batch, kv_heads = 4, data.draw(st.integers(1, 3))
    seq_q, seq_k = data.draw(st.integers(8, 150)), data.draw(st.integers(32, 230))
    case = Case(
        "random", batch, kv_heads * data.draw(st.integers(1, 3)), kv_heads, seq_q, seq_k,
        data.draw(st.integers(4, 256)), data.draw(st.integers(4, 256)), data.draw(st.booleans()),
        data.draw(st.none() | st.tuples(st.none() | st.integers(16, 200), st.none() | st.integers(0, 200))),
        *(data.draw(st.none() | st.tuples(*[st.integers(n // 2, n)] * batch)) for n in (seq_q, seq_k)),
        softcap=data.draw(st.none() | st.floats(1, 30)),
        slopes=data.draw(st.sampled_from([None, "h", "bh"])),
        mask=data.draw(st.none() | dimensions),
        bias=data.draw(st.none() | dimensions),
        sinks=data.draw(st.booleans()),
        dropout_p=data.draw(st.sampled_from([0.0, 0.0, 0.2])),
    )  # fmt: skip
    check(case, data.draw(st.sampled_from(DTYPES)), "cpu", make_truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run(backend):
    if INTERPRETED and backend == "triton":
        pytest.skip("the interpreter runs one program after another")
    device = find_device(backend)
    case = Case(
        "", batch=2, heads=4, kv_heads=2, seq_q=70, seq_k=111, causal=True, bias="hk", sinks=True, dropout_p=0.1
    )
    inputs, options = make_inputs(case, torch.float16, device)
    gradients = make_gradients(case, options, torch.float16, device)
    with flashattn.use_backend(backend):
        first, second = (run(ours(case, options), inputs, *gradients) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_are_honoured(view, backend):
    check_strides(view, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(backend):
    q, k, v = make_inputs(Case(""), torch.float32, find_device(backend))[0]
    q.requires_grad_()
    with flashattn.use_backend(backend):
        flashattn.attention(q, k, v).sum().backward()  # its gradient is one number, expanded
        (expected,) = torch.autograd.grad(flashattn.attention(q, k, v), q, torch.ones_like(q))
    assert torch.equal(q.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_lse_is_used(backend):
    q, k, v = make_inputs(Case("", causal=True), torch.float32, find_device(backend))[0]
    q.requires_grad_(), v.requires_grad_()
    with flashattn.use_backend(backend):
        _, lse = flashattn.attention(q, k, v, causal=True, return_lse=True)
        grad_q, grad_v = torch.autograd.grad(lse.sum(), (q, v))
    exact = q.detach().double().requires_grad_()
    scores = exact @ k.double().mT * 0.25
    scores = scores.masked_fill(torch.ones(63, 63, device=q.device).triu(1).bool(), -torch.inf)
    (truth,) = torch.autograd.grad(scores.logsumexp(-1).sum(), exact)
    torch.testing.assert_close(grad_q.double(), truth, rtol=1e-5, atol=1e-6)
    assert (grad_v == 0).all()


def test_error_does_not_grow_with_length():
    """A rescale factor that is not exactly 1 while the maximum stays would show at 16,384 keys."""
    q, k, v = (randn(1, 1, n, 16, dtype=torch.float32) for n in (64, 16384, 16384))
    k[:, :, 0] = 3 * q[:, :, 0].sign()  # the maximum of the first query comes first
    truth = torch_attention(Case("", 1, 1, 1, 64, 16384), {}, q.double(), k.double(), v.double())
    theirs = torch_attention(Case("", 1, 1, 1, 64, 16384), {}, q, k, v)
    with flashattn.use_backend("cpu"):
        results = flashattn.attention(q, k, v, return_lse=True)
    for name, x, y, t in zip(("out", "lse"), results, theirs, truth, strict=True):
        assert_as_exact_as_torch(x, y, t, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_is_a_mask(backend):
    """Also where it leaves a query, or the first tile of its keys, without any."""
    case = Case("", batch=2, seq_q=40, seq_k=230, causal=True)
    inputs, options = make_inputs(case, torch.float32, find_device(backend))
    keep = torch.rand(2, 1, 40, 230, device=inputs[0].device) > 0.5
    keep[0, :, :, :200] = False
    keep[1, :, 7] = False
    bias = torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, -torch.inf)
    grad_out, grad_lse = make_gradients(case, {"mask": keep}, torch.float32, keep.device)
    with flashattn.use_backend(backend):
        by_mask, by_bias = (
            run(lambda *x, o=o: flashattn.attention(*x, return_lse=True, **options, **o), inputs, grad_out, grad_lse)
            for o in ({"mask": keep}, {"bias": bias})
        )
    for a, b in zip(by_mask, by_bias, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_nan_in_the_input_shows(backend):
    q, k, v = make_inputs(Case(""), torch.float32, "cpu")[0]
    k[0, 0, 5, 3] = torch.nan
    with flashattn.use_backend(backend):
        out = flashattn.attention(q, k, v)
    assert out[0, 0].isnan().all()
    assert not out[0, 1].isnan().any()


def test_large_scores_do_not_overflow():
    q, k, v = make_inputs(Case("", causal=True), torch.float32, "cpu")[0]
    for backend in ("cpu", "reference"):
        with flashattn.use_backend(backend):
            out, lse = flashattn.attention(q * 1e4, k * 1e4, v, causal=True, return_lse=True)
        assert out.isfinite().all()
        assert lse.isfinite().all()


MEMORY = """
import resource, sys, torch, flashattn
q, k, v = (torch.randn(1, 1, 16384, 8).requires_grad_() for _ in range(3))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with flashattn.use_backend(sys.argv[1]):
    flashattn.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64]).sum().backward()
    before = peak()
    flashattn.attention(q, k, v, causal=True).sum().backward()
print(peak() - before)
"""


@pytest.mark.parametrize("backend, mebibytes", [("cpu", 16), ("reference", 400)])
def test_memory_is_linear(backend, mebibytes):
    """Forward and backward over 16,384 tokens, where one matrix of scores would be 1,024 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, backend], capture_output=True, text=True, check=True)
    assert int(done.stdout) < mebibytes


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads):
    """Any number of threads gives the same bits."""
    case = Case(
        "", batch=2, heads=4, kv_heads=2, seq_q=200, seq_k=230, causal=True, bias="hk", sinks=True, dropout_p=0.1
    )
    inputs, options = make_inputs(case, torch.float32, "cpu")
    gradients = make_gradients(case, options, torch.float32, "cpu")
    before = torch.get_num_threads()

    def go(n):
        torch.set_num_threads(n)
        with flashattn.use_backend("cpu"):
            return run(ours(case, options), inputs, *gradients)

    try:
        for a, b in zip(go(threads), go(1), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 3)
WRONG = {
    "q_not_a_tensor": ((Q.numpy(), K, V), {}, TypeError, "q must be a torch.Tensor, got ndarray"),
    "q_rank": ((Q[0], K, V), {}, ValueError, r"q must be \(batch, heads, seq, head_dim\), got shape \(4, 5, 8\)"),
    "integers": ((Q.int(), K, V), {}, TypeError, "q must be float32.*got torch.int32"),
    "dtype": ((Q, K.half(), V), {}, TypeError, "k must have q's dtype torch.float32, got torch.float16"),
    "device": ((Q, K, V.to("meta")), {}, ValueError, "v must be on q's device cpu, got meta"),
    "batch": ((Q, K[:1], V), {}, ValueError, "k must have q's batch 2, got 1"),
    "head_dim": ((Q, K[..., :7], V), {}, ValueError, "k must have q's head_dim 8, got 7"),
    "no_head_dim": ((Q[..., :0], K[..., :0], V), {}, ValueError, "q must have at least one head and head_dim 1"),
    "seq": ((Q, K, V[:, :, :6]), {}, ValueError, r"v must have k's \(kv_heads, seq_k\) \(2, 7\), got \(2, 6\)"),
    "heads": ((Q[:, :3], K, V), {}, ValueError, "k must have a number of heads that divides q's 3, got 2"),
    "no_heads": ((Q, K[:, :0], V[:, :0]), {}, ValueError, "k must have at least one head"),
    "scale": ((Q, K, V), {"scale": "big"}, TypeError, "scale must be a float, got str"),
    "scale_nan": ((Q, K, V), {"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    "mask_dtype": ((Q, K, V), {"mask": torch.ones(5, 7)}, TypeError, "mask must be bool.*got torch.float32"),
    "mask_shape": ((Q, K, V), {"mask": torch.ones(5, 6).bool()}, ValueError, r"mask must be.*shape \(5, 6\)"),
    "mask_rank": ((Q, K, V), {"mask": torch.ones(1, 1, 1, 1, 1).bool()}, ValueError, "mask must be broadcastable"),
    "mask_list": ((Q, K, V), {"mask": [True]}, TypeError, "mask must be a torch.Tensor, got list"),
    "bias_dtype": ((Q, K, V), {"bias": torch.ones(5, 7).half()}, TypeError, "bias must be torch.float32.*float16"),
    "bias_integers": ((Q, K, V), {"bias": torch.ones(5, 7).int()}, TypeError, "bias must be float32.*got torch.int32"),
    "bias_shape": ((Q, K, V), {"bias": torch.ones(3, 5, 7)}, ValueError, r"bias must be broad.*got shape \(3, 5, 7\)"),
    "slopes_shape": ((Q, K, V), {"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes must be \(heads,\)"),
    "slopes_dtype": ((Q, K, V), {"alibi_slopes": torch.ones(4).half()}, TypeError, "alibi_slopes must be float32"),
    "softcap": ((Q, K, V), {"softcap": 0.0}, ValueError, "softcap must be above 0 and finite.*got 0.0"),
    "softcap_text": ((Q, K, V), {"softcap": "5"}, TypeError, "softcap must be a float, got str"),
    "sinks_shape": ((Q, K, V), {"sinks": torch.ones(2)}, ValueError, r"sinks must be \(heads,\) = \(4,\), got.*\(2,\)"),
    "dropout": ((Q, K, V), {"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "seed": ((Q, K, V), {"dropout_p": 0.5, "seed": -1}, ValueError, "seed must be an int in"),
    "length_past": ((Q, K, V), {"kv_lengths": torch.tensor([1, 8])}, ValueError, "kv_lengths must be.*7, got 8"),
    "length_negative": ((Q, K, V), {"q_lengths": torch.tensor([-1, 3])}, ValueError, "q_lengths must be.*got -1"),
    "length_shape": ((Q, K, V), {"kv_lengths": torch.tensor([1])}, ValueError, r"kv_lengths must be \(batch,\)"),
    "length_dtype": ((Q, K, V), {"kv_lengths": torch.ones(2)}, TypeError, "kv_lengths must be int32 or int64, got"),
    "length_list": ((Q, K, V), {"kv_lengths": [1, 2]}, TypeError, "kv_lengths must be a torch.Tensor, got list"),
    "unknown": ((Q, K, V), {"left": 3}, TypeError, r"attention\(\) got an unexpected keyword argument 'left'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    arguments, options, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        flashattn.attention(*arguments, **options)
