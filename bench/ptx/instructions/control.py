"""Branches, exits, barriers and fences: bra, brx, ret, trap, bar, fence."""

from __future__ import annotations

import numpy as np

from ..faults import Fault
from ..frontend.program import Control, Program, Step, guard_mask, implements
from ..frontend.syntax import Instruction
from ..machine.unit import Blocked


@implements("bra", control=True)
def branch(program: Program, instruction: Instruction) -> Control:
    guard, (target,) = guard_mask(program, instruction), instruction.targets

    def run(unit, pc, mask):
        taken = guard(unit, mask)
        rest = mask & ~taken
        if rest.any() and taken.any():
            split = taken.reshape(-1, 32).any(1) & rest.reshape(-1, 32).any(1)
            unit.wave.counts.divergent[pc] += int(split.sum())
        unit.enqueue(target, taken)
        unit.enqueue(pc + 1, rest)

    return run


@implements("brx", control=True)
def branch_by_index(program: Program, instruction: Instruction) -> Control:
    """brx.idx index, table: each lane branches to the target at its index."""
    guard, targets = guard_mask(program, instruction), instruction.targets
    index = program.make_source_slot(instruction.operands[0], np.uint32)

    def run(unit, pc, mask):
        taken = guard(unit, mask)
        where = np.broadcast_to(unit.slots[index], unit.count)
        outside = taken & (where >= len(targets))
        if outside.any():
            lane = int(np.argmax(outside))
            message = f"index {where[lane]} of a table of {len(targets)} branch targets"
            raise unit.make_fault("out of bounds", message, instruction, lane)
        for number, target in enumerate(targets):
            unit.enqueue(target, taken & (where == number))
        unit.enqueue(pc + 1, mask & ~taken)

    return run


@implements("ret", "exit", control=True)
def exit_lanes(program: Program, instruction: Instruction) -> Control:
    guard = guard_mask(program, instruction)

    def run(unit, pc, mask):
        exiting = guard(unit, mask)
        unit.exit_lanes(exiting)
        unit.enqueue(pc + 1, mask & ~exiting)

    return run


@implements("trap", control=True)
def trap(program: Program, instruction: Instruction) -> Control:
    return build_assert(program, instruction, "the kernel traps")


def build_assert(program: Program, instruction: Instruction, message: str) -> Control:
    """Raises a fault if a lane reaches it."""
    guard = guard_mask(program, instruction)

    def run(unit, pc, mask):
        reached = guard(unit, mask)
        if reached.any():
            raise unit.make_fault("assert", message, instruction, int(np.argmax(reached)))
        unit.enqueue(pc + 1, mask)

    return run


@implements("bar", "barrier", control=True)
def barrier(program: Program, instruction: Instruction) -> Control:
    """bar.sync n[, threads]: lanes block until all threads of the block, or that many, have arrived; bar.arrive does
    not block. bar.warp.sync synchronises the lanes of a warp."""
    parts = instruction.parts
    if "warp" in parts:
        return sync_warp(program, instruction)
    if "red" in parts:
        raise Fault("unknown instruction", instruction.op, instruction)
    operands = [program.make_source_slot(x, np.uint32) for x in instruction.operands] or [
        program.make_constant_slot(np.uint32(0))
    ]
    arrive_only, aligned = "arrive" in parts, parts[0] == "bar" or "aligned" in parts
    guard = guard_mask(program, instruction)

    def run(unit, pc, mask):
        arriving = guard(unit, mask)
        unit.enqueue(pc + 1, mask & ~arriving)
        numbers = np.broadcast_to(unit.slots[operands[0]], unit.count)
        threads = np.broadcast_to(unit.slots[operands[1]], unit.count) if len(operands) > 1 else None
        if not arriving.any():
            return
        if arrive_only:
            unit.wave.arrive(unit.block[arriving], numbers[arriving])
            unit.enqueue(pc + 1, arriving)
        else:
            threads = None if threads is None else threads.copy()
            unit.blocked.append(Blocked(pc, arriving, numbers.copy(), threads, aligned and threads is None))

    return run


def sync_warp(program: Program, instruction: Instruction) -> Control:
    def run(unit, pc, mask):
        whole, rest = unit.split_converged(mask)
        if rest.any():
            unit.wait_for_warp(pc, rest)
        if whole.any():
            rows = np.flatnonzero(whole.reshape(-1, 32).any(1)) * 32
            unit.wave.shared.advance_clock(unit.block[rows], unit.warp[rows])
            unit.enqueue(pc + 1, whole)

    return run


@implements("fence", "membar", "griddepcontrol", "nanosleep", "setmaxnreg")
def fence(program: Program, instruction: Instruction) -> Step:
    """fence.proxy.async makes writes through the generic proxy visible to the async proxy: to wgmma and bulk copies.
    This machine performs everything else in order, so other fences do nothing; nor does griddepcontrol, since
    launches run one after another."""
    if instruction.parts[:3] != ("fence", "proxy", "async"):
        return lambda unit, mask: None

    def run(unit, mask):
        rows = np.unique(unit.find_active_lanes(mask) >> 5) * 32
        unit.wave.shared.proxy_fence(unit.block[rows], unit.warp[rows])

    return run
