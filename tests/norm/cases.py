"""The cases of LayerNorm and RMSNorm, and what checks one against float64, gradients included."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

import flashattn
from flashattn.reference.philox import philox
from flashattn.tensors import dropout_threshold
from tests.common import Truth, assert_as_exact_as_torch, find_device, once_per_case, randn


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


def normalize(case: Case, hidden: torch.Tensor) -> torch.Tensor:
    """xhat by PyTorch's own norms."""
    if case.center:
        return F.layer_norm(hidden, hidden.shape[-1:], eps=1e-5)
    return F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)


def run_torch(case: Case, inputs: Inputs, normalize=normalize):
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
    y = normalize(case, hidden)
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


def make_gradients(case: Case, dtype, device):
    return [randn(*case.shape, dtype=dtype, device=device) for _ in range(2)]


@once_per_case
def compute_truth(case: Case, dtype: torch.dtype, device: torch.device) -> Truth:
    inputs, gradients = make_inputs(case, dtype, device), make_gradients(case, dtype, device)
    exact = run(run_torch, case, inputs.map(torch.Tensor.double), [g.double() for g in gradients])
    theirs = run(run_torch, case, inputs, gradients)
    return Truth(inputs, {}, gradients, exact, theirs, [0.0] * len(theirs))


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    truth = compute_truth(case, dtype, find_device(backend))
    inputs, _, gradients = truth.fresh()
    with flashattn.use_backend(backend):
        results = run(ours, case, Inputs(*inputs), gradients)
    names = [
        "y",
        *["hidden"] * case.prenorm,
        *(n for n, t in zip(Inputs._fields, inputs, strict=True) if t is not None),
    ]
    for name, a, b, t in zip(names, results, truth.by_torch, truth.exact, strict=True):
        assert a.dtype == b.dtype
        assert_as_exact_as_torch(a, b, t, name)


def shrink_blocks(monkeypatch) -> None:
    """Triton's rows in several chunks, so that wide cases take the path of rows that do not fit."""
    try:
        from flashattn.kernels import norm_configs
    except ImportError:
        return
    monkeypatch.setattr(norm_configs, "NORM_COLS", dict.fromkeys(norm_configs.NORM_COLS, 1024))


VIEWS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 0))[:, :, 1:, 3:-5],
    "last_dim_strided": lambda x: x.mT.contiguous().mT,
    "scattered": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
}


def check_strides(view, backend):
    case = Case("", (3, 5, 4, 40), per_head=True, residual="same", prenorm=True)
    device = find_device(backend)
    inputs, gradients = make_inputs(case, torch.float32, device), make_gradients(case, torch.float32, device)

    def both(change):
        x, residual = (change(t).detach().requires_grad_() for t in inputs[:2])
        results = ours(case, Inputs(x, residual, *inputs[2:]))
        return [*results, *torch.autograd.grad(results, (x, residual), [change(g) for g in gradients])]

    with flashattn.use_backend(backend):
        for a, b in zip(both(VIEWS[view]), both(lambda t: t), strict=True):
            assert torch.equal(a, b)


def check_dropout(backend):
    x = torch.ones(5, 100)
    with flashattn.use_backend("reference"):
        _, expected = flashattn.rms_norm(x, dropout_p=0.5, seed=2**40 + 1, prenorm=True)
    seed = torch.tensor(2**40 + 1, device=find_device(backend))
    with flashattn.use_backend(backend):
        _, hidden = flashattn.rms_norm(x.to(seed.device), dropout_p=0.5, seed=seed, prenorm=True)
    assert torch.equal(hidden.cpu(), expected)
