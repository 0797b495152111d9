"""ld and st, and the cache hints, which have no effect here."""

from __future__ import annotations

import numpy as np

from ..frontend.program import Program, Step, implements
from ..frontend.syntax import Instruction, split_vector
from ..frontend.types import BYTES, DTYPES, UNSIGNED
from .accesses import LOADS, STORES, count_elements, find_space, scatter, split_by_space, to_space


@implements("ld", "ldu")
def load(program: Program, instruction: Instruction) -> Step:
    space, count = find_space(instruction), count_elements(instruction)
    dtype = DTYPES[instruction.type]
    width = BYTES[instruction.type]
    to, source = instruction.operands
    outs = [program.make_dest_slot(x, dtype) for x in split_vector(to)]
    get_address = program.make_address_getter(source)
    pc = len(program.steps)

    def run(unit, mask):
        lanes = unit.find_active_lanes(mask)
        address = get_address(unit)[lanes]
        for name, there in split_by_space(space, address):
            chosen = lanes[there]
            values = LOADS[name](unit, pc, instruction, chosen, to_space(name, address[there]), width, count).view(
                dtype
            )
            for i, out in enumerate(outs):
                if out is not None:
                    scatter(unit.slots[out], chosen, values[:, i])

    return run


@implements("st")
def store(program: Program, instruction: Instruction) -> Step:
    space, count = find_space(instruction), count_elements(instruction)
    width = BYTES[instruction.type]
    dtype = UNSIGNED[width]
    to, source = instruction.operands
    value_slots = [program.make_source_slot(x, dtype) for x in split_vector(source)]
    get_address = program.make_address_getter(to)
    pc = len(program.steps)

    def run(unit, mask):
        lanes = unit.find_active_lanes(mask)
        address = get_address(unit)[lanes]
        values = np.empty((len(lanes), count), dtype)
        for i, slot in enumerate(value_slots):
            values[:, i] = np.broadcast_to(unit.slots[slot], unit.count)[lanes]
        for name, there in split_by_space(space, address):
            STORES[name](unit, pc, instruction, lanes[there], to_space(name, address[there]), values[there])

    return run


@implements("prefetch", "prefetchu", "discard", "applypriority", "createpolicy")
def ignore_hint(program: Program, instruction: Instruction) -> Step:
    """Affects only caches."""
    return lambda unit, mask: None
