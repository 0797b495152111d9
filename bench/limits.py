"""The project's kernels against their limits: issue slots of other instructions in loops over full tiles.

Each of a multiprocessor's four schedulers issues one instruction a clock, whatever its kind: the fewer other
instructions a loop has for its tensor FLOPs, the less the tensor cores wait. "before" are the plain kernels as an H100
and an H200 first ran them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from rich.console import Console

from flashattn.backends import triton as backend
from flashattn.protocol import Saved
from flashattn.score import Score

from . import limit_bytes
from .compiled import Kernel, compile_for
from .sass import Loop, find_full_tile_loops
from .table import collect, make_console, make_table

TOLERANCE = 1.02  # of a limit: the assembler's versions differ by an instruction or two


class Limit(NamedTuple):
    """Slots per 1,024 tensor FLOPs of a warp, bfloat16, without features."""

    direction: str
    architecture: str
    head_dim: int
    before: float | None
    at_most: float
    target: float | None


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


class Measurement(NamedTuple):
    kernel: Kernel
    loops: list[Loop]  # over full tiles, one for each role that multiplies

    @property
    def slots(self) -> float:
        return max(loop.overhead for loop in self.loops)

    @property
    def local(self) -> int:
        """Instructions of these loops that access local memory."""
        return sum(loop.mix.get("local", 0) for loop in self.loops)


@functools.cache
def compile_kernels(architecture: str, head_dim: int, causal: bool = False) -> dict[str, Kernel]:
    """The kernels of the three passes at a head_dim, by name of the pass."""
    q = torch.empty(1, 4, 1024, head_dim, dtype=torch.bfloat16)
    score = Score(head_dim**-0.5, right=0 if causal else None)
    with compile_for(architecture) as found:
        out, lse, rest = backend.forward(q, q, q, score)
        backend.backward(out, None, Saved(q, q, q, out, lse, rest), score, False, [])
    return {kernel.name.removeprefix("attention_").removesuffix("_hopper"): kernel for kernel in found}


def measure(limit: Limit, causal: bool = False) -> Measurement:
    kernel = compile_kernels(limit.architecture, limit.head_dim, causal)[limit.direction]
    return Measurement(kernel, find_full_tile_loops(kernel.code))


def is_met(limit: Limit, measured: Measurement) -> bool:
    return measured.slots <= limit.at_most * TOLERANCE and not measured.local


def run() -> int:
    """Print the tables. 0: every limit on slots is met; 1: one is not. Limits on bytes that are exceeded say OVER."""
    console = make_console(120)
    with console.status("compiling") as status:
        measured = []
        for limit in LIMITS:
            status.update(f"compiling for {limit.architecture}, head_dim {limit.head_dim}")
            measured.append(measure(limit))
    moved = collect(console, limit_bytes.measure(), lambda each: f"the bytes of {each.what}, {each.size}")
    print_slots(console, measured)
    print_bytes(console, moved)
    return 0 if all(is_met(*pair) for pair in zip(LIMITS, measured, strict=True)) else 1


def print_slots(console: Console, measured: list[Measurement]) -> None:
    numbers = ["head_dim", "before", "now", "at most", "target", "registers", "spills", "in the loop"]
    rows = (format_slots(*pair) for pair in zip(LIMITS, measured, strict=True))
    console.print(make_table(["kernel", "arch"], numbers, rows))
    console.print(
        "before, now, at most, target: issue slots of other instructions per 1,024 tensor FLOPs of a warp, in the"
    )
    console.print("loop over full tiles; spills: instructions that access local memory")


def format_slots(limit: Limit, measured: Measurement) -> list[str]:
    kernel = measured.kernel
    return [
        kernel.name, limit.architecture, str(limit.head_dim), format_number(limit.before),
        format_number(measured.slots), format_number(limit.at_most) + ("" if is_met(limit, measured) else " OVER"),
        format_number(limit.target), str(kernel.registers), str(kernel.spills or "."), str(measured.local or "."),
    ]  # fmt: skip


def print_bytes(console: Console, moved: list[limit_bytes.BytesMoved]) -> None:
    """A row for each pass, a column for each size."""
    ratios: dict[str, dict[str, float]] = {}
    for each in moved:
        ratios.setdefault(each.what, {})[each.size] = each.ratio
    for sizes in (list(ratios["decode"]), list(next(iter(ratios.values())))):
        rows = [format_bytes(what, by_size) for what, by_size in ratios.items() if list(by_size) == sizes]
        console.print(make_table(["bytes moved / needed"], [*sizes, "at most", "target"], rows))


def format_bytes(what: str, ratios: dict[str, float]) -> list[str]:
    cells = [f"{ratio:.3f}" + " OVER" * (ratio > limit_bytes.AT_MOST) for ratio in ratios.values()]
    return [what, *cells, format_number(limit_bytes.AT_MOST), format_number(limit_bytes.TARGET)]


def format_number(value: float | None) -> str:
    return "." if value is None else f"{value:.2f}"
