"""Executes a kernel over a grid, wave by wave, and counts.

A wave is as many blocks as the lane budget allows; its lanes run as NumPy arrays, one unit for each set of warps (one
warp, or the four of a warp group). A unit runs until all of its lanes wait or have exited, then the next unit runs. The
order of the units is reversed after every barrier, so that each warp runs both before and after the others. Vector
clocks detect races in shared memory whatever the order. The first attempt has units of several warps, which cost NumPy
no more than one; if warps of a block turn out to communicate through global memory, the launch restarts with a
unit for each warp.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..faults import Judge
from ..frontend.program import Program
from ..frontend.provenance import infer_provenance
from ..memory.extents import TensorExtent
from ..memory.global_memory import GlobalMemory, WarpConflict
from ..memory.uninitialised import UninitialisedMemory
from .barriers import make_deadlock_fault, release_blocked
from .counts import Counts
from .progress import IDLE
from .unit import Unit
from .wave import Execution, Wave

LANES = 8192  # of a wave, at most; at least one block
REGISTER_BYTES = 256 << 20  # register files of a wave, at most
MAX_INSTRUCTIONS = 2_000_000  # of one unit in one wave; more count as an endless loop


def execute(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    params: bytes,
    tensors: Iterable[TensorExtent],
    judge: Judge,
    unwritten: UninitialisedMemory,
    max_instructions: int = MAX_INSTRUCTIONS,
) -> Counts:
    """Executes every block of the grid on the tensors' own memory. Raises the first Fault that `judge` does not let
    pass. unwritten: the memory that was never written."""
    tensors, params = list(tensors), np.frombuffer(params, np.uint8)
    infer_provenance(program, {t.parameter for t in tensors} - {None})
    half, noted = min(max(threads // 64, 1), 4), dict(judge.noted)
    for size in (4,) if program.has_wgmma else (half, 1):
        constants = (extent for extent, _ in program.constant_data)
        memory = GlobalMemory(tensors, constants, program.global_grain, unwritten)
        execution = Execution(program, grid, threads, params, memory, Counts(program.instructions), judge)
        try:
            counts = run_grid(execution, size, max_instructions)
        except WarpConflict:
            memory.restore()
            judge.noted = dict(noted)
            continue
        unwritten.update(memory.segments)
        return counts
    raise AssertionError("a unit of one warp conflicts with itself")


def run_grid(execution: Execution, size: int, max_instructions: int) -> Counts:
    """In units of `size` warps."""
    program, grid, threads, _, memory, counts, _ = execution
    blocks = grid[0] * grid[1] * grid[2]
    lane_bytes = sum({slot.register: 8 for slot in program.slots}.values())
    together = max(1, min(LANES // threads, REGISTER_BYTES // (lane_bytes * threads + 1)))
    with np.errstate(all="ignore"):
        for start in range(0, blocks, together):
            wave = Wave(execution, np.arange(start, min(start + together, blocks)))
            run_wave(program, wave, size, max_instructions)
    counts.read_bytes, counts.written_bytes = memory.count_unique_bytes()
    accessed = counts.global_requests > 0
    counts.tensors = memory.count_traffic(counts.first_address[accessed], counts.global_sectors[accessed])
    return counts


def run_wave(program: Program, wave: Wave, size: int, max_instructions: int) -> None:
    units = [Unit(program, wave, range(w, min(w + size, wave.warps))) for w in range(0, wave.warps, size)]
    while any(unit.wake() for unit in units):
        for unit in units:
            run_unit(program, unit, max_instructions)
        release_blocked(program, wave, units)
        units.reverse()
    for unit in units:
        if unit.suspended:
            pc, mask, _ = unit.suspended[0]
            message = "loops forever: it returns to the same state, and no other warp or block could change that"
            raise unit.make_fault("endless", message, program.instructions[pc], int(np.argmax(mask)))
    stuck = [unit for unit in units if unit.blocked or unit.waiting]
    if stuck:
        raise make_deadlock_fault(program, wave, stuck)


def run_unit(program: Program, unit: Unit, max_instructions: int) -> None:
    """Runs until every lane waits or has exited."""
    steps, block_ends, controls, issued = program.steps, program.block_ends, program.controls, unit.wave.counts.issued
    while unit.runnable or unit.wake():
        pc, mask = unit.next_lanes()
        if unit.progress.is_repeating(unit, pc, mask):
            unit.suspend(pc, mask)
            continue
        end = block_ends[pc]
        whole = bool(mask.all())
        if whole and not (program.has_wgmma or unit.waiting):
            issued[pc:end] += unit.count // 32
            for step in steps[pc:end]:
                step(unit, None)
        else:
            mask = run_checked(program, unit, pc, end, mask)
        unit.steps += end - pc + 1
        if unit.steps > max_instructions:
            message = f"more than {max_instructions} instructions: raise max_instructions of ptx.device to allow more"
            raise unit.make_fault("endless", message, program.instructions[end - 1], int(np.argmax(mask)))
        if unit.progress.is_idle(unit, max_instructions):
            message = f"{max_instructions // IDLE} instructions without a memory access"
            message += ": raise max_instructions of ptx.device to allow more"
            raise unit.make_fault("endless", message, program.instructions[end - 1], int(np.argmax(mask)))
        if not mask.any():
            continue
        if end in controls:
            issued[end] += int(mask.reshape(-1, 32).any(1).sum())
            controls[end](unit, end, mask)
        else:
            unit.enqueue(end, mask)


def run_checked(program: Program, unit: Unit, pc: int, end: int, mask: np.ndarray) -> np.ndarray:
    """With inactive lanes or wgmmas in flight: checks before each instruction. Returns the lanes that reach `end`."""
    issued, n = unit.wave.counts.issued, pc
    while n < end:
        if n in unit.waiting and n != pc:
            mask = mask | unit.waiting.pop(n)
        ragged = unit.split_converged(mask, 128)[1].any()
        if ragged and n in program.convergent:
            mask, rest = unit.split_converged(mask, program.convergent[n])
            if rest.any():
                unit.wait_for_warp(n, rest, program.convergent[n])
            if not mask.any():
                return mask
        active, count = None if mask.all() else mask, int(mask.reshape(-1, 32).any(1).sum())
        while n < end:  # while the same lanes are active
            if unit.wgmmas:
                program.check_pending_use(unit, program.instructions[n], program.uses[n], mask)
            issued[n] += count
            program.steps[n](unit, active)
            n += 1
            if (ragged and n in program.convergent) or n in unit.waiting:
                break
    return mask
