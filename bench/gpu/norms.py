"""Part "norms": LayerNorm and RMSNorm over 1k to 64k columns of 2**26 elements, forward and backward, against PyTorch's
calls as they are and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import flashattn

from .compare import OURS, Comparison, bytes_of, compare_all, copies_of, in_turn, reference_truth
from .context import Call, Context
from .tables import COMPARED, grid

CHECKED_ROWS = 64


class Case(NamedTuple):
    norm: str  # "layer_norm" or "rms_norm"
    rows: int
    cols: int
    backward: bool
    peer: str  # "torch", or "compiled": PyTorch's call under torch.compile


ELEMENTS = 2**26


def cases(rehearse: bool) -> list[Case]:
    if rehearse:
        return [
            Case("layer_norm", 5, 100, True, "torch"), Case("rms_norm", 5, 100, False, "compiled"),
        ]  # fmt: skip
    kinds, passes = ("rms_norm", "layer_norm"), (False, True)
    eager = [
        Case(kind, ELEMENTS // cols, cols, backward, "torch")
        for cols in (4096, 8192, 1024, 16384, 65536) for kind in kinds for backward in passes
    ]  # fmt: skip
    compiled = [
        Case(kind, ELEMENTS // 4096, 4096, backward, "compiled") for kind in kinds for backward in passes
    ]  # fmt: skip
    return eager + compiled


def rows(context: Context) -> Iterator[dict]:
    yield from compare_all(context, cases(context.rehearse), comparison)


def summary(rows: list[dict]) -> list[str]:
    def label(row: dict) -> str:
        return f"{row['norm']} {row['pass']}{', compiled peer' if 'compiled' in row['case'] else ''}"

    return [f"GB/s by columns, {COMPARED}", *grid(rows, label, "cols")]


def norm_of(case: Case, module) -> Callable:
    """module.layer_norm or rms_norm as a function of x and its parameters: flashattn's, or torch.nn.functional's."""
    if module is flashattn:
        return getattr(flashattn, case.norm)
    if case.norm == "layer_norm":
        return lambda x, weight, bias: functional.layer_norm(x, (case.cols,), weight, bias, 1e-5)
    return lambda x, weight: functional.rms_norm(x, (case.cols,), weight, 1e-6)


def comparison(context: Context, case: Case) -> Comparison:
    x, grad = (context.randn(case.rows, case.cols) for _ in range(2))
    parameters = [context.randn(case.cols) for _ in range(2 if case.norm == "layer_norm" else 1)]
    inputs = [t.requires_grad_(case.backward) for t in (x, *parameters)]
    touched = bytes_of([x]) * (3 if case.backward else 2)
    sets = copies_of(context, [grad, *inputs], touched)

    def prepare(norm: Callable) -> Call:
        return in_turn([call_of(norm, case.backward, *tensors) for tensors in sets])

    def theirs() -> Call:
        norm = norm_of(case, functional)
        return prepare(torch.compile(norm, dynamic=False) if case.peer == "compiled" and not context.rehearse else norm)

    settings = {
        "pass": "backward" if case.backward else "forward", "norm": case.norm, "rows": case.rows, "cols": case.cols,
        "dtype": "bfloat16",
    }  # fmt: skip
    return Comparison(
        f"{case.norm} {settings['pass']} {case.rows} x {case.cols}" + ", compiled peer" * (case.peer == "compiled"),
        settings, {OURS: lambda: prepare(norm_of(case, flashattn)), case.peer: theirs}, touched,
        truth=lambda: truth_of(case, grad, inputs), part_of=part_of, bytes=touched,
        compiled=("compiled",) if case.peer == "compiled" else (),
    )  # fmt: skip


def call_of(norm: Callable, backward: bool, grad: Tensor, *inputs: Tensor) -> Call:
    if not backward:
        return lambda: norm(*inputs)
    y = norm(*inputs)
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def part_of(results: list[Tensor]) -> list[Tensor]:
    """The first rows of y or grad_x, and the gradients of the parameters, which all rows add to."""
    return [results[0][:CHECKED_ROWS], *results[1:]]


def truth_of(case: Case, grad: Tensor, inputs: list[Tensor]):
    """Forward of the first rows; backward of all, which the gradients of the parameters are sums over."""
    if not case.backward:
        return reference_truth(lambda *x: [norm_of(case, flashattn)(*x)], [inputs[0][:CHECKED_ROWS], *inputs[1:]])

    def call(*tensors: Tensor) -> list[Tensor]:
        grad, *inputs = tensors
        return list(torch.autograd.grad(norm_of(case, flashattn)(*inputs), inputs, grad))

    truth = reference_truth(call, [grad, *inputs])
    return truth._replace(exact=part_of(truth.exact), theirs=part_of(truth.theirs))
