"""Branches, barriers, fences, and what lanes of a warp tell each other: bra, ret, bar, shfl, vote, redux, match."""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .integers import DTYPES
from .program import Control, Program, Step, builds, put
from .syntax import Group, Immediate, Instruction
from .unit import Parked

# ------------------------------------------------------------------------------------------------ control


def held(program: Program, instruction: Instruction):
    """A function of (unit, mask): the lanes of the mask where the guard holds."""
    if instruction.guard is None:
        return lambda unit, mask: mask
    slot, negated = program.slot(instruction.guard, np.bool_), instruction.negated
    return lambda unit, mask: mask & (~unit.slots[slot] if negated else unit.slots[slot])


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
            unit.wave.arrive(unit, coming, numbers)
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


# ------------------------------------------------------------------------------------------------ shuffles


@builds("shfl")
def shuffle(program: Program, instruction: Instruction) -> Step:
    """PTX ISA 9.7.9.6: lane i gets the value of lane j, or its own where j is outside the segment."""
    mode = instruction.parts[2]
    first, source, *rest = instruction.operands
    results = first.items if isinstance(first, Group) else (first,)
    outs = [program.write(results[0], np.uint32)] + [program.write(x, np.bool_) for x in results[1:]]
    value, lane, clamp = (program.read(x, np.uint32) for x in (source, *rest[:2]))

    def run(unit, mask):
        slots = unit.slots
        i = unit.lane.astype(np.int64)
        b = np.asarray(slots[lane]).astype(np.int64) & 31
        c = np.asarray(slots[clamp]).astype(np.int64)
        bound, segment = c & 31, (c >> 8) & 31
        top = (i & segment) | (bound & ~segment)
        low = i & segment
        j = {"up": i - b, "down": i + b, "bfly": i ^ b, "idx": low | (b & ~segment)}[mode]
        valid = (j >= top) if mode == "up" else (j <= top)
        j = np.where(valid, j, i)
        there = np.arange(unit.count) - i + (j & 31)
        put(slots[outs[0]], np.broadcast_to(slots[value], unit.count)[there], mask)
        if len(outs) > 1:
            put(slots[outs[1]], valid, mask)

    return run


@builds("vote")
def vote(program: Program, instruction: Instruction) -> Step:
    """Over the lanes of each warp that take part."""
    mode = instruction.parts[2]
    out = program.write(instruction.operands[0], np.uint32 if mode == "ballot" else np.bool_)
    source = instruction.operands[1]
    value = program.read(source, np.bool_)

    def run(unit, mask):
        active = np.ones((unit.count // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        p = np.broadcast_to(unit.slots[value], unit.count).reshape(-1, 32)
        if mode == "ballot":
            result = ((p & active).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        elif mode == "uni":
            result = (p | ~active).all(1) | ~(p & active).any(1)
        else:
            result = (p & active).any(1) if mode == "any" else (p | ~active).all(1)
        put(unit.slots[out], np.repeat(result, 32), mask)

    return run


@builds("redux")
def reduce_warp(program: Program, instruction: Instruction) -> Step:
    """redux.sync: of whole numbers, and on sm_100 min and max of float32."""
    dtype = DTYPES[instruction.type]
    operation = instruction.parts[2]
    functions = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }  # fmt: skip
    floating = np.issubdtype(dtype, np.floating)
    function = {"min": np.fmin, "max": np.fmax}[operation] if floating else functions[operation]
    if floating and "NaN" in instruction.parts:
        function = functions[operation]
    out, value = program.write(instruction.operands[0], dtype), program.read(instruction.operands[1], dtype)

    def run(unit, mask):
        x = np.broadcast_to(unit.slots[value], unit.count).reshape(-1, 32)
        if "abs" in instruction.parts:
            x = np.abs(x)
        put(unit.slots[out], np.repeat(function.reduce(x, axis=1), 32), mask)

    return run


@builds("elect")
def elect(program: Program, instruction: Instruction) -> Step:
    """elect.sync d|p: p is true in one lane of the warp, the first of those that take part."""
    lane, chosen = instruction.operands[0].items
    outs = program.write(lane, np.uint32), program.write(chosen, np.bool_)

    def run(unit, mask):
        active = np.ones((unit.count // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        leader = np.repeat(active.argmax(1), 32)
        if outs[0] is not None:
            put(unit.slots[outs[0]], leader, mask)
        put(unit.slots[outs[1]], unit.lane == leader, mask)

    return run


@builds("match")
def match(program: Program, instruction: Instruction) -> Step | None:
    """match.any: the lanes with the same value."""
    if instruction.parts[1] != "any":
        return None
    kind = DTYPES[instruction.type]
    out, value = program.write(instruction.operands[0], np.uint32), program.read(instruction.operands[1], kind)

    def run(unit, mask):
        active = np.ones((unit.count // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        x = np.broadcast_to(unit.slots[value], unit.count).reshape(-1, 32)
        same = (x[:, :, None] == x[:, None, :]) & active[:, None, :]
        bits = (same.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1)
        put(unit.slots[out], bits.ravel().astype(np.uint32), mask)

    return run


@builds("activemask")
def active_mask(program: Program, instruction: Instruction) -> Step:
    out = program.write(instruction.operands[0], np.uint32)

    def run(unit, mask):
        active = np.ones((unit.count // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        bits = (active.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
        put(unit.slots[out], np.repeat(bits, 32), mask)

    return run


@builds("movmatrix")
def transpose_matrix(program: Program, instruction: Instruction) -> Step:
    """movmatrix: an 8 by 8 matrix of 16-bit elements, one row in four lanes, transposed across the warp."""
    out, value = (program.read(x, np.uint32) for x in instruction.operands)

    def run(unit, mask):
        tile = np.ascontiguousarray(unit.slots[value]).view(np.uint16).reshape(-1, 8, 8)
        put(unit.slots[out], np.ascontiguousarray(tile.swapaxes(1, 2)).view(np.uint32).ravel(), mask)

    return run


def constant_bits(operand) -> int:
    if not isinstance(operand, Immediate):
        raise Fault("unknown instruction", f"{operand} where a constant is expected")
    return operand.bits
