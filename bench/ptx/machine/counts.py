"""Counts for each instruction of a launch: those of a profiler, but exact.

A warp instruction is one issue, whatever lanes are active. A global request is one warp's load or store; it moves the
32-byte sectors that its lanes access. A shared request is served in wavefronts of 128 bytes: a wavefront takes one word
from each of the 32 banks, so lanes that access different words of one bank need several (a bank conflict). 8-byte
accesses are served for 16 lanes at a time, 16-byte accesses for 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..frontend.syntax import Instruction
from ..memory.global_memory import Traffic
from ..memory.segments import SECTOR

# The pipes of a multiprocessor; "move" is no pipe: register moves, most of which the assembler removes.
PIPES = ("tensor", "fma", "alu", "special", "memory", "control", "move")
SPECIAL = ("ex2", "lg2", "sin", "cos", "tanh", "rsqrt", "sqrt", "rcp")
MEMORY = (
    "ld", "ldu", "st", "atom", "red", "cp", "ldmatrix", "stmatrix", "prefetch", "mbarrier", "tensormap", "shfl",
    "movmatrix",
)  # fmt: skip
CONTROL = (
    "bra", "brx", "ret", "exit", "bar", "barrier", "call", "trap", "fence", "membar", "griddepcontrol", "elect", "vote",
    "match", "activemask", "nanosleep", "setmaxnreg",
)  # fmt: skip


def find_pipe(instruction: Instruction) -> str:
    """The pipe that executes an instruction. div and sqrt with a rounding modifier are many machine instructions; here
    they count as one special."""
    base, kind = instruction.parts[0], instruction.type
    if base in ("mma", "wgmma"):
        return "control" if base == "wgmma" and instruction.parts[1] != "mma_async" else "tensor"
    if base in ("mov", "cvta") or (base in ("ld", "st") and "param" in instruction.parts):
        return "move"
    if base in MEMORY:
        return "memory"
    if base in CONTROL:
        return "control"
    if base in SPECIAL or (base == "div" and kind in ("f32", "f64")):
        return "special"
    if base in ("add", "sub", "mul", "fma", "mad") and kind in ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64"):
        return "fma"
    if base in ("mul", "mad"):  # integers are multiplied there too
        return "fma"
    return "alu"


class Counts:
    """Arrays with one count for each instruction of the kernel."""

    FIELDS = (
        "issued", "flops", "global_requests", "global_sectors", "global_bytes", "shared_requests", "shared_wavefronts",
        "shared_ideal", "divergent",
    )  # fmt: skip

    def __init__(self, instructions: list[Instruction]):
        self.instructions = instructions
        for field in self.FIELDS:
            setattr(self, field, np.zeros(len(instructions), np.int64))
        self.first_address = np.zeros(len(instructions), np.uint64)  # in global memory
        self.read_bytes = self.written_bytes = 0  # each sector counts once
        self.tensors: list[Traffic] = []

    def count_global_access(self, pc: int, warp: np.ndarray, address: np.ndarray, nbytes: int) -> None:
        """One access of each lane, which crosses no sector boundary."""
        if not self.global_requests[pc]:
            self.first_address[pc] = address[0]
        sectors = address.astype(np.int64) // SECTOR
        self.global_requests[pc] += count_distinct(warp)
        self.global_sectors[pc] += count_distinct(warp.astype(np.int64) << 44 | sectors & ((1 << 44) - 1))
        self.global_bytes[pc] += nbytes * len(address)

    def count_shared_access(
        self, pc: int, warp: np.ndarray, lane: np.ndarray, address: np.ndarray, nbytes: int
    ) -> None:
        """warp: number of the request, one for each warp of each block."""
        phases = max(1, nbytes // 4)
        group = warp.astype(np.int64) * phases + lane // (32 // phases)
        self.shared_requests[pc] += count_distinct(warp)
        self.count_wavefronts(pc, group, address, nbytes)

    def count_wavefronts(self, pc: int, group: np.ndarray, address: np.ndarray, nbytes: int) -> None:
        """group: number of the set of lanes that are served together."""
        words = (address[:, None] + np.arange(0, max(nbytes, 4), 4)) // 4
        wanted = np.sort((group[:, None] << 24 | words).ravel())
        wanted = wanted[mark_changes(wanted)]  # a word that several lanes access is read once
        number = np.cumsum(mark_changes(wanted >> 24)) - 1  # index of the group
        banks = np.bincount(number * 32 + wanted % 32, minlength=(number[-1] + 1) * 32)
        self.shared_wavefronts[pc] += int(banks.reshape(-1, 32).max(1).sum())
        self.shared_ideal[pc] += int(number[-1]) + 1

    # -------------------------------------------------------------------------------------------- sums

    def total(self, field: str) -> int:
        return int(getattr(self, field).sum())

    def sum_by_pipe(self) -> dict[str, int]:
        """Warp instructions of each pipe."""
        found = dict.fromkeys(PIPES, 0)
        for instruction, issued in zip(self.instructions, self.issued, strict=True):
            found[find_pipe(instruction)] += int(issued)
        return found

    def sum_by_opcode(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for instruction, issued in zip(self.instructions, self.issued, strict=True):
            found[instruction.op] = found.get(instruction.op, 0) + int(issued)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def rows(self) -> Iterator[tuple[Instruction, dict[str, int]]]:
        """Each instruction with its counts."""
        table = np.stack([getattr(self, field) for field in self.FIELDS], 1)
        for instruction, row in zip(self.instructions, table.tolist(), strict=True):
            yield instruction, dict(zip(self.FIELDS, row, strict=True))


def mark_changes(x: np.ndarray) -> np.ndarray:
    """Mask of the sorted numbers that differ from the previous one."""
    found = np.ones(len(x), bool)
    np.not_equal(x[1:], x[:-1], out=found[1:])
    return found


def count_distinct(x: np.ndarray) -> int:
    """The number of different values."""
    return int(np.count_nonzero(mark_changes(np.sort(x))))


class Launch(NamedTuple):
    """An executed launch: its configuration and its counts."""

    kernel: str
    architecture: str
    grid: tuple[int, int, int]
    threads: int  # of a block
    shared_bytes: int
    counts: Counts

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]
