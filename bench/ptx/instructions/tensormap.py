"""tensormap: a kernel modifies and publishes tensor maps, which bulk copies read."""

from __future__ import annotations

import numpy as np

from ..frontend.program import PARAM_WINDOW, Program, Step, encode_immediate, implements
from ..frontend.syntax import Instruction
from ..memory.tensor_maps import FIELDS, MAP_BYTES, TensorMap, decode_map
from .accesses import check_global_access, check_shared_bounds, to_space


def load_tensor_map(unit, instruction, lane: int, address: int) -> TensorMap:
    """Of a tensor map in the kernel's parameters or in global memory."""
    if address >= PARAM_WINDOW:
        start = address - PARAM_WINDOW
        return decode_map(unit.wave.params[start : start + MAP_BYTES].tobytes())
    where = np.array([address], np.uint64)
    check_global_access(unit, instruction, np.array([lane]), where, MAP_BYTES, 64, "reads a tensor map of")
    return decode_map(unit.wave.memory.load(where, 1, MAP_BYTES)[0].tobytes())


@implements("tensormap")
def modify_tensor_map(program: Program, instruction: Instruction) -> Step | None:
    """tensormap.replace writes a field of a map in shared memory, tensormap.cp_fenceproxy copies it to global."""
    if instruction.parts[1] == "cp_fenceproxy":
        return publish_map(program, instruction)
    if instruction.parts[1] != "replace":
        return None
    name = instruction.parts[3]
    start, size = FIELDS[name]
    operands = list(instruction.operands)
    get_address = program.make_address_getter(operands.pop(0))
    indexed = name in ("global_dim", "global_stride", "box_dim", "element_stride")
    at = encode_immediate(operands.pop(0)) if indexed else 0
    dtype = np.uint64 if size == 8 else np.uint32
    value = program.make_source_slot(operands[0], dtype)

    def run(unit, mask):
        lanes = unit.find_active_lanes(mask)
        where = to_space("shared", get_address(unit)[lanes]) + start + at * size
        values = np.broadcast_to(unit.slots[value], unit.count)[lanes][:, None]
        check_shared_bounds(unit, instruction, lanes, where, size, 4)
        halves = np.ascontiguousarray(values).view(np.uint32)
        shared = unit.wave.shared
        if problem := shared.check_write(unit.block[lanes], where, halves, unit.thread[lanes]):
            unit.report(problem, instruction, lanes)
        shared.store(unit.block[lanes], where, halves)

    return run


def publish_map(program: Program, instruction: Instruction) -> Step:
    get_destination, get_source = (program.make_address_getter(x) for x in instruction.operands[:2])

    def run(unit, mask):
        lanes = unit.find_active_lanes(mask)
        lanes = lanes[unit.lane[lanes] == 0]  # one copy for the whole warp
        where, source = get_destination(unit)[lanes], to_space("shared", get_source(unit)[lanes])
        check_global_access(unit, instruction, lanes, where, MAP_BYTES, 128, "writes a tensor map to")
        unit.wave.memory.store(where, unit.wave.shared.load(unit.block[lanes], source, 4, MAP_BYTES // 4))

    return run
