"""mma.sync, and the fragments and sums that it shares with wgmma.

Products are exact and summed in float64; the sum with the accumulator is rounded once to the accumulator's type. The
hardware truncates the bits of small addends instead (NVIDIA does not document how many), so its result can differ by a
few units in the last place of the accumulator. Fragment layouts: PTX ISA 8.7, 9.7.14 (mma) and 9.7.15 (wgmma).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..frontend.program import Program, Step, implements
from ..frontend.syntax import Group, Instruction
from . import floats

ELEMENT_TYPES = {
    "f16": np.uint16, "bf16": np.uint16, "tf32": np.uint32, "f64": np.uint64, "e4m3": np.uint8, "e5m2": np.uint8,
    "s8": np.int8, "u8": np.uint8,
}  # fmt: skip
INTEGERS = ("s8", "u8", "s32")


def decode_elements(bits: np.ndarray, kind: str) -> np.ndarray:
    """Elements of a matrix as float64, exactly."""
    return bits.astype(np.float64) if kind in INTEGERS else floats.decode(bits, kind)


def locate_fragment(count: int, kind: str, rows: bool) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of the elements of A, (column, row) of B, for each register, lane and element of a register.

    With e elements to a register, g = lane / 4 and t = lane % 4: register i of A holds row g + 8 (i % 2) and e columns
    from t e + 4 e (i / 2); register i of B holds column g and e rows from t e + 4 e i."""
    each = 1 if kind == "f64" else 4 // np.dtype(ELEMENT_TYPES[kind]).itemsize
    i, lane, j = np.ogrid[:count, :32, :each]
    g, t = lane // 4, lane % 4
    if rows:
        high = i % 2 if count > 1 else 0 * i
        row = g + 8 * high + 0 * j
        column = t * each + j + 4 * each * (i // 2)
        return np.broadcast_to(row, (count, 32, each)), np.broadcast_to(column, (count, 32, each))
    return np.broadcast_to(g + 0 * i + 0 * j, (count, 32, each)), t * each + j + 4 * each * i


def locate_accumulator(columns: int, halves: bool, rows: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) for each register, lane and element of C and D, with 16 rows (8 in the small float64 shape)."""
    pairs = 2 if rows == 16 else 1
    each = 2 if halves else 1
    i, lane, j = np.ogrid[: columns // 8 * pairs * (1 if halves else 2), :32, :each]
    n = i if halves else i // 2  # which pair of columns
    low = j if halves else i % 2
    row = lane // 4 + 8 * (n % pairs)
    column = (lane % 4) * 2 + low + 8 * (n // pairs)
    shape = np.broadcast_shapes(row.shape, column.shape)
    return np.broadcast_to(row, shape), np.broadcast_to(column, shape)


def encode_sums(total: np.ndarray, kind: str, saturate: bool) -> np.ndarray:
    """float64 sums as bits of the accumulator's type, halves not yet packed."""
    if kind == "s32":
        if saturate:
            return np.clip(total, -(2**31), 2**31 - 1).astype(np.int64).astype(np.uint32)
        return total.astype(np.int64).astype(np.uint32)
    if kind == "f32":
        out = total.astype(np.float32)
        nan = np.isnan(out)
        return np.where(nan, floats.NAN32, out.view(np.uint32)) if nan.any() else out.view(np.uint32)
    if kind == "f16":
        return floats.encode(total, "f16")
    return total.view(np.uint64)


@dataclass
class Shape:
    m: int
    n: int
    k: int


def parse_shape(instruction: Instruction) -> Shape:
    found = next(m for p in instruction.parts if (m := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", p)))
    return Shape(*(int(x) for x in found.groups()))


class Fragment:
    """The registers of an operand: gathered into matrices (warps, …), and scattered from a result."""

    def __init__(self, program: Program, group: Group, kind: str, index: tuple[np.ndarray, np.ndarray], shape: tuple):
        self.kind, self.index, self.shape = kind, index, shape
        self.word = np.uint64 if kind == "f64" else np.uint32
        self.slots = [program.make_source_slot(x, self.word) for x in group.items]
        if index[0].shape[0] != len(self.slots):
            raise ValueError(f"{len(self.slots)} registers, expected {index[0].shape[0]}")

    def read_bits(self, unit, warps: np.ndarray, dtype: type) -> np.ndarray:
        """(warps, registers, 32, elements of a register)."""
        out = np.empty((len(warps), len(self.slots), 32), self.word)
        for i, slot in enumerate(self.slots):
            out[:, i] = np.broadcast_to(unit.slots[slot], unit.count).reshape(-1, 32)[warps]
        return out.view(dtype).reshape(*out.shape, -1)

    def read_matrix(self, unit, warps: np.ndarray, dtype: type, kind: str) -> np.ndarray:
        out = np.empty((len(warps), *self.shape))
        out[:, self.index[0], self.index[1]] = decode_elements(self.read_bits(unit, warps, dtype), kind)
        return out

    def read_sums(self, unit, warps: np.ndarray) -> np.ndarray:
        """The values of an accumulator, as float64."""
        if self.kind == "f16":
            return self.read_matrix(unit, warps, np.uint16, "f16")
        return self.read_matrix(unit, warps, ACCUMULATOR_TYPES[self.kind], "s32")

    def store(self, unit, warps: np.ndarray, values: np.ndarray) -> None:
        registers = np.ascontiguousarray(values[:, self.index[0], self.index[1]]).view(self.word)[..., 0]
        for i, slot in enumerate(self.slots):
            unit.slots[slot].reshape(-1, 32)[warps] = registers[:, i]


ACCUMULATOR_TYPES = {"f32": np.float32, "f64": np.float64, "s32": np.int32}


@implements("mma")
def mma(program: Program, instruction: Instruction) -> Step | None:
    """D = A B + C of one warp."""
    parts = instruction.parts
    if "sp" in parts or parts[1] != "sync" or "row" not in parts or parts[parts.index("row") + 1] != "col":
        return None
    shape = parse_shape(instruction)
    kinds = parts[-4:]
    _, a_kind, b_kind, c_kind = kinds
    d, a, b, c = instruction.operands[:4]
    rows = locate_fragment(len(a.items), a_kind, True)
    columns = locate_fragment(len(b.items), b_kind, False)
    place = locate_accumulator(shape.n, c_kind == "f16", shape.m)
    left = Fragment(program, a, a_kind, rows, (shape.m, shape.k))
    right = Fragment(program, b, b_kind, columns, (shape.n, shape.k))
    before = Fragment(program, c, c_kind, place, (shape.m, shape.n))
    after = Fragment(program, d, kinds[0], place, (shape.m, shape.n))
    pc, flops = len(program.steps), 2 * shape.m * shape.n * shape.k
    saturate = "satfinite" in parts

    def run(unit, mask):
        warps = np.arange(unit.count // 32) if mask is None else np.flatnonzero(mask.reshape(-1, 32).any(1))
        x = left.read_matrix(unit, warps, ELEMENT_TYPES[a_kind], a_kind)
        y = right.read_matrix(unit, warps, ELEMENT_TYPES[b_kind], b_kind)
        z = before.read_sums(unit, warps)
        after.store(unit, warps, encode_sums(x @ y.swapaxes(1, 2) + z, kinds[0], saturate))
        unit.wave.counts.flops[pc] += flops * len(warps)

    return run
