"""Releases lanes that wait at barriers and mbarriers, and describes deadlocks."""

from __future__ import annotations

import numpy as np

from ..faults import Fault
from ..frontend.program import Program
from .unit import Blocked, Unit
from .wave import Wave


def release_blocked(program: Program, wave: Wave, units: list[Unit]) -> None:
    """Resumes lanes whose barrier is complete, and those whose mbarrier phase is."""
    for number in sorted(
        {int(n) for unit in units for p in unit.blocked if p.barrier is not None for n in p.barrier[p.mask]}
    ):
        release_barrier(program, wave, units, number)
    for unit in units:
        for blocked in [p for p in unit.blocked if p.poll is not None]:
            free = blocked.poll(unit, blocked.mask)
            unit.blocked.remove(blocked)
            unit.enqueue(blocked.pc + 1, free)
            if (blocked.mask & ~free).any():
                unit.blocked.append(blocked._replace(mask=blocked.mask & ~free))


def release_barrier(program: Program, wave: Wave, units: list[Unit], number: int) -> None:
    blocks = len(wave.grid_blocks)
    arrived, expected = np.zeros(blocks, np.int64), np.full(blocks, wave.warps * 32)
    lowest, highest = np.full(blocks, len(program.instructions)), np.full(blocks, -1)
    at = [(unit, p, p.mask & (p.barrier == number)) for unit in units for p in unit.blocked if p.barrier is not None]
    for unit, blocked, mask in at:
        block = unit.block[mask]
        arrived += np.bincount(block, minlength=blocks)
        if blocked.threads is not None:
            expected[block] = blocked.threads[mask]
        if blocked.aligned:
            lowest[block] = np.minimum(lowest[block], blocked.pc)
            highest[block] = np.maximum(highest[block], blocked.pc)
    for (block, barrier), n in wave.arrived.items():
        arrived[block] += n * (barrier == number)
    different = (lowest < highest) & (highest >= 0)
    if different.any():
        raise make_barrier_fault(
            units, int(np.argmax(different)), "threads of one block wait at different barriers", program
        )
    done = arrived >= expected
    if not done.any():
        return
    for block in np.flatnonzero(done).tolist():
        wave.arrived.pop((block, number), None)
    sync_warps(wave, units, at, np.flatnonzero(done), expected)
    for unit, blocked, mask in at:
        free = mask & done[unit.block]
        unit.enqueue(blocked.pc + 1, free)
        unit.blocked = [p for p in unit.blocked if p is not blocked]
        left = blocked.mask & ~free
        if left.any():
            unit.blocked.append(blocked._replace(mask=left))


def sync_warps(wave: Wave, units: list[Unit], at: list, done: np.ndarray, expected: np.ndarray) -> None:
    """Synchronises the clocks of the warps at a barrier, or of the whole block if it takes all threads."""
    shared = wave.shared
    everyone = done[expected[done] == wave.warps * 32]
    shared.sync_blocks(everyone)
    for block in np.setdiff1d(done, everyone).tolist():
        there = np.unique(np.concatenate([unit.warp[mask & (unit.block == block)] for unit, _, mask in at]))
        shared.sync_warps(block, there)


def make_barrier_fault(units: list[Unit], block: int, message: str, program: Program) -> Fault:
    for unit in units:
        for blocked in unit.blocked:
            lanes = blocked.mask & (unit.block == block)
            if lanes.any():
                return unit.make_fault("barrier", message, program.instructions[blocked.pc], int(np.argmax(lanes)))
    raise AssertionError("no lane waits")


def make_deadlock_fault(program: Program, wave: Wave, units: list[Unit]) -> Fault:
    """What the first waiting lane waits for. Mbarriers come first: warps without a role wait at a barrier for the
    end."""
    for unit in units:
        for pc, mask in unit.waiting.items():
            threads = "the warp group" if program.convergent[pc] > 32 else "the warp"
            message = f"not all threads of {threads} reach this instruction, which they must execute together"
            return unit.make_fault("barrier", message, program.instructions[pc], int(np.argmax(mask)))
    blocked: Blocked
    at = [(unit, blocked) for unit in units for blocked in unit.blocked]
    unit, blocked = min(at, key=lambda x: (x[1].poll is None, x[0].warps.start))
    lane = int(np.argmax(blocked.mask))
    block = unit.block[lane]
    if blocked.poll is not None:
        message = f"waits for an mbarrier phase that never completes: {blocked.describe(unit, lane)}"
        places = list_waiting_places(program, units, block)
        return unit.make_fault("barrier", "\n  ".join([message, *places]), program.instructions[blocked.pc], lane)
    waiting = sum(int((p.mask & (u.block == block)).sum()) for u in units for p in u.blocked)
    missing = wave.warps * 32 - waiting
    message = f"{waiting} threads of the block wait here and {missing} never arrive: they have exited or wait elsewhere"
    return unit.make_fault("barrier", message, program.instructions[blocked.pc], lane)


def list_waiting_places(program: Program, units: list[Unit], block: int) -> list[str]:
    """One line for each place at which warps of a block wait."""
    places: dict[str, set[int]] = {}
    for unit in units:
        for blocked in unit.blocked:
            there = unit.warp[blocked.mask & (unit.block == block)].tolist()
            places.setdefault(str(program.instructions[blocked.pc].location), set()).update(there)
    return [f"warps {sorted(there)} wait at {place}" for place, there in places.items() if there]
