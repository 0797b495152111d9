"""Part "norms": LayerNorm and RMSNorm over 1k to 64k columns of 2**26 elements, forward and backward, against PyTorch's
calls, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import flashattn

from .compare import OURS, Comparison, compare_all, compute_reference, copy_inputs, count_bytes, cycle_calls
from .context import Call, Context
from .tables import COMPARED, make_grid

CHECKED_ROWS = 64


class Case(NamedTuple):
    norm: str  # "layer_norm" or "rms_norm"
    rows: int
    cols: int
    backward: bool
    peer: str  # "torch", or "compiled": PyTorch's call under torch.compile


ELEMENTS = 2**26


def list_cases(rehearse: bool) -> list[Case]:
    if rehearse:
        return [
            Case("layer_norm", 5, 100, True, "torch"), Case("rms_norm", 5, 100, False, "compiled"),
        ]  # fmt: skip
    kinds, passes = ("rms_norm", "layer_norm"), (False, True)
    eager = [
        Case(kind, ELEMENTS // cols, cols, backward, "torch")
        for cols in (4096, 8192, 1024, 16384, 65536) for kind in kinds for backward in passes
    ]  # fmt: skip
    compiled = [Case(kind, ELEMENTS // 4096, 4096, backward, "compiled") for kind in kinds for backward in passes]
    return eager + compiled


def run(context: Context) -> Iterator[dict]:
    yield from compare_all(context, list_cases(context.rehearse), make_comparison)


def summarise(rows: list[dict]) -> list[str]:
    def format_label(row: dict) -> str:
        return f"{row['norm']} {row['pass']}{', compiled peer' if 'compiled' in row['case'] else ''}"

    return [f"GB/s by columns, {COMPARED}", *make_grid(rows, format_label, "cols")]


def get_norm(case: Case, module) -> Callable:
    """module.layer_norm or rms_norm as a function of x and its parameters: flashattn's, or torch.nn.functional's."""
    if module is flashattn:
        return getattr(flashattn, case.norm)
    if case.norm == "layer_norm":
        return lambda x, weight, bias: functional.layer_norm(x, (case.cols,), weight, bias, 1e-5)
    return lambda x, weight: functional.rms_norm(x, (case.cols,), weight, 1e-6)


def make_comparison(context: Context, case: Case) -> Comparison:
    x, grad = (context.randn(case.rows, case.cols) for _ in range(2))
    parameters = [context.randn(case.cols) for _ in range(2 if case.norm == "layer_norm" else 1)]
    inputs = [t.requires_grad_(case.backward) for t in (x, *parameters)]
    bytes_touched = count_bytes([x]) * (3 if case.backward else 2)
    sets = copy_inputs(context, [grad, *inputs], bytes_touched)

    def prepare(norm: Callable) -> Call:
        return cycle_calls([make_call(norm, case.backward, *tensors) for tensors in sets])

    def theirs() -> Call:
        norm = get_norm(case, functional)
        return prepare(torch.compile(norm, dynamic=False) if case.peer == "compiled" and not context.rehearse else norm)

    settings = {
        "pass": "backward" if case.backward else "forward", "norm": case.norm, "rows": case.rows, "cols": case.cols,
        "dtype": "bfloat16",
    }  # fmt: skip
    return Comparison(
        f"{case.norm} {settings['pass']} {case.rows} x {case.cols}" + ", compiled peer" * (case.peer == "compiled"),
        settings, {OURS: lambda: prepare(get_norm(case, flashattn)), case.peer: theirs}, bytes_touched,
        truth=lambda: compute_truth(case, grad, inputs), select=select_checked, bytes=bytes_touched,
        compiled=("compiled",) if case.peer == "compiled" else (),
    )  # fmt: skip


def make_call(norm: Callable, backward: bool, grad: Tensor, *inputs: Tensor) -> Call:
    if not backward:
        return lambda: norm(*inputs)
    y = norm(*inputs)
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def select_checked(results: list[Tensor]) -> list[Tensor]:
    """The first rows of y or grad_x, and the gradients of the parameters, which are sums over all rows."""
    return [results[0][:CHECKED_ROWS], *results[1:]]


def compute_truth(case: Case, grad: Tensor, inputs: list[Tensor]):
    """Forward on the first rows; backward on all, since the gradients of the parameters are sums over them."""
    if not case.backward:
        return compute_reference(lambda *x: [get_norm(case, flashattn)(*x)], [inputs[0][:CHECKED_ROWS], *inputs[1:]])

    def call(*tensors: Tensor) -> list[Tensor]:
        grad, *inputs = tensors
        return list(torch.autograd.grad(get_norm(case, flashattn)(*inputs), inputs, grad))

    truth = compute_reference(call, [grad, *inputs])
    return truth._replace(exact=select_checked(truth.exact), theirs=select_checked(truth.theirs))
