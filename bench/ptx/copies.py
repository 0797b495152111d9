"""Asynchronous copies: cp.async in groups, bulk tensor copies through tensor maps, and the mbarriers they report to.

The data of a copy is taken when it starts and appears only where it is waited for; until then the place is marked, and a
read of it is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .faults import Fault
from .loads import address_operand, global_access, global_race, in_space, no_result, shared_place
from .memory import SECTOR
from .parse import Group, Immediate, Instruction
from .program import PARAM_WINDOW, Control, Program, Step, builds, put
from .unit import Parked
from .warps import constant_bits, held

# ------------------------------------------------------------------------------------------------ cp.async


@dataclass
class Copy:
    """One cp.async of some lanes: what goes where, and the group of each lane that it belongs to."""

    lanes: np.ndarray
    address: np.ndarray
    data: np.ndarray  # (n, bytes)
    group: np.ndarray


@builds("cp.async")
def copy_async(program: Program, instruction: Instruction) -> Step | None:
    parts = instruction.parts
    if "bulk" in parts:
        return bulk(program, instruction)
    if "commit_group" in parts:
        return commit
    if "wait_group" in parts or "wait_all" in parts:
        allowed = constant_bits(instruction.operands[0]) if "wait_group" in parts else None
        return lambda unit, mask: wait(unit, mask, allowed)
    if parts[2] not in ("ca", "cg"):
        return None
    to, source, size, *rest = instruction.operands
    nbytes = constant_bits(size)
    to_address, from_address = program.address(to), program.address(source)
    source_bytes = program.read(rest[0], np.uint32) if rest else program.constant(np.uint32(nbytes))
    pc = len(program.steps)

    def run(unit, mask):
        lanes = unit.lanes(mask)
        where = in_space("shared", to_address(unit)[lanes])
        taken = np.broadcast_to(unit.slots[source_bytes], unit.count)[lanes].astype(np.int64)
        data = np.zeros((len(lanes), nbytes), np.uint8)
        for size in np.unique(taken[taken > 0]):  # the rest of the bytes are zeros
            chosen = taken == size
            data[chosen, :size] = read_for_copy(unit, pc, instruction, lanes[chosen], in_space("global", from_address(unit)[lanes[chosen]]), int(size), nbytes)  # fmt: skip
        shared, block, thread = unit.wave.shared, unit.block[lanes], unit.thread[lanes]
        shared_place(unit, instruction, lanes, where, nbytes, nbytes)
        unit.wave.counts.shared_access(pc, lanes >> 5, unit.lane[lanes], where, nbytes)
        if problem := shared.check_write(block, where, data, thread, asynchronous=True):
            raise unit.fault(problem.kind, problem.message, instruction, lanes[problem.at], "shared memory")
        shared.copying[shared.grains(block, where, nbytes)] = True
        unit.copies.append(Copy(lanes, where, data, unit.copied[lanes]))

    return run


def read_for_copy(unit, pc, instruction, lanes, address, size: int, align: int) -> np.ndarray:
    global_access(unit, instruction, lanes, address, size, align, "copies")
    unit.wave.counts.global_access(pc, lanes >> 5, address, size)
    memory = unit.wave.memory
    if race := memory.race_of_read(address, size, unit.number[lanes]):
        raise global_race(unit, instruction, lanes, address, size, race, "copies", "wrote")
    return memory.load(address, 1, size)


def commit(unit, mask) -> None:
    put(unit.copied, unit.copied + 1, mask)


def wait(unit, mask, allowed: int | None) -> None:
    """All but the last `allowed` groups arrive; None: all copies, committed or not."""
    active = np.ones(unit.count, bool) if mask is None else mask
    shared, left = unit.wave.shared, []
    for copy in unit.copies:
        done = active[copy.lanes]
        if allowed is not None:
            done = done & (copy.group < unit.copied[copy.lanes] - allowed)
        if done.any():
            lanes, where, data = copy.lanes[done], copy.address[done], copy.data[done]
            block, nbytes = unit.block[lanes], data.shape[1]
            shared.copying[shared.grains(block, where, nbytes)] = False
            shared.store(block, where, data)
            shared.mark(block, where, nbytes, unit.thread[lanes])
        if not done.all():
            left.append(Copy(*(x[~done] for x in (copy.lanes, copy.address, copy.data, copy.group))))
    unit.copies = left


# ------------------------------------------------------------------------------------------------ mbarrier


@dataclass
class Barrier:
    """An mbarrier object: it completes a phase when `pending` arrivals and `bytes` of copies are left at 0."""

    expected: int
    pending: int
    clocks: np.ndarray  # what those who arrived have seen
    bytes: int = 0
    phase: int = 0
    deliveries: list = field(default_factory=list)

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.expected, self.phase ^ 1


def barrier_at(unit, instruction: Instruction, lane: int, address: int) -> Barrier:
    found = unit.wave.mbarriers.get((int(unit.block[lane]), address))
    if found is None:
        raise unit.fault(
            "uninitialised", f"no mbarrier at shared address {address}", instruction, lane, "shared memory"
        )
    one = np.array([lane])
    if problem := unit.wave.shared.check_read(unit.block[one], np.array([address]), 8, unit.thread[one]):
        raise unit.fault(problem.kind, problem.message, instruction, lane, "shared memory")
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

    def run(unit, pc, mask):
        coming = coming_of(unit, mask)
        unit.push(pc + 1, mask & ~coming)
        if not coming.any():
            return
        free = over(unit, coming)
        unit.push(pc + 1, free)
        if (coming & ~free).any():
            unit.parked.append(Parked(pc, coming & ~free, ready=over))

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
    if verb == "arrive" and not no_result(operands[0]):
        if not isinstance(operands[0], Group) and len(operands) > 1 and "expect_tx" not in instruction.parts:
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
        for lane in unit.lanes(mask).tolist():
            value = None if amount is None else int(np.broadcast_to(unit.slots[amount], unit.count)[lane])
            change[verb](unit, instruction, lane, int(address[lane]), value)

    return run


def initialise(unit, instruction, lane, address, count) -> None:
    shared, one = unit.wave.shared, np.array([lane])
    shared_place(unit, instruction, one, np.array([address]), 8, 8)
    data = np.full((1, 1), count, np.uint64)
    if problem := shared.check_write(unit.block[one], np.array([address]), data, unit.thread[one]):
        raise unit.fault(problem.kind, problem.message, instruction, lane, "shared memory")
    shared.store(unit.block[one], np.array([address]), data)
    unit.wave.mbarriers[int(unit.block[lane]), address] = Barrier(count, count, np.zeros(shared.warps + 1, np.int32))


def invalidate(unit, instruction, lane, address, value) -> None:
    barrier_at(unit, instruction, lane, address)
    del unit.wave.mbarriers[int(unit.block[lane]), address]


def arrive(unit, instruction, lane, address, value) -> None:
    barrier = barrier_at(unit, instruction, lane, address)
    block, warp, shared = int(unit.block[lane]), int(unit.warp[lane]), unit.wave.shared
    barrier.clocks = np.maximum(barrier.clocks, shared.clocks[block, warp])
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


# ------------------------------------------------------------------------------------------------ tensor maps


class TensorMap(NamedTuple):
    """What the 128 bytes of a CUtensorMap say. This machine's own layout of them: little-endian 32-bit words, rank at 8,
    then from 16 on, five each, sizes, strides (64-bit, bytes, from the second dimension), box sizes; swizzle, fill, type
    at the end. Innermost dimension first, as in CUDA."""

    base: int
    sizes: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # bytes; the first is the element's size
    box: tuple[int, ...]  # elements
    swizzle: int  # 0: none, 1, 2, 3: 32, 64, 128 bytes
    fill: int  # 1: NaN outside the tensor
    itemsize: int


MAP_BYTES = 128
# Where each field of a tensor map lies, by its name in tensormap.replace: (first byte, bytes of one).
FIELDS = {
    "global_address": (0, 8), "rank": (8, 4), "elemtype": (12, 4), "global_dim": (16, 4), "global_stride": (40, 8),
    "box_dim": (72, 4), "element_stride": (92, 4), "interleave_layout": (112, 4), "swizzle_mode": (116, 4),
    "fill_mode": (120, 4), "swizzle_atomicity": (124, 4),
}  # fmt: skip
# Bytes of an element by the number of its type: u8 u16 u32 s32 u64 s64 f16 f32 f32.ftz f64 bf16 tf32 tf32.ftz.
TYPE_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)


def encode_map(base: int, element: int, sizes, strides, box, swizzle: int, fill: int) -> bytes:
    """sizes, strides in elements and box outermost first, as Triton has them."""
    itemsize, rank = TYPE_BYTES[element], len(sizes)
    data = bytearray(MAP_BYTES)

    def put_field(name, value, at=0):
        start, size = FIELDS[name]
        data[start + at * size :][:0] = b""
        data[start + at * size : start + (at + 1) * size] = int(value).to_bytes(size, "little")

    put_field("global_address", base)
    put_field("rank", rank - 1)
    put_field("elemtype", element)
    put_field("swizzle_mode", swizzle)
    put_field("fill_mode", fill)
    for i in range(rank):
        put_field("global_dim", sizes[rank - 1 - i], i)
        put_field("box_dim", box[rank - 1 - i], i)
        if i:
            put_field("global_stride", strides[rank - 1 - i] * itemsize, i - 1)
    return bytes(data)


def decode_map(data: bytes) -> TensorMap:
    def get(name, at=0):
        start, size = FIELDS[name]
        return int.from_bytes(data[start + at * size : start + (at + 1) * size], "little")

    rank, itemsize = get("rank") + 1, TYPE_BYTES[get("elemtype")]
    return TensorMap(
        get("global_address"), tuple(get("global_dim", i) for i in range(rank)),
        (itemsize, *(get("global_stride", i) for i in range(rank - 1))), tuple(get("box_dim", i) for i in range(rank)),
        get("swizzle_mode"), get("fill_mode"), itemsize,
    )  # fmt: skip


def map_at(unit, instruction, lane: int, address: int) -> TensorMap:
    """A tensor map in the kernel's parameters or in global memory."""
    if address >= PARAM_WINDOW:
        start = address - PARAM_WINDOW
        return decode_map(unit.wave.params[start : start + MAP_BYTES].tobytes())
    where = np.array([address], np.uint64)
    global_access(unit, instruction, np.array([lane]), where, MAP_BYTES, 64, "reads a tensor map of")
    return decode_map(unit.wave.memory.load(where, 1, MAP_BYTES)[0].tobytes())


