"""The machine: runs a kernel over a grid, wave by wave, and says what it did.

A wave is as many blocks as fit the lane budget; its lanes run as NumPy arrays, one unit for each group of warps (a
warp, or the four warps of a wgmma). A unit runs until all its lanes wait or are done, then the next one does; the order
of the units turns round after every barrier, so that what one warp must see of another is tried both ways. Clocks tell
what a warp has seen of shared memory, whatever the order. So the first attempt has units of several warps, which take
NumPy no longer than one; where warps of a block turn out to meet in global memory, the launch begins again with a unit
for each warp.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..faults import Judge
from ..frontend.program import Program
from ..frontend.provenance import find_provenance
from ..memory.global_memory import GlobalMemory, WarpConflict
from ..memory.tensors import TensorExtent
from ..memory.uninitialised import UninitialisedMemory
from .barriers import make_deadlock_fault, release_blocked
from .counts import Counts
from .progress import IDLE
from .unit import Unit
from .wave import Execution, Wave

LANES = 8192  # of a wave, at most (one block at least)
REGISTER_BYTES = 256 << 20  # of a wave's register files


MAX_INSTRUCTIONS = 2_000_000  # of one unit in one wave: past it the kernel counts as endless


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
    """Runs every block of the grid on the tensors' own memory. Raises Fault at the first thing that is wrong and that
    `judge` does not let pass. unwritten: the memory that nothing has written so far."""
    tensors, params = list(tensors), np.frombuffer(params, np.uint8)
    find_provenance(program, {t.parameter for t in tensors} - {None})
    half, noted = min(max(threads // 64, 1), 4), dict(judge.noted)
    for size in (4,) if program.has_wgmma else (half, 1):
        constants = (make_extent for make_extent, _ in program.constant_data)
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
    raise AssertionError("a unit of one warp that meets another of itself")


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
            message = "goes round for ever: it comes back to the same state, and nothing else runs that could change it"
            raise unit.make_fault("endless", message, program.instructions[pc], int(np.argmax(mask)))
    stuck = [unit for unit in units if unit.blocked or unit.waiting]
    if stuck:
        raise make_deadlock_fault(program, wave, stuck)


def run_unit(program: Program, unit: Unit, max_instructions: int) -> None:
    """Until every lane waits or is done."""
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
            message = f"more than {max_instructions} instructions: `max_instructions` of ptx.device allows others"
            raise unit.make_fault("endless", message, program.instructions[end - 1], int(np.argmax(mask)))
        if unit.progress.is_idle(unit, max_instructions):
            message = f"{max_instructions // IDLE} instructions without an access to memory: `max_instructions` allows"
            raise unit.make_fault("endless", f"{message} more", program.instructions[end - 1], int(np.argmax(mask)))
        if not mask.any():
            continue
        if end in controls:
            issued[end] += int(mask.reshape(-1, 32).any(1).sum())
            controls[end](unit, end, mask)
        else:
            unit.enqueue(end, mask)


def run_checked(program: Program, unit: Unit, pc: int, end: int, mask: np.ndarray) -> np.ndarray:
    """With lanes missing, or wgmma results pending: checked before each instruction. The lanes that came through."""
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
        while n < end:  # as far as the same lanes go
            if unit.wgmmas:
                program.check_pending_use(unit, program.instructions[n], program.uses[n], mask)
            issued[n] += count
            program.steps[n](unit, active)
            n += 1
            if (ragged and n in program.convergent) or n in unit.waiting:
                break
    return mask
