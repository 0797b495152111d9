"""Checks in machine code that the descriptors of Hopper's tensor cores hold addresses in shared memory.

ptxas before 12.9 drops the copy of a register that two descriptors share, so that the tensor cores read from an
arbitrary address. The PTX is right; only the machine code shows the fault. A data-flow analysis finds the registers
that derive from the base of shared memory on every path.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .sass import LABEL, TARGET

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
REGISTER = re.compile(r"\b(U?R)(\d+)")
BASE = ("ULEA", "LEA")  # with a shift of 24: the rank in the cluster and 0x400, where shared memory begins
OPAQUE = ("LDG", "LDC", "ULDC", "LDS", "S2", "CS2", "HMMA", "HGMMA")  # their results derive from no register
NO_RESULT = ("ST", "RED", "BAR", "BRA", "EXIT", "LDGSTS", "DEPBAR", "LDGDEPBAR", "WARP", "MEMBAR", "FENCE",
             "UTMA", "SYNCS")  # fmt: skip

Registers = frozenset[str]


class Instruction(NamedTuple):
    predicated: bool
    name: str
    operands: list[str]
    target: int | None  # of a branch, as an index


def find_lost_descriptors(sass: str) -> list[str]:
    """The `HGMMA` instructions with a descriptor that does not derive from the base of shared memory."""
    code = parse(sass)
    before = trace_registers(code)
    return [
        f"{x.name} {', '.join(x.operands)}"
        for x, registers in zip(code, before, strict=True)
        if x.name.startswith("HGMMA") and registers is not None and not set(list_descriptors(x)) <= registers
    ]


def parse(sass: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    found: list[tuple[str | None, str, str]] = []
    for line in sass.splitlines():
        if match := LABEL.match(line):
            labels[match.group(1)] = len(found)
        elif match := INSTRUCTION.match(line):
            found.append(match.groups())
    code = []
    for predicate, name, rest in found:
        target = TARGET.search(rest) if name.startswith("BRA") else None
        operands = [operand.strip() for operand in rest.split(",")]
        index = labels.get(target.group(1)) if target else None
        code.append(Instruction(predicate is not None, name, operands, index))
    return code


def list_descriptors(x: Instruction) -> list[str]:
    """The low words of an HGMMA's descriptors: of A, unless it comes from registers, and of B."""
    first = next(int(n) for operand in x.operands for n in re.findall(r"gdesc\[UR(\d+)\]", operand))
    a_in_registers = REGISTER.match(x.operands[1]) is not None
    return [f"UR{first + 2}"] if a_in_registers else [f"UR{first}", f"UR{first + 2}"]


def trace_registers(code: list[Instruction]) -> list[Registers | None]:
    """Before each instruction, the registers that derive from the base on every path to it; None: no path does."""
    before: list[Registers | None] = [None] * len(code)
    before[:1] = [frozenset()]
    worklist = [0]
    while worklist:
        index = worklist.pop()
        x = code[index]
        after = apply_instruction(x, before[index])
        ends = not x.predicated and x.name.startswith(("BRA", "EXIT", "RET"))
        following = [x.target, None if ends else index + 1]
        for next_index in following:
            if next_index is None or next_index >= len(code):
                continue
            known = before[next_index]
            joined = after if known is None else known & after
            if joined != known:
                before[next_index] = joined
                worklist.append(next_index)
    return before


def apply_instruction(x: Instruction, registers: Registers) -> Registers:
    """The registers that derive from the base after the instruction."""
    at = next((i for i, operand in enumerate(x.operands[:2]) if REGISTER.match(operand)), None)
    if at is None or x.name.startswith(NO_RESULT):
        return registers
    kind, number = REGISTER.match(x.operands[at]).groups()
    written = frozenset(f"{kind}{int(number) + i}" for i in range(count_results(x.name)))
    if not is_derived(x, at, registers):
        return registers - written
    return registers if x.predicated else registers | written  # predicated: may keep the old value


def count_results(name: str) -> int:
    """The number of registers that an instruction writes, at most."""
    if accumulators := re.match(r"HGMMA\.64x(\d+)x", name):
        return int(accumulators.group(1)) // 2
    if name.startswith("HMMA") or ".128" in name or ".M88.4" in name:
        return 4
    return 2 if any(part in name for part in (".64", ".WIDE", ".M88.2")) else 1


def is_derived(x: Instruction, at: int, registers: Registers) -> bool:
    if x.name in BASE and x.operands[-1] == "0x18":
        return True
    if x.name.startswith("LDL"):  # a spilled register: not traced, assumed derived
        return True
    sources = {kind + number for operand in x.operands[at + 1 :] for kind, number in REGISTER.findall(operand)}
    return not x.name.startswith(OPAQUE) and bool(sources & registers)
