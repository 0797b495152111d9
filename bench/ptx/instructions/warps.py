"""Communication between the lanes of a warp: shfl, vote, redux, elect, match."""

from __future__ import annotations

import numpy as np

from ..frontend.program import Program, Step, implements, write_masked
from ..frontend.syntax import Instruction, split_vector
from ..frontend.types import DTYPES


@implements("shfl")
def shuffle(program: Program, instruction: Instruction) -> Step:
    """PTX ISA 9.7.9.6: lane i receives the value of lane j, or keeps its own if j is outside the segment."""
    mode = instruction.parts[2]
    first, source, *rest = instruction.operands
    results = split_vector(first)
    outs = [program.make_dest_slot(results[0], np.uint32)] + [program.make_dest_slot(x, np.bool_) for x in results[1:]]
    value, lane, clamp = (program.make_source_slot(x, np.uint32) for x in (source, *rest[:2]))

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
        write_masked(slots[outs[0]], np.broadcast_to(slots[value], unit.count)[there], mask)
        if len(outs) > 1:
            write_masked(slots[outs[1]], valid, mask)

    return run


@implements("vote")
def vote(program: Program, instruction: Instruction) -> Step:
    """Over the active lanes of each warp."""
    mode = instruction.parts[2]
    out = program.make_dest_slot(instruction.operands[0], np.uint32 if mode == "ballot" else np.bool_)
    source = instruction.operands[1]
    value = program.make_source_slot(source, np.bool_)

    def run(unit, mask):
        active = np.ones((unit.count // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        p = np.broadcast_to(unit.slots[value], unit.count).reshape(-1, 32)
        if mode == "ballot":
            result = ((p & active).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        elif mode == "uni":
            result = (p | ~active).all(1) | ~(p & active).any(1)
        else:
            result = (p & active).any(1) if mode == "any" else (p | ~active).all(1)
        write_masked(unit.slots[out], np.repeat(result, 32), mask)

    return run


@implements("redux")
def reduce_warp(program: Program, instruction: Instruction) -> Step:
    """redux.sync: of integers, and on sm_100 min and max of float32."""
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
    out, value = (
        program.make_dest_slot(instruction.operands[0], dtype),
        program.make_source_slot(instruction.operands[1], dtype),
    )

    def run(unit, mask):
        x = np.broadcast_to(unit.slots[value], unit.count).reshape(-1, 32)
        if "abs" in instruction.parts:
            x = np.abs(x)
        write_masked(unit.slots[out], np.repeat(function.reduce(x, axis=1), 32), mask)

    return run


@implements("elect")
def elect(program: Program, instruction: Instruction) -> Step:
    """elect.sync d|p: p is true in one lane of the warp, the first active one."""
    lane, chosen = instruction.operands[0].items
    outs = program.make_dest_slot(lane, np.uint32), program.make_dest_slot(chosen, np.bool_)

    def run(unit, mask):
        active = np.ones((unit.count // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        leader = np.repeat(active.argmax(1), 32)
        if outs[0] is not None:
            write_masked(unit.slots[outs[0]], leader, mask)
        write_masked(unit.slots[outs[1]], unit.lane == leader, mask)

    return run


@implements("match")
def match_any(program: Program, instruction: Instruction) -> Step | None:
    """match.any: the mask of the lanes with the same value."""
    if instruction.parts[1] != "any":
        return None
    kind = DTYPES[instruction.type]
    out, value = (
        program.make_dest_slot(instruction.operands[0], np.uint32),
        program.make_source_slot(instruction.operands[1], kind),
    )

    def run(unit, mask):
        active = np.ones((unit.count // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        x = np.broadcast_to(unit.slots[value], unit.count).reshape(-1, 32)
        same = (x[:, :, None] == x[:, None, :]) & active[:, None, :]
        bits = (same.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1)
        write_masked(unit.slots[out], bits.ravel().astype(np.uint32), mask)

    return run


@implements("activemask")
def active_mask(program: Program, instruction: Instruction) -> Step:
    out = program.make_dest_slot(instruction.operands[0], np.uint32)

    def run(unit, mask):
        active = np.ones((unit.count // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        bits = (active.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
        write_masked(unit.slots[out], np.repeat(bits, 32), mask)

    return run
