"""Functions that no module defines and every GPU has: __assertfail (tl.device_assert) and vprintf (tl.device_print)."""

from __future__ import annotations

import re
import sys

import numpy as np

from ..faults import Fault
from ..frontend.calls import arguments, callee
from ..frontend.program import (
    Control,
    Program,
    builds,
    held,
)
from ..frontend.syntax import Instruction
from .accesses import LOADS, by_space, global_access, in_space
from .control import fails

CONVERSION = re.compile(r"%([-+ #0]*\d*(?:\.\d+)?)(hh|h|ll|l|z|j|t)?([a-zA-Z%])")


@builds("call", control=True)
def call(program: Program, instruction: Instruction) -> Control:
    name = callee(instruction)
    if name == "__assertfail":
        return fails(program, instruction, "tl.device_assert failed")
    if name == "vprintf":
        return prints(program, instruction)
    raise Fault("unknown instruction", f"call of {name}", instruction)


def prints(program: Program, instruction: Instruction) -> Control:
    """vprintf(format, arguments), both addresses: a line of text for each lane, one lane after another."""
    results, given = arguments(instruction, returns=True)
    result, form, values = (program.addresses[name] for name in (*results, *given))
    coming_of, pc_of = held(program, instruction), len(program.steps)

    def run(unit, pc, mask):
        texts: dict[int, str] = {}  # strings by their addresses
        lanes = np.flatnonzero(coming_of(unit, mask))
        for lane in lanes.tolist():
            at, arguments_at = (int(unit.params[lane, x : x + 8].view(np.uint64)[0]) for x in (form, values))
            reader = Reader(unit, pc_of, instruction, lane, arguments_at, texts)
            sys.stdout.write(CONVERSION.sub(reader.converted, reader.string(at)))
        unit.params[lanes, result : result + 4] = 0
        unit.push(pc + 1, mask)

    return run


class Reader:
    """One lane's arguments of a printf, taken one after another as its format asks for them."""

    def __init__(self, unit, pc: int, instruction: Instruction, lane: int, address: int, texts: dict[int, str]):
        self.unit, self.pc, self.instruction, self.lane = unit, pc, instruction, np.array([lane])
        self.address, self.texts = address, texts

    def converted(self, match: re.Match) -> str:
        """What stands for one conversion of the format."""
        shape, size, kind = match.groups()
        if kind == "%":
            return "%"
        if kind in "di":
            return f"%{shape}d" % self.take(np.int64 if size in ("l", "ll", "z", "j", "t") else np.int32)
        if kind in "uoxX":
            number = self.take(np.uint64 if size in ("l", "ll", "z", "j", "t") else np.uint32)
            return f"%{shape}{'d' if kind == 'u' else kind}" % number
        if kind in "eEfFgG":
            return f"%{shape}{kind}" % self.take(np.float64)
        if kind == "c":
            return f"%{shape}c" % chr(self.take(np.int32) & 0xFF)
        if kind == "p":
            return f"{self.take(np.uint64):#x}"
        if kind == "s":
            return f"%{shape}s" % self.string(self.take(np.uint64))
        raise self.unit.fault("unknown instruction", f"printf of {match.group()}", self.instruction, int(self.lane[0]))

    def take(self, dtype: type):
        """The next argument, as a number of Python."""
        size = np.dtype(dtype).itemsize
        self.address = -(-self.address // size) * size
        where = np.array([self.address], np.uint64)
        ((space, _),) = by_space("generic", where)
        raw = LOADS[space](self.unit, self.pc, self.instruction, self.lane, in_space(space, where), size, 1)
        self.address += size
        return raw.view(dtype)[0, 0].item()

    def string(self, address: int) -> str:
        """The text at an address of global memory, up to its end."""
        if address not in self.texts:
            data, where = bytearray(), np.array([address], np.uint64)
            while not data.endswith(b"\0"):
                global_access(self.unit, self.instruction, self.lane, where, 1, 1, "prints")
                data += self.unit.wave.memory.load(where, 1, 1).tobytes()
                where += np.uint64(1)
            self.texts[address] = data[:-1].decode(errors="replace")
        return self.texts[address]