@builds("tensormap")
def tensor_map(program: Program, instruction: Instruction) -> Step | None:
    """tensormap.replace writes one field of a map in shared memory, tensormap.cp_fenceproxy copies it to global memory."""
    if instruction.parts[1] == "cp_fenceproxy":
        return publish_map(program, instruction)
    if instruction.parts[1] != "replace":
        return None
    name = instruction.parts[3]
    start, size = FIELDS[name]
    operands = list(instruction.operands)
    address_of = program.address(operands.pop(0))
    indexed = name in ("global_dim", "global_stride", "box_dim", "element_stride")
    at = constant_bits(operands.pop(0)) if indexed else 0
    dtype = np.uint64 if size == 8 else np.uint32
    value = program.read(operands[0], dtype)

    def run(unit, mask):
        lanes = unit.lanes(mask)
        where = in_space("shared", address_of(unit)[lanes]) + start + at * size
        values = np.broadcast_to(unit.slots[value], unit.count)[lanes][:, None]
        shared_place(unit, instruction, lanes, where, size, 4)
        halves = np.ascontiguousarray(values).view(np.uint32)
        shared = unit.wave.shared
        if problem := shared.check_write(unit.block[lanes], where, halves, unit.thread[lanes]):
            raise unit.fault(problem.kind, problem.message, instruction, lanes[problem.at], "shared memory")
        shared.store(unit.block[lanes], where, halves)

    return run


