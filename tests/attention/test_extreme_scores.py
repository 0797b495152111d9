"""Scores near the end of float32, and so large that the logarithm of their sum is rounded away: weights sum to one.
tests/kernels/test_on_ptx.py has the same of Triton's kernels as they were compiled. (Its interpreter sums k q in
another order than q k: of large scores the last bits differ, and with them the weights.)"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashattn
from tests.attention.extreme_cases import (
    CASES,
    LEAST,
    attend_by_torch,
    check_decoding,
    check_least_number_as_mask,
    check_weights,
    compute_results,
)

BACKENDS = ["cpu", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_weights_sum_to_one(name, backend):
    check_weights(name, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_least_number_as_a_mask(dtype, backend):
    check_least_number_as_mask(dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_behind_a_block_mask(backend):
    """The engine takes it in parts."""
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 300, 300, device="cpu", BLOCK_SIZE=16)
    q, k, v, grad = (torch.randn(1, 1, 300, 16) for _ in range(4))
    bias, inputs = torch.full((300, 300), LEAST), [q, k, v]
    truth = compute_results(lambda *x: attend_by_torch(*x, bias, dict(causal=True), torch.float64), inputs, grad)
    with flashattn.use_backend(backend):
        ours = compute_results(lambda *x: flashattn.attention(*x, bias=bias, block_mask=block_mask), inputs, grad)
    for x, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.double(), t.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 90])
def test_decoding(backend, size):
    check_decoding(backend, size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy(backend):
    q = torch.randn(1, 1, 8, 16)
    with flashattn.use_backend(backend):
        request = flashattn.AuxRequest(entropy=True, column_sums=True)
        _, aux = flashattn.attention(q, q, q, bias=torch.full((8, 8), -1e9), return_aux=request)
    torch.testing.assert_close(aux.entropy, torch.full((1, 1, 8), 8.0).log())
    torch.testing.assert_close(aux.column_sums, torch.ones(1, 1, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [8e3, 1e6, 1e9])
def test_the_gradient_of_a_sink(backend, size):
    """Of 64 keys whose scores are the sink's own."""
    q, k, v = torch.ones(1, 1, 16, 1), torch.full((1, 1, 64, 1), size), torch.randn(1, 1, 64, 4)
    sinks, grad = torch.full((1,), size, requires_grad=True), torch.randn(1, 1, 16, 4)
    with flashattn.use_backend(backend):
        out = flashattn.attention(q, k, v, sinks=sinks, scale=1.0)
    (found,) = torch.autograd.grad(out, sinks, grad)
    truth = -(v.double().sum(2, keepdim=True) / 65**2 * grad.double()).sum()
    torch.testing.assert_close(found.double(), truth[None], rtol=1e-5, atol=1e-7)
