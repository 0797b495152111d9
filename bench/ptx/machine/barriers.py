"""Lanes that wait at barriers and mbarriers: who goes on, and who never will."""

from __future__ import annotations

import numpy as np

from ..faults import Fault
from ..frontend.program import Program
from .unit import Parked, Unit
from .wave import Wave

# ------------------------------------------------------------------------------------------------ barriers


def release(program: Program, wave: Wave, units: list[Unit]) -> None:
    """Lets the lanes go on whose barrier all threads have reached, and those whose mbarrier is through."""
    for number in sorted(
        {int(n) for unit in units for p in unit.parked if p.barrier is not None for n in p.barrier[p.mask]}
    ):
        release_barrier(program, wave, units, number)
    for unit in units:
        for parked in [p for p in unit.parked if p.ready is not None]:
            free = parked.ready(unit, parked.mask)
            unit.parked.remove(parked)
            unit.push(parked.pc + 1, free)
            if (parked.mask & ~free).any():
                unit.parked.append(parked._replace(mask=parked.mask & ~free))


def release_barrier(program: Program, wave: Wave, units: list[Unit], number: int) -> None:
    blocks = len(wave.numbers)
    arrived, expected = np.zeros(blocks, np.int64), np.full(blocks, wave.warps * 32)
    lowest, highest = np.full(blocks, len(program.instructions)), np.full(blocks, -1)
    at = [(unit, p, p.mask & (p.barrier == number)) for unit in units for p in unit.parked if p.barrier is not None]
    for unit, parked, mask in at:
        block = unit.block[mask]
        arrived += np.bincount(block, minlength=blocks)
        if parked.threads is not None:
            expected[block] = parked.threads[mask]
        if parked.together:
            lowest[block] = np.minimum(lowest[block], parked.pc)
            highest[block] = np.maximum(highest[block], parked.pc)
    for (block, barrier), n in wave.arrived.items():
        arrived[block] += n * (barrier == number)
    different = (lowest < highest) & (highest >= 0)
    if different.any():
        raise at_barrier(units, int(np.argmax(different)), "threads of one block wait at different barriers", program)
    done = arrived >= expected
    if not done.any():
        return
    for block in np.flatnonzero(done).tolist():
        wave.arrived.pop((block, number), None)
    meet(wave, units, at, np.flatnonzero(done), expected)
    for unit, parked, mask in at:
        free = mask & done[unit.block]
        unit.push(parked.pc + 1, free)
        unit.parked = [p for p in unit.parked if p is not parked]
        left = parked.mask & ~free
        if left.any():
            unit.parked.append(parked._replace(mask=left))


def meet(wave: Wave, units: list[Unit], at: list, done: np.ndarray, expected: np.ndarray) -> None:
    """The warps at the barrier have seen each other; all of the block where the barrier takes all of it."""
    shared = wave.shared
    everyone = done[expected[done] == wave.warps * 32]
    shared.barrier(everyone)
    for block in np.setdiff1d(done, everyone).tolist():
        there = np.unique(np.concatenate([unit.warp[mask & (unit.block == block)] for unit, _, mask in at]))
        shared.meet(block, there)


def at_barrier(units: list[Unit], block: int, message: str, program: Program) -> Fault:
    for unit in units:
        for parked in unit.parked:
            lanes = parked.mask & (unit.block == block)
            if lanes.any():
                return unit.fault("barrier", message, program.instructions[parked.pc], int(np.argmax(lanes)))
    raise AssertionError("no lane waits")


def deadlock(program: Program, wave: Wave, units: list[Unit]) -> Fault:
    """Nobody can go on: what the first lane that waits is waiting for. An mbarrier comes before a barrier, where warps
    without a role wait for the end."""
    for unit in units:
        for pc, mask in unit.waiting.items():
            lanes = "its four warps" if program.convergent[pc] > 32 else "the warp"
            message = f"not all lanes of {lanes} reach this instruction, which takes them together"
            return unit.fault("barrier", message, program.instructions[pc], int(np.argmax(mask)))
    parked: Parked
    at = [(unit, parked) for unit in units for parked in unit.parked]
    unit, parked = min(at, key=lambda x: (x[1].ready is None, x[0].warps.start))
    lane = int(np.argmax(parked.mask))
    block = unit.block[lane]
    if parked.ready is not None:
        message = f"waits for an mbarrier that nothing completes: {parked.missing(unit, lane)}"
        places = waiting_places(program, units, block)
        return unit.fault("barrier", "\n  ".join([message, *places]), program.instructions[parked.pc], lane)
    waiting = sum(int((p.mask & (u.block == block)).sum()) for u in units for p in u.parked)
    missing = wave.warps * 32 - waiting
    message = f"{waiting} threads of the block wait here, and {missing} never come: they have left, or wait elsewhere"
    return unit.fault("barrier", message, program.instructions[parked.pc], lane)


def waiting_places(program: Program, units: list[Unit], block: int) -> list[str]:
    """Where the warps of a block wait, one line for each place."""
    places: dict[str, set[int]] = {}
    for unit in units:
        for parked in unit.parked:
            there = unit.warp[parked.mask & (unit.block == block)].tolist()
            places.setdefault(str(program.instructions[parked.pc].location), set()).update(there)
    return [f"warps {sorted(there)} wait at {place}" for place, there in places.items() if there]