def publish_map(program: Program, instruction: Instruction) -> Step:
    to_address, from_address = (program.address(x) for x in instruction.operands[:2])

    def run(unit, mask):
        lanes = unit.lanes(mask)
        lanes = lanes[unit.lane[lanes] == 0]  # the warp does it together
        where, source = to_address(unit)[lanes], in_space("shared", from_address(unit)[lanes])
        global_access(unit, instruction, lanes, where, MAP_BYTES, 128, "writes a tensor map to")
        unit.wave.memory.store(where, unit.wave.shared.load(unit.block[lanes], source, 4, MAP_BYTES // 4))

    return run


# ------------------------------------------------------------------------------------------------ bulk copies


class Box(NamedTuple):
    """The elements of one bulk copy: offsets in global memory, which of them are in the tensor, offsets in shared."""

    address: np.ndarray
    inside: np.ndarray
    shared: np.ndarray


def box_of(tensor: TensorMap, coordinates: list[int], start: int) -> Box:
    """Element by element. The swizzle exchanges 16-byte pieces of a row by bits of the shared address itself."""
    index = np.indices(tensor.box[::-1]).reshape(len(tensor.box), -1)[::-1]  # innermost first
    place = index + np.array(coordinates)[:, None]
    inside = ((place >= 0) & (place < np.array(tensor.sizes)[:, None])).all(0)
    address = tensor.base + (place * np.array(tensor.strides)[:, None]).sum(0)
    linear = start + np.arange(index.shape[1]) * tensor.itemsize
    return Box(address, inside, swizzle(linear, tensor.swizzle))


def swizzle(address: np.ndarray, mode: int) -> np.ndarray:
    """Bits 4 to 4 + mode - 1 of an address, exclusive-or with the bits from 7 on. mode 1, 2, 3: 32, 64, 128 bytes."""
    return address ^ (((address >> 7) & ((1 << mode) - 1)) << 4)


def bulk(program: Program, instruction: Instruction) -> Step | None:
    parts = instruction.parts
    if "commit_group" in parts:
        return lambda unit, mask: None
    if "wait_group" in parts:
        return finish_reads
    if "tensor" not in parts:
        return None
    loads = parts.index("shared::cta") < parts.index("global") if "shared::cta" in parts else True
    first, second, *rest = instruction.operands
    (group, other) = (second, first) if loads else (first, second)
    map_of = program.address(address_operand(group.items[0]))
    coordinates = [program.read(x, np.int32) for x in group.items[1].items]
    shared_of = program.address(address_operand(other))
    barrier_of = program.address(address_operand(rest[0])) if loads else None
    pc = len(program.steps)
    if not loads and "bulk_group" not in parts:
        return None

    def run(unit, mask):
        for lane in unit.lanes(mask).tolist():
            tensor = map_at(unit, instruction, lane, int(map_of(unit)[lane]))
            where = [int(np.broadcast_to(unit.slots[c], unit.count)[lane]) for c in coordinates]
            start = int(in_space("shared", shared_of(unit))[lane])
            box = box_of(tensor, where, start)
            if loads:
                barrier = barrier_at(unit, instruction, lane, int(in_space("shared", barrier_of(unit))[lane]))
                start_load(unit, pc, instruction, lane, tensor, box, barrier)
            else:
                store_box(unit, pc, instruction, lane, tensor, box)

    return run


def start_load(unit, pc, instruction, lane, tensor: TensorMap, box: Box, barrier: Barrier) -> None:
    shared, n = unit.wave.shared, len(box.shared)
    lanes, block = np.full(n, lane), np.full(n, unit.block[lane])
    shared_place(unit, instruction, lanes, box.shared, tensor.itemsize, tensor.itemsize)
    data = np.zeros((n, tensor.itemsize), np.uint8)
    if tensor.fill:
        data[:] = np.frombuffer(
            {2: b"\xff\x7f", 4: b"\xff\xff\xff\x7f", 8: b"\xff" * 7 + b"\x7f"}[tensor.itemsize], np.uint8
        )
    if box.inside.any():
        address = box.address[box.inside].astype(np.uint64)
        data[box.inside] = read_box(unit, pc, instruction, lanes[box.inside], address, tensor.itemsize)
    if problem := shared.check_write(block, box.shared, data, unit.thread[lanes], asynchronous=True):
        raise unit.fault(problem.kind, problem.message, instruction, lane, "shared memory")
    shared.copying[shared.grains(block, box.shared, tensor.itemsize)] = True
    barrier.deliveries.append((box.shared, data))


def read_box(unit, pc, instruction, lanes, address, itemsize) -> np.ndarray:
    global_access(unit, instruction, lanes, address, itemsize, itemsize, "copies")
    count_box(unit, pc, address, itemsize)
    memory = unit.wave.memory
    if race := memory.race_of_read(address, itemsize, unit.number[lanes]):
        raise global_race(unit, instruction, lanes, address, itemsize, race, "copies", "wrote")
    return memory.load(address, 1, itemsize)


def count_box(unit, pc, address, itemsize) -> None:
    counts = unit.wave.counts
    counts.global_requests[pc] += 1
    counts.global_sectors[pc] += len(np.unique(address // np.uint64(SECTOR)))
    counts.global_bytes[pc] += len(address) * itemsize


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
        barrier.clocks[agent] = shared.clocks[block, agent, agent]
        shared.clocks[block, agent, agent] += 1
        barrier.deliveries = []
        barrier.settle()


def store_box(unit, pc, instruction, lane, tensor: TensorMap, box: Box) -> None:
    """From shared to global memory. The bytes are taken at once; the place may be written again after the wait."""
    shared = unit.wave.shared
    n = len(box.shared)
    lanes, block = np.full(n, lane), np.full(n, unit.block[lane])
    if problem := shared.check_read(block, box.shared, tensor.itemsize, unit.thread[lanes], agent=True):
        raise unit.fault(problem.kind, problem.message, instruction, lane, "shared memory")
    grains = np.unique(shared.grains(block, box.shared, tensor.itemsize))
    shared.reading[grains] += 1
    unit.wave.stores.append((unit, lane, grains))
    data = shared.load(block, box.shared, 1, tensor.itemsize)[box.inside]
    if len(data) == 0:
        return
    address, lanes = box.address[box.inside].astype(np.uint64), lanes[box.inside]
    global_access(unit, instruction, lanes, address, tensor.itemsize, tensor.itemsize, "writes")
    count_box(unit, pc, address, tensor.itemsize)
    if race := unit.wave.memory.race_of_write(address, data, unit.number[lanes]):
        raise global_race(unit, instruction, lanes, address, tensor.itemsize, race, "writes", "read or wrote")
    unit.wave.memory.store(address, data)


def finish_reads(unit, mask) -> None:
    """cp.async.bulk.wait_group: the stores of these lanes have read their source. Groups left open count as waited for."""
    left = []
    for record in unit.wave.stores:
        owner, lane, grains = record
        if owner is unit and (mask is None or mask[lane]):
            unit.wave.shared.reading[grains] -= 1
        else:
            left.append(record)
    unit.wave.stores = left


def is_constant(operand) -> bool:
    return isinstance(operand, Immediate)
