"""`flashattn.linear` against float64, on both sides of the line between the engine and PyTorch."""

import pytest
import torch
from torch.nn import functional

import flashattn
from flashattn import backends
from tests.common import DTYPES, assert_as_exact_as_torch


@pytest.fixture
def engine_calls(monkeypatch):
    """How many calls went through the engine."""
    calls = []
    run = backends.cpu.ops.linear.default
    monkeypatch.setattr(backends.cpu.ops.linear, "default", lambda *args: (calls.append(args), run(*args)))
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width, outputs", [(1, 1), (7, 31), (32, 33), (100, 64), (576, 200), (1030, 5), (1030, 133)])
@pytest.mark.parametrize("leading", [(), (1,), (2, 1), (3,), (2, 2), (5,), (2, 16), (33,), (0,)], ids=str)
def test_against_float64_cpu(leading, width, outputs, dtype, engine_calls):
    x, bias = torch.randn(*leading, width).to(dtype), torch.randn(outputs).to(dtype)
    weight = torch.randn(outputs, width + 3).to(dtype)[:, :width]  # rows that do not follow each other
    for b in (None, bias):
        with flashattn.use_backend("cpu"):
            y = flashattn.linear(x, weight, b)
        truth = functional.linear(x.double(), weight.double(), None if b is None else b.double())
        assert y.dtype == dtype
        assert_as_exact_as_torch(y, functional.linear(x, weight, b), truth, "y")
    assert len(engine_calls) == (2 if 0 < x.numel() <= 32 * width else 0)


def test_a_row_does_not_depend_on_the_others_cpu():
    x, weight = torch.randn(4, 576), torch.randn(100, 576)
    with flashattn.use_backend("cpu"):
        together, alone = flashattn.linear(x, weight), [flashattn.linear(row, weight) for row in x]
    assert torch.equal(together, torch.stack(alone))


def test_what_is_left_to_pytorch(engine_calls):
    x, weight, bias = torch.randn(2, 8), torch.randn(3, 8), torch.randn(3)
    with flashattn.use_backend("reference"):
        flashattn.linear(x, weight)
    with flashattn.use_backend("cpu"):
        flashattn.linear(x, weight.T.contiguous().T)
        flashattn.linear(x.double(), weight.double())
        flashattn.linear(x, weight.requires_grad_(), bias).sum().backward()
        with torch.no_grad():
            compiled = torch.compile(flashattn.linear, backend="eager", fullgraph=True)(x, weight, bias)
        with pytest.raises(RuntimeError, match="shapes"):
            flashattn.linear(x, weight[:, :5])
    assert weight.grad is not None
    torch.testing.assert_close(compiled, functional.linear(x, weight, bias))
    assert engine_calls == []
