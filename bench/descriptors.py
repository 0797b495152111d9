"""Whether the descriptors by which Hopper's tensor cores read shared memory hold an address of it, in machine code.

ptxas before 12.9 leaves out the copy of a register that two descriptors share, and the tensor cores read from an
arbitrary address. The PTX is right; only the machine code shows the fault. Here the registers that derive from the base
of shared memory are followed along every path.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .sass import LABEL, TARGET

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
REGISTER = re.compile(r"\b(U?R)(\d+)")
BASE = ("ULEA", "LEA")  # with a shift of 24: the rank in the cluster and 0x400, where shared memory begins
OPAQUE = ("LDG", "LDC", "ULDC", "LDS", "S2", "CS2", "HMMA", "HGMMA")  # their results derive from nothing
NO_RESULT = ("ST", "RED", "BAR", "BRA", "EXIT", "LDGSTS", "DEPBAR", "LDGDEPBAR", "WARP", "MEMBAR", "FENCE",
             "UTMA", "SYNCS")  # fmt: skip

Registers = frozenset[str]


class Instruction(NamedTuple):
    predicated: bool
    name: str
    operands: list[str]
    target: int | None  # of a branch, its place in the code


def lost_descriptors(sass: str) -> list[str]:
    """The `HGMMA` instructions with a descriptor that does not derive from the base of shared memory."""
    code = parse(sass)
    before = derived_registers(code)
    return [
        f"{x.name} {', '.join(x.operands)}"
        for x, registers in zip(code, before, strict=True)
        if x.name.startswith("HGMMA") and registers is not None and not set(descriptors(x)) <= registers
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
        place = labels.get(target.group(1)) if target else None
        code.append(Instruction(predicate is not None, name, operands, place))
    return code


def descriptors(x: Instruction) -> list[str]:
    """The low words of an HGMMA's descriptors: of A, unless it comes from registers, and of B."""
    first = next(int(n) for operand in x.operands for n in re.findall(r"gdesc\[UR(\d+)\]", operand))
    a_in_registers = REGISTER.match(x.operands[1]) is not None
    return [f"UR{first + 2}"] if a_in_registers else [f"UR{first}", f"UR{first + 2}"]


def derived_registers(code: list[Instruction]) -> list[Registers | None]:
    """Before each instruction, the registers that derive from the base on every path to it; None: no path does."""
    before: list[Registers | None] = [None] * len(code)
    before[:1] = [frozenset()]
    waiting = [0]
    while waiting:
        place = waiting.pop()
        x = code[place]
        after = step(x, before[place])
        ends = not x.predicated and x.name.startswith(("BRA", "EXIT", "RET"))
        following = [x.target, None if ends else place + 1]
        for next_place in following:
            if next_place is None or next_place >= len(code):
                continue
            known = before[next_place]
            joined = after if known is None else known & after
            if joined != known:
                before[next_place] = joined
                waiting.append(next_place)
    return before


def step(x: Instruction, registers: Registers) -> Registers:
    """The registers that derive from the base after an instruction."""
    at = next((i for i, operand in enumerate(x.operands[:2]) if REGISTER.match(operand)), None)
    if at is None or x.name.startswith(NO_RESULT):
        return registers
    kind, number = REGISTER.match(x.operands[at]).groups()
    written = frozenset(f"{kind}{int(number) + i}" for i in range(width(x.name)))
    if not derives(x, at, registers):
        return registers - written
    return registers if x.predicated else registers | written  # a predicated one may keep what was there


def width(name: str) -> int:
    """How many registers an instruction writes, at most."""
    if accumulators := re.match(r"HGMMA\.64x(\d+)x", name):
        return int(accumulators.group(1)) // 2
    if name.startswith("HMMA") or ".128" in name or ".M88.4" in name:
        return 4
    return 2 if any(part in name for part in (".64", ".WIDE", ".M88.2")) else 1


def derives(x: Instruction, at: int, registers: Registers) -> bool:
    if x.name in BASE and x.operands[-1] == "0x18":
        return True
    if x.name.startswith("LDL"):  # a register that was spilled: not followed, and taken for right
        return True
    sources = {kind + number for operand in x.operands[at + 1 :] for kind, number in REGISTER.findall(operand)}
    return not x.name.startswith(OPAQUE) and bool(sources & registers)
