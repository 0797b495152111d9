"""LayerNorm and RMSNorm on every backend against float64, gradients included; and what they refuse."""

import pytest
import torch
from torch.nn import functional as F

import flashattn
from flashattn.reference.philox import philox
from tests.common import (
    BACKENDS,
    DTYPES,
    INTERPRETED,
    assert_as_exact_as_torch,
    find_device,
    randn,
    skip_if_wrong_there,
)
from tests.norm.cases import (
    CASES,
    VIEWS,
    Case,
    check,
    check_dropout,
    check_strides,
    make_gradients,
    make_inputs,
    ours,
    run,
    shrink_blocks,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case, dtype, backend, small_blocks):
    skip_if_wrong_there(backend, dtype)
    check(case, dtype, backend)


@pytest.fixture
def small_blocks(monkeypatch):
    shrink_blocks(monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("width", [16384, 65536, 70001])
def test_very_wide(width, center, backend, monkeypatch):
    if INTERPRETED:  # which is slow: a sixteenth of all widths, of those that a tile holds too
        from flashattn.kernels import norm_configs

        widest = {name: cols // 16 for name, cols in norm_configs.NORM_COLS.items()}
        monkeypatch.setattr(norm_configs, "NORM_COLS", widest)
        width //= 16
    case = Case("", (2, width), center=center, bias=center, residual="same", prenorm=True)
    check(case, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run(backend):
    case = Case("", (200, 63), residual="same", dropout_p=0.2, prenorm=True)
    device = find_device(backend)
    inputs, gradients = make_inputs(case, torch.float16, device), make_gradients(case, torch.float16, device)
    with flashattn.use_backend(backend):
        for a, b in zip(run(ours, case, inputs, gradients), run(ours, case, inputs, gradients), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads(threads):
    case = Case("", (500, 63), residual="same", prenorm=True)
    inputs, gradients = make_inputs(case, torch.float32, "cpu"), make_gradients(case, torch.float32, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(ours, case, inputs, gradients)
        torch.set_num_threads(threads)
        for a, b in zip(run(ours, case, inputs, gradients), expected, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_are_honoured(view, backend):
    check_strides(view, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_the_share_it_says(backend):
    x = torch.ones(50, 1000, device=find_device(backend))
    with flashattn.use_backend(backend):
        _, hidden = flashattn.rms_norm(x, dropout_p=0.3, seed=7, prenorm=True)
    dropped = (hidden == 0).float().mean().item()
    assert abs(dropped - 0.3) < 0.01
    torch.testing.assert_close(hidden[hidden != 0].unique(), torch.tensor([1 / 0.7], device=x.device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_drops_the_same(backend):
    check_dropout(backend)


def test_philox_is_philox():
    """Known answers of Philox-4x32-10: those of Random123 (kat_vectors), and Triton's for a key and a counter."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox(0, zero)[0].item() == 0x6627E8D5


def test_no_seed_draws_from_pytorchs_generator():
    x = torch.ones(4, 64)
    torch.manual_seed(3)
    first = flashattn.layer_norm(x, dropout_p=0.5)
    other = flashattn.layer_norm(x, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(flashattn.layer_norm(x, dropout_p=0.5), first)
    assert not torch.equal(other, first)


def test_the_gradient_mode_changes_no_bit():
    x, residual = randn(5, 63, dtype=torch.bfloat16), randn(5, 63, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = flashattn.layer_norm(x, residual=residual)
    assert torch.equal(flashattn.layer_norm(x.requires_grad_(), residual=residual), expected)


def test_one_float64_argument_goes_to_the_reference():
    x, residual, weight = torch.randn(5, 63), torch.randn(5, 63, dtype=torch.float64), torch.randn(63)
    y, hidden = flashattn.rms_norm(x, weight, residual=residual, prenorm=True)
    assert (y.dtype, hidden.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(y, F.rms_norm((x + residual).float(), (63,), weight, eps=1e-6))
    with flashattn.use_backend("cpu"), pytest.raises(RuntimeError, match="does not take float64"):
        flashattn.rms_norm(x, weight, residual=residual)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="a GPU computes bfloat16 rightly")
def test_the_interpreter_is_kept_from_bfloat16():
    with flashattn.use_backend("triton"), pytest.raises(RuntimeError, match="computes bfloat16 wrongly"):
        flashattn.rms_norm(torch.randn(5, 63), torch.randn(63, dtype=torch.bfloat16))


X = torch.zeros(2, 3, 8)
WRONG = {
    "not_a_tensor": (([1.0],), {}, TypeError, "x must be a torch.Tensor, got list"),
    "integers": ((X.int(),), {}, TypeError, "x must be float32.*got torch.int32"),
    "scalar": ((torch.tensor(1.0),), {}, ValueError, r"x must be \(\.\.\., width\)"),
    "no_width": ((X[..., :0],), {}, ValueError, "width at least 1"),
    "weight_shape": ((X, torch.zeros(7)), {}, ValueError, r"weight must be \(width,\) or.*got shape \(7,\)"),
    "weight_heads": ((X, torch.zeros(2, 8)), {}, ValueError, r"weight must be.*\(2, 8\) for x of shape \(2, 3, 8\)"),
    "bias_shape": ((X, torch.zeros(8), torch.zeros(3, 8)), {}, ValueError, "bias must have weight's shape"),
    "weight_device": ((X, torch.zeros(8, device="meta")), {}, ValueError, "weight must be on x's device cpu, got meta"),
    "residual_shape": ((X,), {"residual": X[:1]}, ValueError, "residual must have x's shape"),
    "residual_dtype": ((X,), {"residual": X.int()}, TypeError, "residual must be float32"),
    "eps": ((X,), {"eps": float("nan")}, ValueError, "eps must be a finite number, got nan"),
    "dropout": ((X,), {"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "seed": ((X,), {"dropout_p": 0.1, "seed": -1}, ValueError, "seed must be an int in"),
    "seed_tensor": ((X,), {"dropout_p": 0.1, "seed": torch.zeros(2)}, ValueError, "seed must be an int or an int64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    arguments, options, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        flashattn.layer_norm(*arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [3, 63, 768, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_of_equal_numbers(backend, width, dtype):
    """They are their own mean: y is the bias, and the smallest eps does not make something of a rounded sum."""
    device = find_device(backend)
    numbers = torch.tensor([1234.567, -0.1, 1e-3, 4.0, 1e4, 0.0], device=device).to(dtype)
    x = numbers[:, None].expand(-1, width).contiguous().requires_grad_()
    weight, bias = (randn(width, dtype=dtype, device=device) for _ in range(2))
    grad = randn(*x.shape, dtype=dtype, device=device)
    with flashattn.use_backend(backend):
        y = flashattn.layer_norm(x, weight, bias, eps=1e-12)
        (grad_x,) = torch.autograd.grad(y, x, grad / 1e6)
    assert torch.equal(y, bias.expand_as(y))
    g = (grad / 1e6).double() * weight.double()
    expected = (g - g.mean(-1, keepdim=True)) * 1e6
    torch.testing.assert_close(
        grad_x.double(),
        expected,
        rtol=2 * torch.finfo(dtype).eps,
        atol=4 * expected.abs().max().item() * torch.finfo(dtype).eps,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [63, 768, 5000])
def test_rows_far_from_zero(backend, width):
    """Their mean is many times their deviation."""
    x = (1000 + torch.randn(20, width)).to(find_device(backend))
    with flashattn.use_backend(backend):
        y = flashattn.layer_norm(x, eps=1e-12)
    assert_as_exact_as_torch(
        y, F.layer_norm(x, (width,), eps=1e-12), F.layer_norm(x.double(), (width,), eps=1e-12), "y"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64), (5, 3, 0, 2, 64)])
def test_no_rows_of_any_strides(backend, shape):
    """An empty tensor may have any strides, those of `expand` as well: its gradient is a sum's."""
    device = find_device(backend)
    x = torch.zeros(1, 1, device=device).expand(shape[-2] if len(shape) == 2 else 1, 64)
    x = x.expand(shape).requires_grad_()
    weight = torch.ones(64, device=device, requires_grad=True)
    with flashattn.use_backend(backend):
        for y in (flashattn.layer_norm(x, weight), flashattn.rms_norm(x, weight, residual=x)):
            assert y.shape == shape
            grad_x, grad_weight = torch.autograd.grad(y.sum(), (x, weight))
            assert grad_x.shape == shape
            assert (grad_weight == 0).all()
