"""ldmatrix, stmatrix and movmatrix: 8 by 8 matrices of 16-bit elements in shared memory and in a warp's registers."""

from __future__ import annotations

import numpy as np

from ..frontend.program import Program, Step, implements, write_masked
from ..frontend.syntax import Instruction, split_vector
from .accesses import check_shared_bounds


def locate_rows(unit, mask, get_address, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(warps (n,), lanes that hold the row addresses (n * count * 8,), these addresses)."""
    warps = np.arange(unit.count // 32) if mask is None else np.flatnonzero(mask.reshape(-1, 32).any(1))
    lanes = (warps[:, None] * 32 + np.arange(8 * count)).ravel()
    return warps, lanes, np.broadcast_to(get_address(unit), unit.count)[lanes].astype(np.int64)


def check_rows(unit, pc: int, instruction: Instruction, warps: np.ndarray, lanes: np.ndarray, address) -> None:
    """Checks and counts accesses to rows of 16 bytes."""
    check_shared_bounds(unit, instruction, lanes, address, 16, 16)
    unit.wave.counts.shared_requests[pc] += len(warps)
    unit.wave.counts.count_wavefronts(pc, lanes >> 3, address, 16)


def parse_count(instruction: Instruction) -> int:
    return int(next(p for p in instruction.parts if p in ("x1", "x2", "x4"))[1:])


@implements("ldmatrix")
def load_matrix(program: Program, instruction: Instruction) -> Step:
    """Lanes 8i to 8i+7 hold the row addresses of matrix i; lane t receives the elements 2(t%4) and 2(t%4)+1 of row t/4
    (.trans: of column t/4)."""
    count, trans = parse_count(instruction), "trans" in instruction.parts
    if instruction.type != "b16":
        return None
    outs = [program.make_dest_slot(x, np.uint32) for x in split_vector(instruction.operands[0])]
    get_address = program.make_address_getter(instruction.operands[1])
    pc = len(program.steps)

    def run(unit, mask):
        warps, lanes, address = locate_rows(unit, mask, get_address, count)
        shared, block = unit.wave.shared, unit.block[lanes]
        check_rows(unit, pc, instruction, warps, lanes, address)
        if problem := shared.check_read(block, address, 16, unit.thread[lanes]):
            unit.report(problem, instruction, lanes)
        tile = shared.load(block, address, 4, 4).view(np.uint16).reshape(len(warps), count, 8, 8)
        if trans:
            tile = np.ascontiguousarray(tile.swapaxes(2, 3))
        words = tile.view(np.uint32).reshape(len(warps), count, 32)
        for i, out in enumerate(outs):
            unit.slots[out].reshape(-1, 32)[warps] = words[:, i]

    return run


@implements("stmatrix")
def store_matrix(program: Program, instruction: Instruction) -> Step:
    count, trans = parse_count(instruction), "trans" in instruction.parts
    if instruction.type != "b16":
        return None
    get_address = program.make_address_getter(instruction.operands[0])
    value_slots = [program.make_source_slot(x, np.uint32) for x in split_vector(instruction.operands[1])]
    pc = len(program.steps)

    def run(unit, mask):
        warps, lanes, address = locate_rows(unit, mask, get_address, count)
        words = np.stack([unit.slots[s].reshape(-1, 32)[warps] for s in value_slots], 1)
        tile = words.view(np.uint16).reshape(len(warps), count, 8, 8)
        if trans:
            tile = np.ascontiguousarray(tile.swapaxes(2, 3))
        rows = tile.view(np.uint32).reshape(-1, 4)
        shared = unit.wave.shared
        check_rows(unit, pc, instruction, warps, lanes, address)
        if problem := shared.check_write(unit.block[lanes], address, rows, unit.thread[lanes]):
            unit.report(problem, instruction, lanes)
        shared.store(unit.block[lanes], address, rows)

    return run


@implements("movmatrix")
def movmatrix(program: Program, instruction: Instruction) -> Step:
    """Transposes an 8 by 8 matrix of 16-bit elements across a warp, four lanes to a row."""
    out, value = (program.make_source_slot(x, np.uint32) for x in instruction.operands)

    def run(unit, mask):
        tile = np.ascontiguousarray(unit.slots[value]).view(np.uint16).reshape(-1, 8, 8)
        write_masked(unit.slots[out], np.ascontiguousarray(tile.swapaxes(1, 2)).view(np.uint32).ravel(), mask)

    return run
