"""Packed sequences on every backend against the float64 truth of each alone; nested tensors; what is refused."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashattn
from tests.attention.packed_cases import (
    CASES,
    LENGTHS,
    check,
    check_dropout_of_padded_batch,
    check_nested_tensors,
    make_cu_seqlens,
    make_packed_case,
    make_packed_inputs,
    make_truth,
)
from tests.attention.truth import Case
from tests.common import BACKENDS, DTYPES, find_device, skip_if_wrong_there


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case, dtype, backend):
    skip_if_wrong_there(backend, dtype)
    check(case, *LENGTHS, dtype, backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_few_queries_each(backend):
    """What the CPU engine takes as decoding; to GPU kernels they are like any others."""
    check(
        Case("decode", heads=4, causal=True, sinks=True),
        (1, 8, 0, 3, 5),
        (700, 40, 30, 513, 512),
        torch.float32,
        backend,
    )


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_cases(data):
    """Four heads and more, and a bias by queries or keys: the error of a gradient of one number is a matter of luck,
    PyTorch's as well as ours (CASES has those)."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))  # so that what fails fails again
    dimensions = st.sampled_from(["".join(d) for n in range(5) for d in itertools.combinations("bhqk", n)])
    batch, kv_heads = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 2))
    lengths = [[*data.draw(st.lists(st.integers(0, 200), min_size=batch, max_size=batch)), 40] for _ in range(2)]
    case = Case(
        "random", heads=kv_heads * data.draw(st.integers(4 // kv_heads, 6 // kv_heads)), kv_heads=kv_heads,
        head_dim=data.draw(st.integers(8, 96)),
        head_dim_v=data.draw(st.integers(8, 96)), causal=data.draw(st.booleans()),
        window=data.draw(st.none() | st.tuples(st.none() | st.integers(16, 99), st.none() | st.integers(0, 99))),
        softcap=data.draw(st.none() | st.floats(1, 30)), slopes=data.draw(st.sampled_from([None, "h", "bh"])),
        mask=data.draw(st.none() | dimensions),
        bias=data.draw(st.none() | dimensions.filter(lambda d: "q" in d or "k" in d)),
        sinks=data.draw(st.booleans()),
        dropout_p=data.draw(st.sampled_from([0.0, 0.0, 0.2])),
    )  # fmt: skip
    check(case, *lengths, data.draw(st.sampled_from(DTYPES)), "cpu", make_truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_a_padded_batch_bit_for_bit_on_dropout(backend):
    check_dropout_of_padded_batch(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nested_tensors(backend):
    check_nested_tensors(backend)


@pytest.mark.parametrize("bias", ["h", "hqk"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_longest_of_more_than_all(backend, bias):
    """max_seqlen says how long a sequence may be at most: larger than all of them together it changes nothing."""
    case, lengths, device = Case("", bias=bias, head_dim=8, head_dim_v=8), (5, 20, 7), find_device(backend)
    most = 2**31 - 1 if bias == "h" else 100
    inputs, _ = make_packed_inputs(make_packed_case(case, lengths, lengths), lengths, lengths, torch.float32, device)
    whole = torch.zeros(1, 2, *[100 if bias == "hqk" else 1] * 2, device=device)
    whole[:, :, :20, :20] = inputs[3]
    cu = make_cu_seqlens(lengths, device)

    def call(longest, bias):
        x = [x.clone().requires_grad_() for x in (*inputs[:3], bias)]
        with flashattn.use_backend(backend):
            out = flashattn.attention_varlen(*x[:3], cu, cu, longest, longest, bias=x[3], window=(4, 9))
        return out, *torch.autograd.grad(out.square().sum(), x)

    *results, grad_bias = call(most, whole)
    *expected, grad_expected = call(20, inputs[3])
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(grad_bias[:, :, :20, :20], grad_expected)
    assert (grad_bias[:, :, 20:] == 0).all()
    assert (grad_bias[..., 20:] == 0).all()


MEMORY = """
import resource, torch, flashattn
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def go(lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    q = torch.randn(sum(lengths), 1, 8).requires_grad_()
    out = flashattn.attention_varlen(q, q, q, starts, starts, causal=True)
    out.sum().backward()
    return q, out
go([64, 1])
before = peak()
q, out = go([4000] + [1] * 3000)
torch.testing.assert_close(out[4000:], q[4000:])  # a token alone attends to itself
print(peak() - before)
"""


def test_memory_follows_the_tokens():
    """One long sequence among many short ones; a buffer of each one's longest would be 366 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40


Q, K = torch.zeros(10, 4, 8), torch.zeros(12, 2, 8)
CU_Q, CU_K = torch.tensor([0, 4, 10], dtype=torch.int32), torch.tensor([0, 5, 12], dtype=torch.int32)
GOOD = dict(q=Q, k=K, v=K, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, max_seqlen_q=6, max_seqlen_k=7)
WRONG = {
    "rank": (dict(q=Q[None]), ValueError, r"q must be \(total, heads, head_dim\), got shape \(1, 10, 4, 8\)"),
    "falling": (dict(cu_seqlens_q=CU_Q.flip(0)), ValueError, r"cu_seqlens_q must begin with 0.*\[10, 4, 0\]"),
    "not_monotone": (dict(cu_seqlens_k=CU_K[[0, 2, 1]]), ValueError, r"cu_seqlens_k must begin with 0, never fall"),
    "past_the_end": (dict(cu_seqlens_k=CU_K * 2), ValueError, "cu_seqlens_k must.*end at most at k's 12 rows"),
    "dtype": (dict(cu_seqlens_q=CU_Q.long()), TypeError, "cu_seqlens_q must be int32, got torch.int64"),
    "list": (dict(cu_seqlens_q=[0, 4, 10]), TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
    "shape": (dict(cu_seqlens_q=CU_Q[None]), ValueError, r"cu_seqlens_q must be \(batch \+ 1,\), got shape \(1, 3\)"),
    "lengths": (dict(cu_seqlens_k=CU_K[:2]), ValueError, "cu_seqlens_k must be as long as cu_seqlens_q, 3, got 2"),
    "max": (dict(max_seqlen_q=5), ValueError, "max_seqlen_q must be at least the longest sequence's 6, got 5"),
    "max_type": (dict(max_seqlen_k=7.0), TypeError, "max_seqlen_k must be an int or None, got float"),
    "mask": (dict(mask=torch.ones(10, 12).bool()), ValueError, r"mask must be.*\(2, 4, 6, 7\), got shape \(10, 12\)"),
    "slopes": (dict(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes must be \(heads,\) = \(4,\) or"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    changed, kind, message = WRONG[name]
    arguments = GOOD | changed
    flashattn.attention_varlen(**GOOD)
    with pytest.raises(kind, match=message):
        flashattn.attention_varlen(**arguments)


@pytest.mark.parametrize("changed", [dict(max_seqlen_q=4), dict(max_seqlen_k=4), dict(cu_seqlens_k=CU_K * 2)])
def test_a_compiled_graph_reads_nothing_outside(changed):
    """It has no numbers to check when it is traced, so the engine does when it runs."""
    torch._dynamo.reset()
    arguments = GOOD | changed
    compiled = torch.compile(flashattn.attention_varlen, backend="eager", fullgraph=True)
    with flashattn.use_backend("cpu"), pytest.raises(RuntimeError, match=r"cu_seqlens_. must"):
        compiled(**arguments)


def test_nested_is_not_mixed_with_padding():
    x = torch.nested.nested_tensor([torch.zeros(3, 2, 8)], layout=torch.jagged)
    with pytest.raises(ValueError, match="k must be nested"):
        flashattn.attention(x.transpose(1, 2), torch.zeros(1, 2, 3, 8), x.transpose(1, 2))
    with pytest.raises(ValueError, match=r"q must be nested.*jagged along seq"):
        flashattn.attention(x, x, x)
