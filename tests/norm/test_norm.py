"""LayerNorm and RMSNorm on every backend against float64, gradients included; and what they refuse."""

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

import flashattn
from flashattn.reference.philox import philox
from flashattn.tensors import dropout_threshold
from tests.common import BACKENDS, DTYPES, INTERPRETED, assert_as_exact_as_torch, device_of, randn, skip_if_wrong_there


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...] = (7, 63)
    center: bool = True
    weight: bool = True
    bias: bool = True
    per_head: bool = False
    residual: str | None = None  # None, "same" dtype as x, or "float32"
    dropout_p: float = 0.0
    prenorm: bool = False
    weight_offset: float = 0.0
    residual_in_fp32: bool = False


CASES = [
    Case("layer"),
    Case("rms", center=False, bias=False),
    Case("plain", weight=False, bias=False),
    Case("rms_plain", center=False, weight=False, bias=False),
    Case("bias_alone", weight=False),
    Case("no_bias", bias=False),
    Case("width_1", shape=(9, 1)),
    Case("rms_width_1", shape=(9, 1), center=False, bias=False),
    Case("one_row", shape=(1000,)),
    Case("no_rows", shape=(0, 63)),
    Case("many_rows", shape=(1000, 111)),
    Case("wide", shape=(3, 5000)),
    Case("rms_wide", shape=(3, 5000), center=False, bias=False, residual="same", prenorm=True),
    Case("residual", residual="same"),
    Case("residual_prenorm", shape=(2, 5, 63), residual="same", prenorm=True),
    Case("residual_float32", residual="float32", prenorm=True),
    Case("rms_residual_float32", center=False, bias=False, residual="float32", prenorm=True, weight_offset=1.0),
    Case("prenorm_alone", prenorm=True),
    Case("prenorm_in_float32", prenorm=True, residual_in_fp32=True),
    Case("offset", weight_offset=1.0),
    Case("per_head", shape=(5, 3, 40), per_head=True),
    Case("rms_per_head", shape=(2, 11, 4, 64), center=False, bias=False, per_head=True),
    Case("per_head_wide", shape=(3, 2, 3000), per_head=True, residual="same", prenorm=True),
    Case("dropout", dropout_p=0.3),
    Case("dropout_prenorm", dropout_p=0.1, prenorm=True),
    Case("dropout_residual", shape=(33, 111), dropout_p=0.5, residual="same", prenorm=True),
    Case("rms_dropout_float32", center=False, bias=False, dropout_p=0.2, residual="float32", prenorm=True),
    Case("dropout_wide", shape=(3, 3000), dropout_p=0.2, residual="same"),
]
SEED = 1234567890123  # wider than 32 bits


class Inputs(NamedTuple):
    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def map(self, function):
        return Inputs(*(None if t is None else function(t) for t in self))


def make_inputs(case: Case, dtype: torch.dtype, device) -> Inputs:
    parameter = case.shape[-2:] if case.per_head else case.shape[-1:]
    residual_dtype = torch.float32 if case.residual == "float32" else dtype
    return Inputs(
        randn(*case.shape, dtype=dtype, device=device) + 0.5,
        randn(*case.shape, dtype=residual_dtype, device=device) if case.residual else None,
        randn(*parameter, dtype=dtype, device=device) if case.weight else None,
        randn(*parameter, dtype=dtype, device=device) if case.bias else None,
    )


def ours(case: Case, inputs: Inputs):
    x, residual, weight, bias = inputs
    options = dict(
        residual=residual, dropout_p=case.dropout_p, seed=SEED, prenorm=case.prenorm,
        weight_offset=case.weight_offset, residual_in_fp32=case.residual_in_fp32,
    )  # fmt: skip
    if case.center:
        return flashattn.layer_norm(x, weight, bias, **options)
    return flashattn.rms_norm(x, weight, **options)


def by_torch(case: Case, inputs: Inputs):
    """The same by PyTorch's own operations, in the inputs' dtypes."""
    x, residual, weight, bias = inputs
    hidden = x
    if case.dropout_p:
        flat = x.reshape(-1, x.shape[-1])
        rows = torch.arange(flat.shape[0], device=x.device)[:, None]
        cols = torch.arange(flat.shape[1], device=x.device)[None, :]
        keep = (philox(SEED, cols, rows)[0] >> 1 >= dropout_threshold(case.dropout_p)).view(x.shape)
        hidden = torch.where(keep, x / (1 - case.dropout_p), 0)
    if residual is not None:
        hidden = residual + hidden
    elif case.residual_in_fp32 and x.dtype != torch.float64:
        hidden = hidden.float()
    width = hidden.shape[-1:]
    if case.center:
        y = F.layer_norm(hidden, width, eps=1e-5)
    else:
        y = F.rms_norm(hidden, width, eps=1e-6)
    if weight is not None:
        y = y * (weight + case.weight_offset)
    if bias is not None:
        y = y + bias
    y = y.to(x.dtype)
    return (y, hidden) if case.prenorm else y


def run(function, case: Case, inputs: Inputs, gradients):
    """Results and the gradient of each input that is there."""
    inputs = inputs.map(lambda t: t.detach().clone().requires_grad_())
    results = function(case, inputs)
    results = results if case.prenorm else (results,)
    there = [t for t in inputs if t is not None]
    gradients = [g.to(r.dtype) for g, r in zip(gradients, results, strict=False)]
    return [*results, *torch.autograd.grad(results, there, gradients)]


