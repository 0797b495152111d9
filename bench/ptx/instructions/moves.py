"""mov, which also packs and unpacks vectors, and cvta, which converts addresses."""

from __future__ import annotations

import numpy as np

from ..frontend.program import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    Program,
    Step,
    assign,
    implements,
    write_masked,
)
from ..frontend.syntax import Group, Instruction
from ..frontend.types import BYTES, DTYPES, UNSIGNED


@implements("mov")
def move(program: Program, instruction: Instruction) -> Step:
    """Unpacks with mov.b64 {low, high}, x and packs with mov.b64 x, {low, high}."""
    kind = instruction.type
    dtype = DTYPES[kind]
    to, source = instruction.operands
    if isinstance(to, Group):
        part = UNSIGNED[BYTES[kind] // len(to.items)]
        value = program.make_source_slot(source, dtype)
        outs = [program.make_dest_slot(x, part) for x in to.items]

        def unpack(unit, mask):
            whole = np.ascontiguousarray(np.broadcast_to(unit.slots[value], unit.count))
            pieces = whole.view(part).reshape(unit.count, -1)
            for i, out in enumerate(outs):
                if out is not None:
                    write_masked(unit.slots[out], pieces[:, i], mask)

        return unpack
    if isinstance(source, Group):
        part = UNSIGNED[BYTES[kind] // len(source.items)]
        values = [program.make_source_slot(x, part) for x in source.items]
        out = program.make_dest_slot(to, UNSIGNED[BYTES[kind]])

        def pack(unit, mask):
            pieces = np.empty((unit.count, len(values)), part)
            for i, value in enumerate(values):
                pieces[:, i] = unit.slots[value]
            write_masked(unit.slots[out], pieces.view(UNSIGNED[BYTES[kind]])[:, 0], mask)

        return pack
    if dtype is not np.bool_:
        dtype = UNSIGNED[BYTES[kind]]
    return assign(lambda x: x, [program.make_source_slot(source, dtype)], [program.make_dest_slot(to, dtype)], False)


@implements("cvta")
def convert_address(program: Program, instruction: Instruction) -> Step:
    """Between the addresses of a state space and generic ones. Global addresses are generic ones."""
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
    space = next(p for p in instruction.parts[1:] if p != "to").split("::")[0]
    distance = window.get(space, 0) * (-1 if "to" in instruction.parts else 1)
    step = np.uint64(distance % (1 << 64))
    to, source = instruction.operands
    slots = [program.make_source_slot(source, np.uint64)], [program.make_dest_slot(to, np.uint64)]
    return assign(lambda x: x + step, *slots, False)
