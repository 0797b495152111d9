"""Calls of functions that the GPU provides: __assertfail (tl.device_assert) and vprintf (tl.device_print)."""

from __future__ import annotations

import re
import sys

import numpy as np

from ..faults import Fault
from ..frontend.calls import find_call_arguments, find_callee
from ..frontend.program import Control, Program, guard_mask, implements
from ..frontend.syntax import Instruction
from .accesses import LOADS, check_global_access, split_by_space, to_space
from .control import build_assert

CONVERSION = re.compile(r"%([-+ #0]*\d*(?:\.\d+)?)(hh|h|ll|l|z|j|t)?([a-zA-Z%])")


@implements("call", control=True)
def call(program: Program, instruction: Instruction) -> Control:
    name = find_callee(instruction)
    if name == "__assertfail":
        return build_assert(program, instruction, "tl.device_assert failed")
    if name == "vprintf":
        return build_printf(program, instruction)
    raise Fault("unknown instruction", f"call of {name}", instruction)


def build_printf(program: Program, instruction: Instruction) -> Control:
    """vprintf(format, arguments), both addresses: prints for each lane in turn."""
    results, given = find_call_arguments(instruction, returns=True)
    result, form, values = (program.addresses[name] for name in (*results, *given))
    guard, call_pc = guard_mask(program, instruction), len(program.steps)

    def run(unit, pc, mask):
        texts: dict[int, str] = {}  # strings by address
        lanes = np.flatnonzero(guard(unit, mask))
        for lane in lanes.tolist():
            at, arguments_at = (int(unit.params[lane, x : x + 8].view(np.uint64)[0]) for x in (form, values))
            reader = ArgumentReader(unit, call_pc, instruction, lane, arguments_at, texts)
            sys.stdout.write(CONVERSION.sub(reader.format_argument, reader.read_string(at)))
        unit.params[lanes, result : result + 4] = 0
        unit.enqueue(pc + 1, mask)

    return run


class ArgumentReader:
    """Reads the arguments of one lane's printf in the order of the format."""

    def __init__(self, unit, pc: int, instruction: Instruction, lane: int, address: int, texts: dict[int, str]):
        self.unit, self.pc, self.instruction, self.lane = unit, pc, instruction, np.array([lane])
        self.address, self.texts = address, texts

    def format_argument(self, match: re.Match) -> str:
        """The text of one conversion of the format."""
        shape, size, kind = match.groups()
        if kind == "%":
            return "%"
        if kind in "di":
            return f"%{shape}d" % self.next_argument(np.int64 if size in ("l", "ll", "z", "j", "t") else np.int32)
        if kind in "uoxX":
            number = self.next_argument(np.uint64 if size in ("l", "ll", "z", "j", "t") else np.uint32)
            return f"%{shape}{'d' if kind == 'u' else kind}" % number
        if kind in "eEfFgG":
            return f"%{shape}{kind}" % self.next_argument(np.float64)
        if kind == "c":
            return f"%{shape}c" % chr(self.next_argument(np.int32) & 0xFF)
        if kind == "p":
            return f"{self.next_argument(np.uint64):#x}"
        if kind == "s":
            return f"%{shape}s" % self.read_string(self.next_argument(np.uint64))
        raise self.unit.make_fault(
            "unknown instruction", f"printf of {match.group()}", self.instruction, int(self.lane[0])
        )

    def next_argument(self, dtype: type):
        """The next argument, as a Python number."""
        size = np.dtype(dtype).itemsize
        self.address = -(-self.address // size) * size
        where = np.array([self.address], np.uint64)
        ((space, _),) = split_by_space("generic", where)
        raw = LOADS[space](self.unit, self.pc, self.instruction, self.lane, to_space(space, where), size, 1)
        self.address += size
        return raw.view(dtype)[0, 0].item()

    def read_string(self, address: int) -> str:
        """The null-terminated text at an address of global memory."""
        if address not in self.texts:
            data, where = bytearray(), np.array([address], np.uint64)
            while not data.endswith(b"\0"):
                check_global_access(self.unit, self.instruction, self.lane, where, 1, 1, "prints")
                data += self.unit.wave.memory.load(where, 1, 1).tobytes()
                where += np.uint64(1)
            self.texts[address] = data[:-1].decode(errors="replace")
        return self.texts[address]