def gradients_for(case: Case, dtype, device):
    return [randn(*case.shape, dtype=dtype, device=device) for _ in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case, dtype, backend, small_blocks):
    skip_if_wrong_there(backend, dtype)
    check(case, dtype, backend)


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    device = device_of(backend)
    inputs, gradients = make_inputs(case, dtype, device), gradients_for(case, dtype, device)
    truth = run(by_torch, case, inputs.map(torch.Tensor.double), [g.double() for g in gradients])
    theirs = run(by_torch, case, inputs, gradients)
    with flashattn.use_backend(backend):
        results = run(ours, case, inputs, gradients)
    names = [
        "y",
        *["hidden"] * case.prenorm,
        *(n for n, t in zip(Inputs._fields, inputs, strict=True) if t is not None),
    ]
    for name, a, b, t in zip(names, results, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        assert_as_exact_as_torch(a, b, t, name)


@pytest.fixture
def small_blocks(monkeypatch):
    """Triton's rows in several chunks, so that wide cases take the path of rows that do not fit."""
    try:
        from flashattn.kernels import configs
    except ImportError:
        return
    monkeypatch.setattr(configs, "NORM_COLS", {"forward": 1024, "backward": 1024})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("width", [16384, 65536, 70001])
def test_very_wide(width, center, backend):
    case = Case("", (2, width), center=center, bias=center, residual="same", prenorm=True)
    check(case, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run(backend):
    case = Case("", (200, 63), residual="same", dropout_p=0.2, prenorm=True)
    device = device_of(backend)
    inputs, gradients = make_inputs(case, torch.float16, device), gradients_for(case, torch.float16, device)
    with flashattn.use_backend(backend):
        for a, b in zip(run(ours, case, inputs, gradients), run(ours, case, inputs, gradients), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads(threads):
    case = Case("", (500, 63), residual="same", prenorm=True)
    inputs, gradients = make_inputs(case, torch.float32, "cpu"), gradients_for(case, torch.float32, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(ours, case, inputs, gradients)
        torch.set_num_threads(threads)
        for a, b in zip(run(ours, case, inputs, gradients), expected, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


VIEWS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 0))[:, :, 1:, 3:-5],
    "last_dim_strided": lambda x: x.mT.contiguous().mT,
    "scattered": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_are_honoured(view, backend):
    case = Case("", (3, 5, 4, 40), per_head=True, residual="same", prenorm=True)
    device = device_of(backend)
    inputs, gradients = make_inputs(case, torch.float32, device), gradients_for(case, torch.float32, device)

    def both(change):
        x, residual = (change(t).detach().requires_grad_() for t in inputs[:2])
        results = ours(case, Inputs(x, residual, *inputs[2:]))
        return [*results, *torch.autograd.grad(results, (x, residual), [change(g) for g in gradients])]

    with flashattn.use_backend(backend):
        for a, b in zip(both(VIEWS[view]), both(lambda t: t), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_the_share_it_says(backend):
    x = torch.ones(50, 1000, device=device_of(backend))
    with flashattn.use_backend(backend):
        _, hidden = flashattn.rms_norm(x, dropout_p=0.3, seed=7, prenorm=True)
    dropped = (hidden == 0).float().mean().item()
    assert abs(dropped - 0.3) < 0.01
    torch.testing.assert_close(hidden[hidden != 0].unique(), torch.tensor([1 / 0.7], device=x.device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_drops_the_same(backend):
    x = torch.ones(5, 100)
    with flashattn.use_backend("reference"):
        _, expected = flashattn.rms_norm(x, dropout_p=0.5, seed=2**40 + 1, prenorm=True)
    seed = torch.tensor(2**40 + 1, device=device_of(backend))
    with flashattn.use_backend(backend):
        _, hidden = flashattn.rms_norm(x.to(seed.device), dropout_p=0.5, seed=seed, prenorm=True)
    assert torch.equal(hidden.cpu(), expected)


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
    device = device_of(backend)
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
    x = (1000 + torch.randn(20, width)).to(device_of(backend))
    with flashattn.use_backend(backend):
        y = flashattn.layer_norm(x, eps=1e-12)
    assert_as_exact_as_torch(
        y, F.layer_norm(x, (width,), eps=1e-12), F.layer_norm(x.double(), (width,), eps=1e-12), "y"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64), (5, 3, 0, 2, 64)])
def test_no_rows_of_any_strides(backend, shape):
    """An empty tensor may have any strides, those of `expand` as well: its gradient is a sum's."""
    device = device_of(backend)
    x = torch.zeros(1, 1, device=device).expand(shape[-2] if len(shape) == 2 else 1, 64)
    x = x.expand(shape).requires_grad_()
    weight = torch.ones(64, device=device, requires_grad=True)
    with flashattn.use_backend(backend):
        for y in (flashattn.layer_norm(x, weight), flashattn.rms_norm(x, weight, residual=x)):
            assert y.shape == shape
            grad_x, grad_weight = torch.autograd.grad(y.sum(), (x, weight))
            assert grad_x.shape == shape
            assert (grad_weight == 0).all()
