"""Part "attention": forward and backward alone, at the shapes of Shah et al., "FlashAttention-3" (2024): 16,384 tokens
and a hidden size of 2,048 in all; and batch 1 with 64 query and 8 key heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import flashattn
from flashattn.backends import triton_hopper

from .compare import OURS, PLAIN, Comparison, compare_all, compute_reference, copy_inputs, count_bytes, cycle_calls
from .context import Call, Context
from .peers import list_attention_peers, prepare_flex
from .rules import count_attention_flops
from .tables import COMPARED, describe_pass, make_grid


class Case(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    seq: int
    head_dim: int
    causal: bool
    backward: bool
    flex: bool = False  # the only peer is FlexAttention, which is compiled for each shape


TOKENS, HIDDEN = 16384, 2048


def list_cases(rehearse: bool) -> list[Case]:
    """Long sequences and the common head_dim first: a short budget drops the end of the list."""
    if rehearse:
        return [
            Case(1, 1, 1, 130, 16, True, False),
            Case(1, 2, 1, 70, 16, True, True),
            Case(1, 1, 1, 128, 16, False, False, flex=True),
        ]
    passes = [(causal, backward) for backward in (False, True) for causal in (True, False)]

    def make_case(seq: int, head_dim: int, causal: bool, backward: bool, flex: bool = False) -> Case:
        heads = HIDDEN // head_dim
        return Case(TOKENS // seq, heads, heads, seq, head_dim, causal, backward, flex)

    first = [make_case(seq, dim, *p) for seq in (4096, 16384) for dim in (128, 64) for p in passes]
    grouped = [Case(1, 64, 8, seq, 128, True, backward) for seq in (4096, 8192) for backward in (False, True)]
    rest = [make_case(seq, dim, *p) for seq in (8192, 2048, 1024, 512) for dim in (128, 64) for p in passes]
    wide = [make_case(seq, 256, *p) for seq in (4096, 16384, 8192, 2048, 1024, 512) for p in passes]
    compiled = [make_case(4096, 128, *p, flex=True) for p in passes]
    return first + grouped + wide[:8] + rest + wide[8:] + compiled


def run(context: Context) -> Iterator[dict]:
    yield from compare_all(context, list_cases(context.rehearse), make_comparison)


def summarise(rows: list[dict]) -> list[str]:
    compiled = {row["case"] for row in rows if row.get("variant") == "flex"}
    usual = make_grid([row for row in rows if row["case"] not in compiled], format_label, "seq")
    by_dim = make_grid([row for row in rows if row["case"] in compiled], describe_pass, "head_dim")
    return [f"TFLOP/s by seq, {COMPARED}; last by head_dim, 4,096 tokens, against FlexAttention", *usual, *by_dim]


def format_label(row: dict) -> str:
    grouped = "" if row["heads"] == row["kv_heads"] else f", {row['heads']}/{row['kv_heads']} heads"
    return f"{describe_pass(row)} {row['head_dim']}{grouped}"


def make_comparison(context: Context, case: Case) -> Comparison:
    inputs = make_inputs(context, case)
    bytes_touched = count_bytes(inputs)
    sets = copy_inputs(context, inputs, bytes_touched)
    make = prepare_backward if case.backward else prepare_forward
    peers = {"flex": lambda: prepare_flex(case.causal, case.seq, context.device, context.rehearse)}
    if not case.flex:
        peers = list_attention_peers(case.causal, context.rehearse)

    def ours(*x: Tensor) -> Tensor:
        return flashattn.attention(*x, causal=case.causal)

    variants: dict[str, Callable[[], Call]] = {
        name: lambda attend=attend: make(attend(), sets) for name, attend in {OURS: lambda: ours, **peers}.items()
    }
    if context.card.architecture == "sm_90" and not case.flex:
        variants[PLAIN] = lambda: prepare_plain(make, ours, sets)
    group = case.heads // case.kv_heads

    def select(results: list[Tensor]) -> list[Tensor]:
        """Batch row 0, the first key/value head and its group of query heads."""
        return [x[:1, : (1 if i in (1, 2) else group)] for i, x in enumerate(results)]

    def compute_truth():
        q, k, v, grad = (x[:1, : (1 if i in (1, 2) else group)] for i, x in enumerate(inputs))

        def call(q, k, v, grad):
            out = flashattn.attention(q, k, v, causal=case.causal)
            return torch.autograd.grad(out, (q, k, v), grad) if case.backward else [out]

        return compute_reference(call, [*(x.detach().requires_grad_() for x in (q, k, v)), grad])

    shape = {name: value for name, value in case._asdict().items() if name not in ("backward", "flex")}
    settings = {"pass": "backward" if case.backward else "forward", **shape, "dtype": "bfloat16"}
    flops = count_attention_flops(case.heads, case.head_dim, case.batch * case.seq**2, case.causal, case.backward)
    return Comparison(
        name_case(case), settings, variants, bytes_touched, compute_truth, select, flops=flops,
        ours=tuple(name for name in (OURS, PLAIN) if name in variants), compiled=("flex",) if case.flex else (),
    )  # fmt: skip


def name_case(case: Case) -> str:
    kind = f"{'backward' if case.backward else 'forward'} {'causal' if case.causal else 'full'}"
    heads = f"{case.heads}" if case.heads == case.kv_heads else f"{case.heads}/{case.kv_heads}"
    return f"{kind} {case.batch} x {heads} x {case.seq} x {case.head_dim}" + (", compiled peer" if case.flex else "")


def make_inputs(context: Context, case: Case) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    inputs = [context.randn(case.batch, n, case.seq, case.head_dim) for n in heads]
    return [x.requires_grad_(case.backward) for x in inputs[:3]] + inputs[3:]


def prepare_plain(make: Callable, attend: Callable, sets: list[list[Tensor]]) -> Call:
    """A call of the plain kernels, prepared with them too."""
    with triton_hopper.use_plain_kernels():
        call = make(attend, sets)

    def run():
        with triton_hopper.use_plain_kernels():
            return call()

    return run


def prepare_forward(attend: Callable, sets: list[list[Tensor]]) -> Call:
    def make_call(q, k, v, _) -> Call:
        return lambda: attend(q, k, v)

    return cycle_calls([make_call(*x) for x in sets])


def prepare_backward(attend: Callable, sets: list[list[Tensor]]) -> Call:
    """The backward pass alone; its forward runs here, once."""

    def make_call(q, k, v, grad) -> Call:
        out = attend(q, k, v)
        return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    return cycle_calls([make_call(*x) for x in sets])
