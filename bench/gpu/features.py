"""Part "features": what each feature of attention costs on top of the plain call of the same tiles, forward and
backward. The table of features is that of `python -m bench features`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import flashattn

from ..features import FEATURES, is_float, make_options
from .compare import OURS, Comparison, bytes_of, compare_all, reference_truth
from .context import Call, Context

PLAIN = "plain"


class Case(NamedTuple):
    feature: str
    shape: tuple[int, int, int, int]  # batch, heads, seq, head_dim
    backward: bool


def cases(rehearse: bool) -> list[Case]:
    shape = (1, 1, 64, 16) if rehearse else (8, 16, 2048, 128)
    every = [Case(feature, shape, backward) for backward in (False, True) for feature in FEATURES]
    if not rehearse:
        return every
    # One with a tensor, one with a gradient of its own, one with a function.
    return [Case(f, shape, b) for f, b in (("mask (batch, 1, 1, seq_k)", False), ("sinks, with their gradient", True))]


def rows(context: Context) -> Iterator[dict]:
    yield from compare_all(context, cases(context.rehearse), comparison)


def summary(rows: list[dict]) -> list[str]:
    """Forward and backward of a feature: its time / the plain call's. Two features a line."""
    names = list(dict.fromkeys(row.get("feature", row["case"]) for row in rows))
    cells = [f"{name:<32} {'  '.join(costs(rows, name)):<34}" for name in names]
    return ["time / the plain call's", *("  ".join(cells[i : i + 2]) for i in range(0, len(cells), 2))]


def costs(rows: list[dict], name: str) -> Iterator[str]:
    for row in rows:
        if row.get("feature", row["case"]) != name:
            continue
        if row.get("failed"):
            yield "FAILED"
        elif not row.get("correct", True):
            yield "WRONG"
        elif "ratio" in row:
            yield f"{row['pass']} {'~' if row['unsure'] else ''}{1 / row['ratio']:.2f}x"


def comparison(context: Context, case: Case) -> Comparison:
    inputs = [context.randn(*case.shape).requires_grad_(case.backward) for _ in range(3)]
    grad = context.randn(*case.shape)
    options = make_options(case.feature, case.shape, torch.bfloat16, context.device)
    options = {name: x if case.backward else detached(x) for name, x in options.items()}
    batch, heads, seq, head_dim = case.shape
    settings = {
        "pass": "backward" if case.backward else "forward", "feature": case.feature, "batch": batch, "heads": heads,
        "seq": seq, "head_dim": head_dim, "dtype": "bfloat16",
    }  # fmt: skip
    return Comparison(
        f"{settings['pass']} {case.feature}", settings,
        {OURS: lambda: call_of(inputs, grad, options), PLAIN: lambda: call_of(inputs, grad, {})},
        bytes_of([*inputs, grad]), lambda: truth_of(case, inputs, grad, options),
        part_of=lambda results: [x[:1] for x in results[: 3 if case.backward else 1]], ours=(OURS, PLAIN),
        truths={PLAIN: lambda: truth_of(case, inputs, grad, {})},
    )  # fmt: skip


def detached(x):
    return x.detach() if isinstance(x, Tensor) else x


def call_of(inputs: list[Tensor], grad: Tensor, options: dict) -> Call:
    if not inputs[0].requires_grad:
        return lambda: flashattn.attention(*inputs, **options)
    out = flashattn.attention(*inputs, **options)
    wanted = [*inputs, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


def truth_of(case: Case, inputs: list[Tensor], grad: Tensor, options: dict):
    """Of batch row 0."""
    options = {name: first_row(name, x) for name, x in options.items()}

    def call(q, k, v, grad):
        exact = {n: x.detach().to(q.dtype) if is_float(x) and n != "alibi_slopes" else x for n, x in options.items()}
        out = flashattn.attention(q, k, v, **exact)
        return torch.autograd.grad(out, (q, k, v), grad) if case.backward else [out]

    return reference_truth(call, [x.detach()[:1].requires_grad_(x.requires_grad) for x in (*inputs, grad)])


def first_row(name: str, x):
    """Of an option that has a value for each batch row."""
    of_rows = isinstance(x, Tensor) and (name == "kv_lengths" or x.dim() == 4)
    return x[:1] if of_rows else x
