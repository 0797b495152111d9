"""Part "features": the cost of each feature of attention relative to a call without features on the same tiles, forward
and backward. The features are those of `python -m bench features`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import flashattn

from ..features import FEATURES, is_float, make_options
from .compare import OURS, Comparison, compare_all, compute_reference, count_bytes
from .context import Call, Context

PLAIN = "plain"


class Case(NamedTuple):
    feature: str
    shape: tuple[int, int, int, int]  # batch, heads, seq, head_dim
    backward: bool


def list_cases(rehearse: bool) -> list[Case]:
    shape = (1, 1, 64, 16) if rehearse else (8, 16, 2048, 128)
    every = [Case(feature, shape, backward) for backward in (False, True) for feature in FEATURES]
    if not rehearse:
        return every
    # One with a tensor, one with a gradient of its own.
    return [Case(f, shape, b) for f, b in (("mask (batch, 1, 1, seq_k)", False), ("sinks, with their gradient", True))]


def run(context: Context) -> Iterator[dict]:
    yield from compare_all(context, list_cases(context.rehearse), make_comparison)


def summarise(rows: list[dict]) -> list[str]:
    """Of each feature, forward and backward: its time / the plain call's. Two features a line."""
    names = list(dict.fromkeys(row.get("feature", row["case"]) for row in rows))
    cells = [f"{name:<32} {'  '.join(format_costs(rows, name)):<34}" for name in names]
    return ["time / the plain call's", *("  ".join(cells[i : i + 2]) for i in range(0, len(cells), 2))]


def format_costs(rows: list[dict], name: str) -> Iterator[str]:
    for row in rows:
        if row.get("feature", row["case"]) != name:
            continue
        if row.get("failed"):
            yield "FAILED"
        elif not row.get("correct", True):
            yield "WRONG"
        elif "ratio" in row:
            yield f"{row['pass']} {'~' if row['unsure'] else ''}{1 / row['ratio']:.2f}x"


def make_comparison(context: Context, case: Case) -> Comparison:
    inputs = [context.randn(*case.shape).requires_grad_(case.backward) for _ in range(3)]
    grad = context.randn(*case.shape)
    options = make_options(case.feature, case.shape, torch.bfloat16, context.device)
    options = {name: x if case.backward else detach(x) for name, x in options.items()}
    batch, heads, seq, head_dim = case.shape
    settings = {
        "pass": "backward" if case.backward else "forward", "feature": case.feature, "batch": batch, "heads": heads,
        "seq": seq, "head_dim": head_dim, "dtype": "bfloat16",
    }  # fmt: skip
    return Comparison(
        f"{settings['pass']} {case.feature}", settings,
        {OURS: lambda: make_call(inputs, grad, options), PLAIN: lambda: make_call(inputs, grad, {})},
        count_bytes([*inputs, grad]), lambda: compute_truth(case, inputs, grad, options),
        select=lambda results: [x[:1] for x in results[: 3 if case.backward else 1]], ours=(OURS, PLAIN),
        truths={PLAIN: lambda: compute_truth(case, inputs, grad, {})},
    )  # fmt: skip


def detach(x):
    return x.detach() if isinstance(x, Tensor) else x


def make_call(inputs: list[Tensor], grad: Tensor, options: dict) -> Call:
    if not inputs[0].requires_grad:
        return lambda: flashattn.attention(*inputs, **options)
    out = flashattn.attention(*inputs, **options)
    wanted = [*inputs, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


def compute_truth(case: Case, inputs: list[Tensor], grad: Tensor, options: dict):
    """Of batch row 0."""
    options = {name: select_first_row(name, x) for name, x in options.items()}

    def call(q, k, v, grad):
        exact = {n: x.detach().to(q.dtype) if is_float(x) and n != "alibi_slopes" else x for n, x in options.items()}
        out = flashattn.attention(q, k, v, **exact)
        return torch.autograd.grad(out, (q, k, v), grad) if case.backward else [out]

    return compute_reference(call, [x.detach()[:1].requires_grad_(x.requires_grad) for x in (*inputs, grad)])


def select_first_row(name: str, x):
    """Batch row 0 of an option that has a batch dimension."""
    has_batch = isinstance(x, Tensor) and (name == "kv_lengths" or x.dim() == 4)
    return x[:1] if has_batch else x
