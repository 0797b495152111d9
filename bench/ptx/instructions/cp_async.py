"""cp.async: asynchronous copies of up to 16 bytes a lane, waited for in groups.

A copy reads its source when it starts and writes its destination when it is waited for. Until then the destination is
marked, and a read of it is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..frontend.program import Program, Step, encode_immediate, implements, write_masked
from ..frontend.syntax import Instruction
from .accesses import check_shared_bounds, read_global, to_space


@dataclass
class Copy:
    """One cp.async in flight: its lanes, destinations, data, and the group of each lane."""

    lanes: np.ndarray
    address: np.ndarray
    data: np.ndarray  # (n, bytes)
    group: np.ndarray


@implements("cp.async")
def copy_async(program: Program, instruction: Instruction) -> Step | None:
    parts = instruction.parts
    if "commit_group" in parts:
        return commit_group
    if "wait_group" in parts or "wait_all" in parts:
        allowed = encode_immediate(instruction.operands[0]) if "wait_group" in parts else None
        return lambda unit, mask: wait_group(unit, mask, allowed)
    if parts[2] not in ("ca", "cg"):
        return None
    to, source, size, *rest = instruction.operands
    nbytes = encode_immediate(size)
    get_destination, get_source = program.make_address_getter(to), program.make_address_getter(source)
    source_bytes = (
        program.make_source_slot(rest[0], np.uint32) if rest else program.make_constant_slot(np.uint32(nbytes))
    )
    pc = len(program.steps)

    def run(unit, mask):
        lanes = unit.find_active_lanes(mask)
        where = to_space("shared", get_destination(unit)[lanes])
        taken = np.broadcast_to(unit.slots[source_bytes], unit.count)[lanes].astype(np.int64)
        data = np.zeros((len(lanes), nbytes), np.uint8)
        for size in np.unique(taken[taken > 0]):  # the remaining bytes are zeros
            chosen = taken == size
            address = to_space("global", get_source(unit)[lanes[chosen]])
            data[chosen, :size] = read_global(
                unit, pc, instruction, lanes[chosen], address, 1, int(size), nbytes, "copies"
            )
        shared, block, thread = unit.wave.shared, unit.block[lanes], unit.thread[lanes]
        check_shared_bounds(unit, instruction, lanes, where, nbytes, nbytes)
        unit.wave.counts.count_shared_access(pc, lanes >> 5, unit.lane[lanes], where, nbytes)
        if problem := shared.check_copy(block, where, nbytes, thread):
            unit.report(problem, instruction, lanes)
        shared.pending_copies[shared.grain_indices(block, where, nbytes)] = True
        unit.copies.append(Copy(lanes, where, data, unit.copy_groups[lanes]))

    return run


def commit_group(unit, mask) -> None:
    write_masked(unit.copy_groups, unit.copy_groups + 1, mask)


def wait_group(unit, mask, allowed: int | None) -> None:
    """Completes all but the last `allowed` groups; None: all copies, committed or not."""
    active = np.ones(unit.count, bool) if mask is None else mask
    shared, left = unit.wave.shared, []
    for copy in unit.copies:
        done = active[copy.lanes]
        if allowed is not None:
            done = done & (copy.group < unit.copy_groups[copy.lanes] - allowed)
        if done.any():
            lanes, where, data = copy.lanes[done], copy.address[done], copy.data[done]
            block, nbytes = unit.block[lanes], data.shape[1]
            shared.pending_copies[shared.grain_indices(block, where, nbytes)] = False
            shared.store(block, where, data)
            shared.record_copies(block, where, nbytes, unit.thread[lanes])
        if not done.all():
            left.append(Copy(*(x[~done] for x in (copy.lanes, copy.address, copy.data, copy.group))))
    unit.copies = left
