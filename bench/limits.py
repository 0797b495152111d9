"""The project's kernels against the limits set for them: issue slots that do not multiply, in loops over whole tiles.

A multiprocessor issues one instruction a clock for each of its four schedulers, whatever it is: where a loop has fewer
other instructions for its tensor FLOPs, the tensor cores wait less. "before" are the plain kernels as an H100
and an H200 first ran them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from flashattn.backends import triton as backend
from flashattn.protocol import Saved
from flashattn.score import Score

from . import limit_bytes
from .compiled import Kernel, compile_for
from .report import make_console
from .sass import Loop, steady_loops, tensor_loops

TOLERANCE = 1.02  # of a limit: the assembler's versions differ by an instruction or two


class Limit(NamedTuple):
    """Slots for 1,024 tensor FLOPs of a warp, bfloat16, without features."""

    direction: str
    architecture: str
    head_dim: int
    before: float | None
    at_most: float
    aim: float | None


LIMITS = [
    Limit("forward", "sm_90", 64, 1.00, 0.80, 0.75), Limit("forward", "sm_90", 128, 0.72, 0.44, 0.40),
    Limit("forward", "sm_90", 256, 0.71, 0.38, 0.35),
    Limit("backward_q", "sm_90", 64, 0.65, 0.45, 0.42), Limit("backward_q", "sm_90", 128, 0.37, 0.29, 0.27),
    Limit("backward_kv", "sm_90", 64, 0.98, 0.48, 0.45), Limit("backward_kv", "sm_90", 128, 0.83, 0.27, 0.25),
    Limit("backward_kv", "sm_90", 256, None, 0.21, None),
    Limit("forward", "sm_80", 64, 1.26, 1.15, 1.05), Limit("forward", "sm_80", 128, 1.02, 0.75, 0.70),
    Limit("backward_q", "sm_80", 64, 0.72, 0.72, None), Limit("backward_q", "sm_80", 128, 0.59, 0.59, None),
    Limit("backward_kv", "sm_80", 64, 0.95, 0.69, None), Limit("backward_kv", "sm_80", 128, 0.68, 0.60, None),
]  # fmt: skip


class Measured(NamedTuple):
    kernel: Kernel
    steady: list[Loop]  # one for each role that multiplies

    @property
    def slots(self) -> float:
        return max(loop.overhead for loop in self.steady)

    @property
    def local(self) -> int:
        """Instructions of these loops that touch local memory."""
        return sum(loop.mix.get("local", 0) for loop in self.steady)


@functools.cache
def kernels(architecture: str, head_dim: int, causal: bool = False) -> dict[str, Kernel]:
    """The three passes at a head_dim, compiled, by their names."""
    q = torch.empty(1, 4, 1024, head_dim, dtype=torch.bfloat16)
    score = Score(head_dim**-0.5, right=0 if causal else None)
    with compile_for(architecture) as found:
        out, lse, rest = backend.forward(q, q, q, score)
        backend.backward(out, None, Saved(q, q, q, out, lse, rest), score, False, [])
    return {kernel.name.removeprefix("attention_").removesuffix("_hopper"): kernel for kernel in found}


def measure(limit: Limit, causal: bool = False) -> Measured:
    kernel = kernels(limit.architecture, limit.head_dim, causal)[limit.direction]
    return Measured(kernel, steady_loops(tensor_loops(kernel.code)))


def is_kept(limit: Limit, measured: Measured) -> bool:
    return measured.slots <= limit.at_most * TOLERANCE and not measured.local


def run() -> int:
    """Prints the tables. 0: every limit on slots is kept; 1: one is not. Those on bytes that are missed say OVER."""
    console = make_console(120)
    found, moved = [], []
    with console.status("compiling") as status:
        for limit in LIMITS:
            status.update(f"compiling for {limit.architecture}, head_dim {limit.head_dim}")
            found.append(measure(limit))
        for each in limit_bytes.measure():
            moved.append(each)
            status.update(f"counted the bytes of {each.what}, {each.size}")
    print_limits(console, found)
    print_bytes(console, moved)
    return 0 if all(is_kept(*pair) for pair in zip(LIMITS, found, strict=True)) else 1


def print_limits(console: Console, found: list[Measured]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("kernel", "arch"):
        table.add_column(name, no_wrap=True)
    for name in ("head_dim", "before", "now", "at most", "aim", "registers", "spills", "in the loop"):
        table.add_column(name, justify="right", no_wrap=True)
    for limit, measured in zip(LIMITS, found, strict=True):
        kernel = measured.kernel
        table.add_row(
            kernel.name, limit.architecture, str(limit.head_dim), number(limit.before), number(measured.slots),
            number(limit.at_most) + ("" if is_kept(limit, measured) else " OVER"), number(limit.aim),
            str(kernel.registers), str(kernel.spills or "."), str(measured.local or "."),
        )  # fmt: skip
    console.print(table)
    console.print(
        "before, now, at most, aim: issue slots of other instructions for 1,024 tensor FLOPs of a warp, in the"
    )
    console.print("loop over whole tiles; spills: instructions that store or load what did not fit the registers")


def print_bytes(console: Console, moved: list[limit_bytes.Moved]) -> None:
    """A line for each pass, a column for each size."""
    lines: dict[str, dict[str, float]] = {}
    for each in moved:
        lines.setdefault(each.what, {})[each.size] = each.ratio
    for sizes in (list(lines["decode"]), list(next(iter(lines.values())))):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("bytes moved / needed", no_wrap=True)
        for name in (*sizes, "at most", "aim"):
            table.add_column(name, justify="right", no_wrap=True)
        for what, ratios in lines.items():
            if list(ratios) == sizes:
                cells = [f"{ratios[size]:.3f}" + " OVER" * (ratios[size] > limit_bytes.AT_MOST) for size in sizes]
                table.add_row(what, *cells, number(limit_bytes.AT_MOST), number(limit_bytes.AIM))
        console.print(table)


def number(value: float | None) -> str:
    return "." if value is None else f"{value:.2f}"
