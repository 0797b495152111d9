"""mbarrier: a phase completes after its expected arrivals and the bytes of its bulk copies."""

from __future__ import annotations

import numpy as np

from ..faults import Fault
from ..frontend.program import Control, Program, Step, guard_mask, implements, write_masked
from ..frontend.syntax import Instruction, Register
from ..machine.unit import Blocked
from ..memory.shared_memory import Mbarrier
from .accesses import check_shared_bounds, to_address, to_space


def find_mbarrier(unit, instruction: Instruction, lane: int, address: int) -> Mbarrier:
    found = unit.wave.mbarriers.get((int(unit.block[lane]), address))
    if found is None:
        raise unit.make_fault(
            "uninitialised", f"no mbarrier at shared address {address}", instruction, lane, "shared memory"
        )
    one = np.array([lane])
    if problem := unit.wave.shared.check_read(unit.block[one], np.array([address]), 8, unit.thread[one]):
        unit.report(problem, instruction, [lane])
    return found


@implements("mbarrier.try_wait", "mbarrier.test_wait", control=True)
def wait_mbarrier(program: Program, instruction: Instruction) -> Control:
    """Waits until the phase of the given parity completes. Lanes block until then: a loop around it never spins."""
    if "parity" not in instruction.parts:
        raise Fault("unknown instruction", instruction.op, instruction)
    out = program.make_dest_slot(instruction.operands[0], np.bool_)
    get_address = program.make_address_getter(instruction.operands[1])
    parity = program.make_source_slot(instruction.operands[2], np.uint32)
    guard = guard_mask(program, instruction)

    def poll(unit, mask):
        address = to_space("shared", get_address(unit))
        wanted = np.broadcast_to(unit.slots[parity], unit.count)
        free = np.zeros(unit.count, bool)
        for lane in pick_lanes(unit, mask, address, wanted):
            barrier = find_mbarrier(unit, instruction, lane, int(address[lane]))
            deliver_copies(unit, barrier, int(unit.block[lane]))
            if barrier.phase != int(wanted[lane]) & 1:
                same = (
                    mask
                    & (unit.block == unit.block[lane])
                    & (unit.warp == unit.warp[lane])
                    & (address == address[lane])
                )
                same &= wanted == wanted[lane]
                free |= same
                unit.wave.shared.acquire(int(unit.block[lane]), int(unit.warp[lane]), barrier.clocks)
        write_masked(unit.slots[out], True, free)
        return free

    def describe(unit, lane) -> str:
        barrier = unit.wave.mbarriers[int(unit.block[lane]), int(to_space("shared", get_address(unit))[lane])]
        return f"{barrier.pending} of {barrier.expected} arrivals and {barrier.tx_bytes} bytes are pending"

    def run(unit, pc, mask):
        waiting = guard(unit, mask)
        unit.enqueue(pc + 1, mask & ~waiting)
        if not waiting.any():
            return
        free = poll(unit, waiting)
        unit.enqueue(pc + 1, free)
        if (waiting & ~free).any():
            unit.blocked.append(Blocked(pc, waiting & ~free, poll=poll, describe=describe))

    return run


def pick_lanes(unit, mask, *keys) -> list[int]:
    """One lane for each warp and each distinct combination of keys."""
    lanes = np.flatnonzero(mask)
    rows = np.stack([lanes >> 5, *(np.asarray(k)[lanes].astype(np.int64) for k in keys)], 1)
    return lanes[np.unique(rows, axis=0, return_index=True)[1]].tolist()


@implements("mbarrier")
def mbarrier(program: Program, instruction: Instruction) -> Step | None:
    verb = instruction.parts[1]
    operands = list(instruction.operands)
    if verb == "arrive" and isinstance(operands[0], Register):
        return None  # returns a state token: not supported
    if verb == "arrive" and len(operands) > 1:
        operands.pop(0)
    get_address = program.make_address_getter(to_address(operands[0]))
    amount = program.make_source_slot(operands[1], np.uint32) if len(operands) > 1 else None
    change = {
        "init": initialise,
        "inval": invalidate,
        "arrive": arrive,
        "expect_tx": expect_tx,
        "complete_tx": complete_tx,
    }
    if verb not in change:
        return None

    def run(unit, mask):
        address = to_space("shared", get_address(unit))
        unit.wave.shared.changes += 1
        for lane in unit.find_active_lanes(mask).tolist():
            value = None if amount is None else int(np.broadcast_to(unit.slots[amount], unit.count)[lane])
            change[verb](unit, instruction, lane, int(address[lane]), value)

    return run


def initialise(unit, instruction, lane, address, count) -> None:
    shared, one = unit.wave.shared, np.array([lane])
    check_shared_bounds(unit, instruction, one, np.array([address]), 8, 8)
    data = np.full((1, 1), count, np.uint64)
    if problem := shared.check_write(unit.block[one], np.array([address]), data, unit.thread[one]):
        unit.report(problem, instruction, [lane])
    shared.store(unit.block[one], np.array([address]), data)
    nothing = np.zeros((2, shared.clocks.shape[-1]), np.int32)
    unit.wave.mbarriers[int(unit.block[lane]), address] = Mbarrier(count, count, nothing, nothing)


def invalidate(unit, instruction, lane, address, value) -> None:
    find_mbarrier(unit, instruction, lane, address)
    del unit.wave.mbarriers[int(unit.block[lane]), address]


def arrive(unit, instruction, lane, address, value) -> None:
    barrier = find_mbarrier(unit, instruction, lane, address)
    block, warp, shared = int(unit.block[lane]), int(unit.warp[lane]), unit.wave.shared
    barrier.arriving_clocks = np.maximum(barrier.arriving_clocks, shared.release(block, warp))
    shared.advance_clock(block, warp)
    if "expect_tx" in instruction.parts:
        barrier.tx_bytes += value
        value = 1
    barrier.pending -= 1 if value is None else value
    if barrier.pending < 0:
        raise unit.make_fault(
            "barrier", f"more arrivals than the {barrier.expected} that the mbarrier expects", instruction, lane
        )
    barrier.complete_phase()


def expect_tx(unit, instruction, lane, address, value) -> None:
    find_mbarrier(unit, instruction, lane, address).tx_bytes += value


def complete_tx(unit, instruction, lane, address, value) -> None:
    barrier = find_mbarrier(unit, instruction, lane, address)
    barrier.tx_bytes -= value
    barrier.complete_phase()


def deliver_copies(unit, barrier: Mbarrier, block: int) -> None:
    """Writes the data of completed bulk copies, as their engine."""
    shared = unit.wave.shared
    engine = shared.warps  # its row of the clocks
    for where, data in barrier.deliveries:
        blocks = np.full(len(where), block)
        shared.pending_copies[shared.grain_indices(blocks, where, data.shape[1])] = False
        shared.store(blocks, where, data)
        shared.record_copies(blocks, where, data.shape[1], np.full(len(where), engine * 32))
        barrier.tx_bytes -= data.size
    if barrier.deliveries:
        barrier.arriving_clocks = np.maximum(barrier.arriving_clocks, shared.release(block, engine))
        shared.clocks[block, engine, engine] += 1
        barrier.deliveries = []
        barrier.complete_phase()
