"""Tensor maps changed and published by a kernel, and read by bulk copies."""

from __future__ import annotations

import numpy as np

from ..frontend.program import (
    PARAM_WINDOW,
    Program,
    Step,
    builds,
    constant_bits,
)
from ..frontend.syntax import Instruction
from ..memory.tensor_maps import FIELDS, MAP_BYTES, TensorMap, decode_map
from .accesses import global_access, in_space, shared_place


def map_at(unit, instruction, lane: int, address: int) -> TensorMap:
    """A tensor map in the kernel's parameters or in global memory."""
    if address >= PARAM_WINDOW:
        start = address - PARAM_WINDOW
        return decode_map(unit.wave.params[start : start + MAP_BYTES].tobytes())
    where = np.array([address], np.uint64)
    global_access(unit, instruction, np.array([lane]), where, MAP_BYTES, 64, "reads a tensor map of")
    return decode_map(unit.wave.memory.load(where, 1, MAP_BYTES)[0].tobytes())


@builds("tensormap")
def tensor_map(program: Program, instruction: Instruction) -> Step | None:
    """tensormap.replace writes a field of a map in shared memory, tensormap.cp_fenceproxy copies it to global."""
    if instruction.parts[1] == "cp_fenceproxy":
        return publish_map(program, instruction)
    if instruction.parts[1] != "replace":
        return None
    name = instruction.parts[3]
    start, size = FIELDS[name]
    operands = list(instruction.operands)
    address_of = program.address(operands.pop(0))
    indexed = name in ("global_dim", "global_stride", "box_dim", "element_stride")
    at = constant_bits(operands.pop(0)) if indexed else 0
    dtype = np.uint64 if size == 8 else np.uint32
    value = program.read(operands[0], dtype)

    def run(unit, mask):
        lanes = unit.lanes(mask)
        where = in_space("shared", address_of(unit)[lanes]) + start + at * size
        values = np.broadcast_to(unit.slots[value], unit.count)[lanes][:, None]
        shared_place(unit, instruction, lanes, where, size, 4)
        halves = np.ascontiguousarray(values).view(np.uint32)
        shared = unit.wave.shared
        if problem := shared.check_write(unit.block[lanes], where, halves, unit.thread[lanes]):
            unit.report(problem, instruction, lanes)
        shared.store(unit.block[lanes], where, halves)

    return run


def publish_map(program: Program, instruction: Instruction) -> Step:
    to_address, from_address = (program.address(x) for x in instruction.operands[:2])

    def run(unit, mask):
        lanes = unit.lanes(mask)
        lanes = lanes[unit.lane[lanes] == 0]  # the warp does it together
        where, source = to_address(unit)[lanes], in_space("shared", from_address(unit)[lanes])
        global_access(unit, instruction, lanes, where, MAP_BYTES, 128, "writes a tensor map to")
        unit.wave.memory.store(where, unit.wave.shared.load(unit.block[lanes], source, 4, MAP_BYTES // 4))

    return run
