"""Stored values that differ only by rounding: threads that compute the same sum, each in its own order.

Applies only if floating-point instructions produce every bit of the value: other bits may mean anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..frontend.program import Program
from ..frontend.syntax import Group, Instruction, Operand, Register, split_vector
from . import floats

MANTISSA_BITS = {"f64": 52, "f32": 23, "f16": 10, "bf16": 7}
MAX_ULPS = 16  # by which sums of the same terms may differ


def is_rounding_difference(
    program: Program, operand: Operand, wanted: np.ndarray, stored_bits: np.ndarray, values: np.ndarray
) -> bool:
    """wanted: (n, count) bits that some lanes store; stored_bits: those that others store; values: all of them."""
    for i, register in enumerate(split_vector(operand)):
        different = wanted[:, i] != stored_bits[:, i]
        if not different.any():
            continue
        kinds = set(find_source_types(program, register, frozenset()))
        if len(kinds) != 1 or not is_close(wanted[different, i], stored_bits[different, i], values[:, i], kinds.pop()):
            return False
    return True


def find_source_types(program: Program, register: Operand, seen: frozenset[str]) -> Iterator[str]:
    """The types of the instructions that compute the bits of a register."""
    if not isinstance(register, Register) or register.name in seen:
        return
    seen |= {register.name}
    for instruction in program.definitions.get(register.name, ()):
        sources = find_copied_operands(instruction)
        if not sources:
            yield find_result_type(instruction)
        for source in sources:
            yield from find_source_types(program, source, seen)


def find_copied_operands(instruction: Instruction) -> tuple[Operand, ...]:
    """The operands whose bits an instruction copies."""
    base, operands = instruction.parts[0], instruction.operands
    if base == "mov":
        return operands[1].items if isinstance(operands[1], Group) else operands[1:]
    if base == "shfl":
        return operands[1:2]
    return operands[1:3] if base == "selp" else ()


def find_result_type(instruction: Instruction) -> str:
    parts = instruction.parts
    if parts[0] == "wgmma":
        return parts[-3]
    return parts[-2] if parts[0] == "cvt" else parts[-1]


def is_close(a: np.ndarray, b: np.ndarray, all_bits: np.ndarray, kind: str) -> bool:
    """Whether floats differ by at most MAX_ULPS of the largest stored value, as the terms of a smaller sum may be."""
    name = kind.removesuffix("x2")
    if name not in MANTISSA_BITS or a.dtype.itemsize * 8 < (64 if name == "f64" else 16):
        return False
    word = {"f64": np.uint64, "f32": np.uint32}.get(name, np.uint16)
    x, y, stored_values = (floats.decode(np.ascontiguousarray(bits).view(word), name) for bits in (a, b, all_bits))
    largest = np.abs(stored_values[np.isfinite(stored_values)]).max(initial=0)
    return bool((np.abs(x - y) <= MAX_ULPS * 2.0 ** -MANTISSA_BITS[name] * largest).all())
