"""Branches, exits, barriers and fences: bra, brx, ret, trap, bar, fence."""

from __future__ import annotations

import numpy as np

from ..faults import Fault
from ..frontend.program import (
    Control,
    Program,
    Step,
    builds,
    held,
)
from ..frontend.syntax import Instruction
from ..machine.unit import Parked


@builds("bra", control=True)
def branch(program: Program, instruction: Instruction) -> Control:
    taken_of, (target,) = held(program, instruction), instruction.targets

    def run(unit, pc, mask):
        taken = taken_of(unit, mask)
        rest = mask & ~taken
        if rest.any() and taken.any():
            split = taken.reshape(-1, 32).any(1) & rest.reshape(-1, 32).any(1)
            unit.wave.counts.divergent[pc] += int(split.sum())
        unit.push(target, taken)
        unit.push(pc + 1, rest)

    return run


@builds("brx", control=True)
def branch_by_index(program: Program, instruction: Instruction) -> Control:
    """brx.idx index, table: each lane goes where its index says."""
    taken_of, targets = held(program, instruction), instruction.targets
    index = program.read(instruction.operands[0], np.uint32)

    def run(unit, pc, mask):
        taken = taken_of(unit, mask)
        where = np.broadcast_to(unit.slots[index], unit.count)
        outside = taken & (where >= len(targets))
        if outside.any():
            lane = int(np.argmax(outside))
            message = f"index {where[lane]} of a table of {len(targets)} branch targets"
            raise unit.fault("out of bounds", message, instruction, lane)
        for number, target in enumerate(targets):
            unit.push(target, taken & (where == number))
        unit.push(pc + 1, mask & ~taken)

    return run


@builds("ret", "exit", control=True)
def leave(program: Program, instruction: Instruction) -> Control:
    going_of = held(program, instruction)

    def run(unit, pc, mask):
        going = going_of(unit, mask)
        unit.leave(going)
        unit.push(pc + 1, mask & ~going)

    return run


@builds("trap", control=True)
def trap(program: Program, instruction: Instruction) -> Control:
    return fails(program, instruction, "the kernel traps")


def fails(program: Program, instruction: Instruction, message: str) -> Control:
    """A fault where a lane comes to it."""
    going_of = held(program, instruction)

    def run(unit, pc, mask):
        going = going_of(unit, mask)
        if going.any():
            raise unit.fault("assert", message, instruction, int(np.argmax(going)))
        unit.push(pc + 1, mask)

    return run


@builds("bar", "barrier", control=True)
def barrier(program: Program, instruction: Instruction) -> Control:
    """bar.sync n[, threads]: lanes park until all threads of the block, or that many, have come; bar.arrive only
    counts. bar.warp.sync: the lanes of a warp have met."""
    parts = instruction.parts
    if "warp" in parts:
        return meet(program, instruction)
    if "red" in parts:
        raise Fault("unknown instruction", instruction.op, instruction)
    operands = [program.read(x, np.uint32) for x in instruction.operands] or [program.constant(np.uint32(0))]
    goes_on, together = "arrive" in parts, parts[0] == "bar" or "aligned" in parts
    coming_of = held(program, instruction)

    def run(unit, pc, mask):
        coming = coming_of(unit, mask)
        unit.push(pc + 1, mask & ~coming)
        numbers = np.broadcast_to(unit.slots[operands[0]], unit.count)
        threads = np.broadcast_to(unit.slots[operands[1]], unit.count) if len(operands) > 1 else None
        if not coming.any():
            return
        if goes_on:
            unit.wave.arrive(unit.block[coming], numbers[coming])
            unit.push(pc + 1, coming)
        else:
            threads = None if threads is None else threads.copy()
            unit.parked.append(Parked(pc, coming, numbers.copy(), threads, together and threads is None))

    return run


def meet(program: Program, instruction: Instruction) -> Control:
    def run(unit, pc, mask):
        whole, rest = unit.split_whole_warps(mask)
        if rest.any():
            unit.wait_for_warp(pc, rest)
        if whole.any():
            rows = np.flatnonzero(whole.reshape(-1, 32).any(1)) * 32
            unit.wave.shared.tick(unit.block[rows], unit.warp[rows])
            unit.push(pc + 1, whole)

    return run


@builds("fence", "membar", "griddepcontrol", "nanosleep", "setmaxnreg")
def fence(program: Program, instruction: Instruction) -> Step:
    """fence.proxy.async shows ordinary writes to wgmma and to bulk copies. Other fences order what this machine has in
    order already; griddepcontrol orders launches, which run one after another."""
    if instruction.parts[:3] != ("fence", "proxy", "async"):
        return lambda unit, mask: None

    def run(unit, mask):
        rows = np.unique(unit.lanes(mask) >> 5) * 32
        unit.wave.shared.show(unit.block[rows], unit.warp[rows])

    return run
