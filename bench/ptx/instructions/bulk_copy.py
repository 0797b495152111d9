"""cp.async.bulk.tensor: copies boxes of a tensor between global and shared memory, by a tensor map."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..frontend.program import Program, Step, implements
from ..frontend.syntax import Instruction
from ..memory.segments import SECTOR
from ..memory.shared_memory import Mbarrier
from ..memory.tensor_maps import TensorMap
from .accesses import check_global_access, check_shared_bounds, report_race, report_unwritten, to_address, to_space
from .mbarriers import find_mbarrier
from .tensormap import load_tensor_map


class Box(NamedTuple):
    """The elements of one bulk copy: global addresses, the mask of those inside the tensor, shared addresses."""

    address: np.ndarray
    inside: np.ndarray
    shared: np.ndarray


def locate_box(tensor: TensorMap, coordinates: list[int], start: int) -> Box:
    """Element by element. The swizzle permutes 16-byte chunks of a row by bits of the shared address."""
    index = np.indices(tensor.box[::-1]).reshape(len(tensor.box), -1)[::-1]  # innermost first
    place = index + np.array(coordinates)[:, None]
    inside = ((place >= 0) & (place < np.array(tensor.sizes)[:, None])).all(0)
    address = tensor.base + (place * np.array(tensor.strides)[:, None]).sum(0)
    linear = start + np.arange(index.shape[1]) * tensor.itemsize
    return Box(address, inside, swizzle(linear, tensor.swizzle))


def swizzle(address: np.ndarray, mode: int) -> np.ndarray:
    """XORs the `mode` bits of an address from bit 4 on with those from bit 7 on. mode 1, 2, 3: 32, 64, 128 bytes."""
    return address ^ (((address >> 7) & ((1 << mode) - 1)) << 4)


@implements("cp.async.bulk")
def copy_bulk(program: Program, instruction: Instruction) -> Step | None:
    parts = instruction.parts
    if "commit_group" in parts:
        return lambda unit, mask: None
    if "wait_group" in parts:
        return wait_group
    if "tensor" not in parts:
        return None
    loads = parts.index("shared::cta") < parts.index("global") if "shared::cta" in parts else True
    first, second, *rest = instruction.operands
    (group, other) = (second, first) if loads else (first, second)
    get_map = program.make_address_getter(to_address(group.items[0]))
    coordinates = [program.make_source_slot(x, np.int32) for x in group.items[1].items]
    get_shared = program.make_address_getter(to_address(other))
    get_barrier = program.make_address_getter(to_address(rest[0])) if loads else None
    pc = len(program.steps)
    if not loads and "bulk_group" not in parts:
        return None

    def run(unit, mask):
        for lane in unit.find_active_lanes(mask).tolist():
            tensor = load_tensor_map(unit, instruction, lane, int(get_map(unit)[lane]))
            where = [int(np.broadcast_to(unit.slots[c], unit.count)[lane]) for c in coordinates]
            start = int(to_space("shared", get_shared(unit))[lane])
            if message := check_alignment(tensor, where, start):
                raise unit.make_fault("misaligned", message, instruction, lane)
            box = locate_box(tensor, where, start)
            if loads:
                barrier = find_mbarrier(unit, instruction, lane, int(to_space("shared", get_barrier(unit))[lane]))
                load_box(unit, pc, instruction, lane, tensor, box, barrier)
            else:
                store_box(unit, pc, instruction, lane, tensor, box)

    return run


def check_alignment(tensor: TensorMap, coordinates: list[int], start: int) -> str | None:
    """Alignments without which an H200 reports "an illegal instruction was encountered"; the message, if any."""
    into = coordinates[0] * tensor.itemsize
    if into % 16:
        return f"copies a box that starts {into} bytes into a row of its tensor; that must be a multiple of 16"
    if start % 128:
        return f"copies a box to or from shared memory at {start}; that must be a multiple of 128"
    return None


def load_box(unit, pc, instruction, lane, tensor: TensorMap, box: Box, barrier: Mbarrier) -> None:
    shared, n = unit.wave.shared, len(box.shared)
    lanes, block = np.full(n, lane), np.full(n, unit.block[lane])
    check_shared_bounds(unit, instruction, lanes, box.shared, tensor.itemsize, tensor.itemsize)
    data = np.zeros((n, tensor.itemsize), np.uint8)
    if tensor.fill:
        data[:] = np.frombuffer(
            {2: b"\xff\x7f", 4: b"\xff\xff\xff\x7f", 8: b"\xff" * 7 + b"\x7f"}[tensor.itemsize], np.uint8
        )
    if box.inside.any():
        address = box.address[box.inside].astype(np.uint64)
        data[box.inside] = read_box(unit, pc, instruction, lanes[box.inside], address, tensor.itemsize)
    if problem := shared.check_copy(block, box.shared, tensor.itemsize, unit.thread[lanes]):
        unit.report(problem, instruction, [lane])
    shared.pending_copies[shared.grain_indices(block, box.shared, tensor.itemsize)] = True
    barrier.deliveries.append((box.shared, data))


def read_box(unit, pc, instruction, lanes, address, itemsize) -> np.ndarray:
    check_global_access(unit, instruction, lanes, address, itemsize, itemsize, "copies")
    count_box(unit, pc, address, itemsize)
    memory = unit.wave.memory
    if race := memory.check_read(address, itemsize, unit.grid_block[lanes]):
        report_race(unit, instruction, lanes, address, itemsize, race, "copies", "wrote")
    report_unwritten(unit, instruction, lanes, address, itemsize, "copies", "uninitialised copy")
    return memory.load(address, 1, itemsize)


def count_box(unit, pc, address, itemsize) -> None:
    counts = unit.wave.counts
    if not counts.global_requests[pc]:
        counts.first_address[pc] = address[0]
    counts.global_requests[pc] += 1
    counts.global_sectors[pc] += len(np.unique(address // np.uint64(SECTOR)))
    counts.global_bytes[pc] += len(address) * itemsize


def store_box(unit, pc, instruction, lane, tensor: TensorMap, box: Box) -> None:
    """From shared to global memory. The source is read at once, but may be overwritten only after the wait."""
    shared = unit.wave.shared
    n = len(box.shared)
    lanes, block = np.full(n, lane), np.full(n, unit.block[lane])
    if problem := shared.check_read(block, box.shared, tensor.itemsize, unit.thread[lanes], async_proxy=True):
        unit.report(problem, instruction, [lane])
    grains = np.unique(shared.grain_indices(block, box.shared, tensor.itemsize))
    shared.begin_bulk_read(grains)
    unit.wave.bulk_stores.append((unit, lane, grains))
    data = shared.load(block, box.shared, 1, tensor.itemsize)[box.inside]
    if len(data) == 0:
        return
    address, lanes = box.address[box.inside].astype(np.uint64), lanes[box.inside]
    check_global_access(unit, instruction, lanes, address, tensor.itemsize, tensor.itemsize, "writes")
    count_box(unit, pc, address, tensor.itemsize)
    if race := unit.wave.memory.check_write(address, data, unit.grid_block[lanes]):
        report_race(unit, instruction, lanes, address, tensor.itemsize, race, "writes", "read or wrote")
    unit.wave.memory.store(address, data)


def wait_group(unit, mask) -> None:
    """cp.async.bulk.wait_group: all stores of these lanes have read their source, uncommitted ones too."""
    left = []
    for record in unit.wave.bulk_stores:
        owner, lane, grains = record
        if owner is unit and (mask is None or mask[lane]):
            unit.wave.shared.end_bulk_read(grains, unit.block[lane], unit.warp[lane])
        else:
            left.append(record)
    unit.wave.bulk_stores = left
