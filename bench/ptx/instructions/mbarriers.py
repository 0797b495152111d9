"""mbarrier objects: arrivals and bytes of bulk copies that a phase waits for."""

from __future__ import annotations

import numpy as np

from ..faults import Fault
from ..frontend.program import (
    Control,
    Program,
    Step,
    builds,
    held,
    put,
)
from ..frontend.syntax import Instruction, Register
from ..machine.unit import Parked
from ..memory.shared_memory import Barrier
from .accesses import address_operand, in_space, shared_place


def barrier_at(unit, instruction: Instruction, lane: int, address: int) -> Barrier:
    found = unit.wave.mbarriers.get((int(unit.block[lane]), address))
    if found is None:
        raise unit.fault(
            "uninitialised", f"no mbarrier at shared address {address}", instruction, lane, "shared memory"
        )
    one = np.array([lane])
    if problem := unit.wave.shared.check_read(unit.block[one], np.array([address]), 8, unit.thread[one]):
        unit.report(problem, instruction, [lane])
    return found


@builds("mbarrier.try_wait", "mbarrier.test_wait", control=True)
def wait_mbarrier(program: Program, instruction: Instruction) -> Control:
    """Waits until the phase of the given parity is over. Lanes park until then: a loop around it never spins."""
    if "parity" not in instruction.parts:
        raise Fault("unknown instruction", instruction.op, instruction)
    out = program.write(instruction.operands[0], np.bool_)
    address_of = program.address(instruction.operands[1])
    parity = program.read(instruction.operands[2], np.uint32)
    coming_of = held(program, instruction)

    def over(unit, mask):
        address = in_space("shared", address_of(unit))
        wanted = np.broadcast_to(unit.slots[parity], unit.count)
        free = np.zeros(unit.count, bool)
        for lane in first_lanes(unit, mask, address, wanted):
            barrier = barrier_at(unit, instruction, lane, int(address[lane]))
            deliver(unit, barrier, int(unit.block[lane]))
            if barrier.phase != int(wanted[lane]) & 1:
                same = (
                    mask
                    & (unit.block == unit.block[lane])
                    & (unit.warp == unit.warp[lane])
                    & (address == address[lane])
                )
                same &= wanted == wanted[lane]
                free |= same
                unit.wave.shared.learn(int(unit.block[lane]), int(unit.warp[lane]), barrier.clocks)
        put(unit.slots[out], True, free)
        return free

    def missing(unit, lane) -> str:
        barrier = unit.wave.mbarriers[int(unit.block[lane]), int(in_space("shared", address_of(unit))[lane])]
        return f"{barrier.pending} of {barrier.expected} arrivals and {barrier.bytes} bytes are missing"

    def run(unit, pc, mask):
        coming = coming_of(unit, mask)
        unit.push(pc + 1, mask & ~coming)
        if not coming.any():
            return
        free = over(unit, coming)
        unit.push(pc + 1, free)
        if (coming & ~free).any():
            unit.parked.append(Parked(pc, coming & ~free, ready=over, missing=missing))

    return run


def first_lanes(unit, mask, *keys) -> list[int]:
    """One lane for each warp and each different set of keys."""
    lanes = np.flatnonzero(mask)
    rows = np.stack([lanes >> 5, *(np.asarray(k)[lanes].astype(np.int64) for k in keys)], 1)
    return lanes[np.unique(rows, axis=0, return_index=True)[1]].tolist()


@builds("mbarrier")
def mbarrier(program: Program, instruction: Instruction) -> Step | None:
    verb = instruction.parts[1]
    operands = list(instruction.operands)
    if verb == "arrive" and isinstance(operands[0], Register):
        return None  # a result that is used: the state token
    if verb == "arrive" and len(operands) > 1:
        operands.pop(0)
    address_of = program.address(address_operand(operands[0]))
    amount = program.read(operands[1], np.uint32) if len(operands) > 1 else None
    change = {"init": initialise, "inval": invalidate, "arrive": arrive, "expect_tx": expect, "complete_tx": complete}
    if verb not in change:
        return None

    def run(unit, mask):
        address = in_space("shared", address_of(unit))
        unit.wave.shared.changes += 1
        for lane in unit.lanes(mask).tolist():
            value = None if amount is None else int(np.broadcast_to(unit.slots[amount], unit.count)[lane])
            change[verb](unit, instruction, lane, int(address[lane]), value)

    return run


def initialise(unit, instruction, lane, address, count) -> None:
    shared, one = unit.wave.shared, np.array([lane])
    shared_place(unit, instruction, one, np.array([address]), 8, 8)
    data = np.full((1, 1), count, np.uint64)
    if problem := shared.check_write(unit.block[one], np.array([address]), data, unit.thread[one]):
        unit.report(problem, instruction, [lane])
    shared.store(unit.block[one], np.array([address]), data)
    nothing = np.zeros((2, shared.clocks.shape[-1]), np.int32)
    unit.wave.mbarriers[int(unit.block[lane]), address] = Barrier(count, count, nothing, nothing)


def invalidate(unit, instruction, lane, address, value) -> None:
    barrier_at(unit, instruction, lane, address)
    del unit.wave.mbarriers[int(unit.block[lane]), address]


def arrive(unit, instruction, lane, address, value) -> None:
    barrier = barrier_at(unit, instruction, lane, address)
    block, warp, shared = int(unit.block[lane]), int(unit.warp[lane]), unit.wave.shared
    barrier.arriving = np.maximum(barrier.arriving, shared.knowledge(block, warp))
    shared.tick(block, warp)
    if "expect_tx" in instruction.parts:
        barrier.bytes += value
        value = 1
    barrier.pending -= 1 if value is None else value
    if barrier.pending < 0:
        raise unit.fault("barrier", f"more arrivals than the {barrier.expected} the mbarrier takes", instruction, lane)
    barrier.settle()


def expect(unit, instruction, lane, address, value) -> None:
    barrier_at(unit, instruction, lane, address).bytes += value


def complete(unit, instruction, lane, address, value) -> None:
    barrier = barrier_at(unit, instruction, lane, address)
    barrier.bytes -= value
    barrier.settle()


def deliver(unit, barrier: Barrier, block: int) -> None:
    """What the copies bring appears, written by the engine that made them."""
    shared = unit.wave.shared
    agent = shared.warps
    for where, data in barrier.deliveries:
        blocks = np.full(len(where), block)
        shared.copying[shared.grains(blocks, where, data.shape[1])] = False
        shared.store(blocks, where, data)
        shared.mark(blocks, where, data.shape[1], np.full(len(where), agent * 32))
        barrier.bytes -= data.size
    if barrier.deliveries:
        barrier.arriving = np.maximum(barrier.arriving, shared.knowledge(block, agent))
        shared.clocks[block, agent, agent] += 1
        barrier.deliveries = []
        barrier.settle()
