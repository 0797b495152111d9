"""atom and red, in global and shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ..frontend.program import Program, Step, implements
from ..frontend.syntax import Instruction, split_vector
from ..frontend.types import BYTES, DTYPES, UNSIGNED
from .accesses import (
    check_global_access,
    check_shared_bounds,
    count_elements,
    find_space,
    order_blocks,
    report_race,
    report_unwritten,
    scatter,
    split_by_space,
    to_space,
)
from .arithmetic import find_operation


def find_function(parts: tuple[str, ...]) -> Callable:
    operation = next(p for p in parts[1:] if p in ATOMICS)
    return ATOMICS[operation]


ATOMICS = {
    "add": lambda old, x: old + x, "min": lambda old, x: np.minimum(old, x), "max": lambda old, x: np.maximum(old, x),
    "and": lambda old, x: old & x, "or": lambda old, x: old | x, "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "inc": lambda old, x: old.dtype.type(0) if old >= x else old + old.dtype.type(1),
    "dec": lambda old, x: x if old == 0 or old > x else old - old.dtype.type(1),
    "cas": lambda old, expected, new: new if old == expected else old,
}  # fmt: skip


@implements("atom", "red")
def build_atomic(program: Program, instruction: Instruction) -> Step:
    """In the order of lanes and blocks."""
    parts = instruction.parts
    if instruction.type in ("f16", "bf16", "f16x2", "bf16x2") or count_elements(instruction) > 1:
        return build_half_atomic(program, instruction)
    function, space = find_function(parts), find_space(instruction)
    dtype = DTYPES[instruction.type]
    width = BYTES[instruction.type]
    operands = list(instruction.operands)
    out = program.make_dest_slot(operands.pop(0), dtype) if parts[0] == "atom" else None
    get_address = program.make_address_getter(operands.pop(0))
    value_slots = [program.make_source_slot(x, dtype) for x in operands]
    acquires = "acquire" in parts or "acq_rel" in parts
    releases = "release" in parts or "acq_rel" in parts
    pc = len(program.steps)

    def run(unit, mask):
        lanes = unit.find_active_lanes(mask)
        address = get_address(unit)[lanes]
        values = tuple(np.broadcast_to(unit.slots[s], unit.count)[lanes] for s in value_slots)
        for name, there in split_by_space(space, address):
            chosen, where = lanes[there], to_space(name, address[there])
            if acquires or releases:
                order_blocks(unit, chosen, where, acquires, releases)
            view, index = locate_atomic(unit, pc, instruction, name, chosen, where, width)
            view = view.view(dtype)
            old = apply_in_order(function, view, index, range(len(chosen)), tuple(v[there] for v in values))
            record_change(unit, name, view, index, old)
            if out is not None:
                scatter(unit.slots[out], chosen, old)

    return run


def locate_atomic(unit, pc, instruction, space, lanes, address, width) -> tuple[np.ndarray, np.ndarray]:
    """(view, index of each lane's element), checked and counted."""
    if space == "shared":
        shared = unit.wave.shared
        check_shared_bounds(unit, instruction, lanes, address, width, width)
        unit.wave.counts.count_shared_access(pc, lanes >> 5, unit.lane[lanes], address, width)
        if problem := shared.check_atomic(unit.block[lanes], address, width, unit.thread[lanes]):
            unit.report(problem, instruction, lanes)
        return shared.views[width], shared.element_indices(unit.block[lanes], address, width, 1)[:, 0]
    memory = unit.wave.memory
    check_global_access(unit, instruction, lanes, address, width, width, "updates")
    unit.wave.counts.count_global_access(pc, lanes >> 5, address, width)
    if race := memory.check_atomic(address, width, unit.grid_block[lanes]):
        report_race(unit, instruction, lanes, address, width, race, "updates", "read or wrote without an atomic")
    report_unwritten(unit, instruction, lanes, address, width, "updates")
    pieces = memory.split_by_segment(address, width)
    if len(pieces) > 1:
        raise unit.make_fault("unsupported", "one atomic instruction on several tensors", instruction, lanes[0])
    view, index = pieces[0][0].locate_elements(address, width, 1)
    return view, index[:, 0]


def record_change(unit, space: str, view: np.ndarray, index: np.ndarray, old: np.ndarray) -> None:
    memory = unit.wave.shared if space == "shared" else unit.wave.memory
    memory.changes += bool((view[index] != old).any())


def build_half_atomic(program: Program, instruction: Instruction) -> Step:
    """add.noftz of float16 and bfloat16, scalar or packed, and vectors of floats."""
    kind, count = instruction.type, count_elements(instruction)
    operation = next(p for p in instruction.parts[1:] if p in ATOMICS)
    add = find_operation((operation, kind)).compute
    width = BYTES[kind]
    dtype = UNSIGNED[width] if kind != "f32" else np.float32
    operands = list(instruction.operands)
    first = operands.pop(0) if instruction.parts[0] == "atom" else None
    outs = [program.make_dest_slot(x, dtype) for x in split_vector(first)] if first is not None else []
    get_address = program.make_address_getter(operands.pop(0))
    value_slots = [program.make_source_slot(x, dtype) for x in split_vector(operands[0])]
    space = find_space(instruction)
    pc = len(program.steps)

    def function(old, x):
        return add(np.atleast_1d(old), np.atleast_1d(x))[0]

    def run(unit, mask):
        lanes = unit.find_active_lanes(mask)
        for name, there in split_by_space(space, get_address(unit)[lanes]):
            chosen = lanes[there]
            where = to_space(name, get_address(unit)[chosen])
            for i in range(count):
                place = where + where.dtype.type(i * width)
                view, index = locate_atomic(unit, pc, instruction, name, chosen, place, width)
                x = np.broadcast_to(unit.slots[value_slots[i]], unit.count)[chosen]
                view = view.view(dtype)
                old = apply_in_order(function, view, index, range(len(chosen)), (x,))
                record_change(unit, name, view, index, old)
                if outs and outs[i] is not None:
                    scatter(unit.slots[outs[i]], chosen, old)

    return run


def apply_in_order(
    function: Callable, view: np.ndarray, index: np.ndarray, lanes: Iterable[int], operands: tuple
) -> np.ndarray:
    """Applies function(old, *operands) in each lane in turn; returns the old values."""
    old = np.empty(len(index), view.dtype)
    for i in lanes:
        old[i] = view[index[i]]
        view[index[i]] = function(old[i], *(x[i] for x in operands))
    return old
