"""Part "varlen": packed sequences of random lengths from 64 to 2,048, 16,384 tokens or a few more in all, 16 heads of
128."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import flashattn

from .attention import prepare_backward, prepare_forward
from .compare import OURS, Comparison, compare_all, compute_reference, copy_inputs, count_bytes
from .context import Context
from .peers import find_installed
from .rules import count_attention_flops
from .tables import COMPARED, describe_pass, make_grid


class Case(NamedTuple):
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    causal: bool
    backward: bool


def list_cases(rehearse: bool) -> list[Case]:
    if rehearse:
        return [Case((40, 70), 1, 16, True, True)]
    numbers = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < 16384:
        lengths.append(numbers.randint(64, 2048))
    return [Case(tuple(lengths), 16, 128, causal, backward) for backward in (False, True) for causal in (True, False)]


def run(context: Context) -> Iterator[dict]:
    yield from compare_all(context, list_cases(context.rehearse), make_comparison)


def summarise(rows: list[dict]) -> list[str]:
    return [f"TFLOP/s by head_dim, {COMPARED}", *make_grid(rows, describe_pass, "head_dim")]


def make_comparison(context: Context, case: Case) -> Comparison:
    total, longest = sum(case.lengths), max(case.lengths)
    inputs = [context.randn(total, case.heads, case.head_dim) for _ in range(4)]
    inputs = [x.requires_grad_(case.backward) for x in inputs[:3]] + inputs[3:]
    starts = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=context.device)
    bytes_touched = count_bytes(inputs)
    sets = copy_inputs(context, inputs, bytes_touched)
    make = prepare_backward if case.backward else prepare_forward

    def ours(q, k, v):
        return flashattn.attention_varlen(q, k, v, starts, starts, longest, longest, causal=case.causal)

    def varlen_attn_call(q, k, v):
        from torch.nn.attention.varlen import varlen_attn

        masked = {"window_size": (-1, 0)} if case.causal else {}
        return varlen_attn(q, k, v, starts, starts, longest, longest, **masked)

    def flash_attn(q, k, v):
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=case.causal)

    calls = {OURS: ours, "varlen_attn": varlen_attn_call} | (
        {"flash_attn": flash_attn} if "flash_attn" in find_installed() else {}
    )
    variants = {name: lambda attend=attend: make(attend, sets) for name, attend in calls.items()}
    settings = {
        "pass": "backward" if case.backward else "forward", "sequences": len(case.lengths), "tokens": total,
        "heads": case.heads, "head_dim": case.head_dim, "causal": case.causal, "dtype": "bfloat16",
    }  # fmt: skip
    pairs = sum(n**2 for n in case.lengths)
    return Comparison(
        f"{settings['pass']} {'causal' if case.causal else 'full'} {len(case.lengths)} sequences", settings, variants,
        bytes_touched, lambda: compute_truth(case, inputs),
        lambda results: [select_first_and_last(case, x) for x in results],
        flops=count_attention_flops(case.heads, case.head_dim, pairs, case.causal, case.backward),
    )  # fmt: skip


def select_first_and_last(case: Case, x: Tensor) -> Tensor:
    """Head 0 of the first and of the last sequence."""
    return torch.cat((x[: case.lengths[0], :1], x[-case.lengths[-1] :, :1]))


def compute_truth(case: Case, inputs: list[Tensor]):
    starts = torch.tensor([0, case.lengths[0], case.lengths[0] + case.lengths[-1]], dtype=torch.int32)
    starts, longest = starts.to(inputs[0].device), max(case.lengths[0], case.lengths[-1])

    def call(q, k, v, grad):
        out = flashattn.attention_varlen(q, k, v, starts, starts, longest, longest, causal=case.causal)
        return torch.autograd.grad(out, (q, k, v), grad) if case.backward else [out]

    chosen = [select_first_and_last(case, x.detach()) for x in inputs]
    return compute_reference(call, [*(x.requires_grad_() for x in chosen[:3]), chosen[3]])
