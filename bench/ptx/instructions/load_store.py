"""ld and st, and the hints that only caches take note of."""

from __future__ import annotations

import numpy as np

from ..frontend.program import (
    Program,
    Step,
    builds,
)
from ..frontend.syntax import Instruction, items
from ..frontend.types import BYTES, DTYPES, UNSIGNED
from .accesses import LOADS, STORES, by_space, in_space, scatter, space_of, vector


@builds("ld", "ldu")
def load(program: Program, instruction: Instruction) -> Step:
    space, count = space_of(instruction), vector(instruction)
    dtype = DTYPES[instruction.type]
    width = BYTES[instruction.type]
    to, source = instruction.operands
    outs = [program.write(x, dtype) for x in items(to)]
    address_of = program.address(source)
    pc = len(program.steps)

    def run(unit, mask):
        lanes = unit.lanes(mask)
        address = address_of(unit)[lanes]
        for name, there in by_space(space, address):
            chosen = lanes[there]
            values = LOADS[name](unit, pc, instruction, chosen, in_space(name, address[there]), width, count).view(
                dtype
            )
            for i, out in enumerate(outs):
                if out is not None:
                    scatter(unit.slots[out], chosen, values[:, i])

    return run


@builds("st")
def store(program: Program, instruction: Instruction) -> Step:
    space, count = space_of(instruction), vector(instruction)
    width = BYTES[instruction.type]
    dtype = UNSIGNED[width]
    to, source = instruction.operands
    values_of = [program.read(x, dtype) for x in items(source)]
    address_of = program.address(to)
    pc = len(program.steps)

    def run(unit, mask):
        lanes = unit.lanes(mask)
        address = address_of(unit)[lanes]
        values = np.empty((len(lanes), count), dtype)
        for i, slot in enumerate(values_of):
            values[:, i] = np.broadcast_to(unit.slots[slot], unit.count)[lanes]
        for name, there in by_space(space, address):
            STORES[name](unit, pc, instruction, lanes[there], in_space(name, address[there]), values[there])

    return run


@builds("prefetch", "prefetchu", "discard", "applypriority", "createpolicy")
def nothing(program: Program, instruction: Instruction) -> Step:
    """What only caches take note of."""
    return lambda unit, mask: None
