"""ld, st, atom, red, ldmatrix, stmatrix: the accesses of lanes to memory, each checked and counted before it is done."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arithmetic import DTYPES
from .faults import Fault
from .memory import Outside, atomic
from .parse import BYTES, Address, Group, Instruction, Register, Symbol
from .program import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WORD, Program, Step, builds, put

SPACES = ("global", "shared", "local", "param", "const")


def space_of(instruction: Instruction) -> str:
    parts = [p.split("::")[0] for p in instruction.parts]
    return next((s for s in SPACES if s in parts), "generic")


def vector(instruction: Instruction) -> int:
    return next((int(p[1:]) for p in instruction.parts if p in ("v2", "v4", "v8")), 1)


def items(operand) -> tuple:
    return operand.items if isinstance(operand, Group) else (operand,)


# ------------------------------------------------------------------------------------------------ one access


def global_access(
    unit, instruction: Instruction, lanes: np.ndarray, address: np.ndarray, nbytes: int, align: int, does: str
):
    """Before an access to global memory of these lanes: aligned, and inside a tensor."""
    bad = address % np.uint64(align) != 0
    if bad.any():
        at = int(np.argmax(bad))
        where, tensor = unit.wave.memory.describe(int(address[at]), nbytes)
        raise unit.fault("misaligned", f"{does} {nbytes} bytes {where}; the address is not a multiple of {align}", instruction, lanes[at], tensor)  # fmt: skip
    try:
        unit.wave.memory.split(address, nbytes)
    except Outside as outside:
        where, tensor = unit.wave.memory.describe(int(address[outside.at]), nbytes)
        raise unit.fault(
            "out of bounds", f"{does} {nbytes} bytes {where}", instruction, lanes[outside.at], tensor
        ) from None


def global_load(unit, pc: int, instruction: Instruction, lanes: np.ndarray, address: np.ndarray, width: int, count: int) -> np.ndarray:  # fmt: skip
    nbytes = width * count
    memory, block = unit.wave.memory, unit.number[lanes]
    global_access(unit, instruction, lanes, address, nbytes, nbytes, "reads")
    unit.wave.counts.global_access(pc, lanes >> 5, address, nbytes)
    if race := memory.race_of_read(address, nbytes, block):
        raise global_race(unit, instruction, lanes, address, nbytes, race, "reads", "wrote")
    return memory.load(address, width, count)


def global_store(unit, pc: int, instruction: Instruction, lanes: np.ndarray, address: np.ndarray, values: np.ndarray) -> None:  # fmt: skip
    nbytes = values.dtype.itemsize * values.shape[1]
    global_access(unit, instruction, lanes, address, nbytes, nbytes, "writes")
    unit.wave.counts.global_access(pc, lanes >> 5, address, nbytes)
    if race := unit.wave.memory.race_of_write(address, values, unit.number[lanes]):
        raise global_race(unit, instruction, lanes, address, nbytes, race, "writes", "read or wrote")
    unit.wave.memory.store(address, values)


def global_race(unit, instruction, lanes, address, nbytes, race, does, did) -> Fault:
    at, other = race
    where, tensor = unit.wave.memory.describe(int(address[at]), nbytes)
    return unit.fault("global race", f"{does} {nbytes} bytes {where}, which block {unit.wave.place(other)} {did}", instruction, lanes[at], tensor)  # fmt: skip


def shared_place(unit, instruction, lanes, address, nbytes, align) -> None:
    problem = unit.wave.shared.place(address, nbytes, align)
    if problem:
        raise unit.fault(problem.kind, problem.message, instruction, lanes[problem.at], "shared memory")


def shared_load(unit, pc, instruction, lanes, address, width: int, count: int) -> np.ndarray:
    shared, block, nbytes = unit.wave.shared, unit.block[lanes], width * count
    shared_place(unit, instruction, lanes, address, nbytes, nbytes)
    unit.wave.counts.shared_access(pc, lanes >> 5, unit.lane[lanes], address, nbytes)
    if problem := shared.check_read(block, address, nbytes, unit.thread[lanes]):
        raise unit.fault(problem.kind, problem.message, instruction, lanes[problem.at], "shared memory")
    return shared.load(block, address, width, count)


def shared_store(unit, pc, instruction, lanes, address, values: np.ndarray) -> None:
    shared, block, nbytes = unit.wave.shared, unit.block[lanes], values.dtype.itemsize * values.shape[1]
    shared_place(unit, instruction, lanes, address, nbytes, nbytes)
    unit.wave.counts.shared_access(pc, lanes >> 5, unit.lane[lanes], address, nbytes)
    if problem := shared.check_write(block, address, values, unit.thread[lanes]):
        raise unit.fault(problem.kind, problem.message, instruction, lanes[problem.at], "shared memory")
    shared.store(block, address, values)


def local_index(unit, instruction, lanes, address, nbytes) -> tuple:
    size = unit.program.local_bytes
    bad = (address < 0) | (address + nbytes > size) | (address % nbytes != 0)
    if bad.any():
        at = int(np.argmax(bad))
        raise unit.fault("out of bounds", f"{nbytes} bytes at {address[at]} of {size} bytes of local memory", instruction, lanes[at], "local memory")  # fmt: skip
    return lanes[:, None], address[:, None] + np.arange(nbytes)


def local_load(unit, pc, instruction, lanes, address, width, count):
    taken = unit.local[local_index(unit, instruction, lanes, address, width * count)]
    return np.ascontiguousarray(taken).view(WORD[width])


def local_store(unit, pc, instruction, lanes, address, values):
    where = local_index(unit, instruction, lanes, address, values.dtype.itemsize * values.shape[1])
    unit.local[where] = np.ascontiguousarray(values).view(np.uint8)


def param_load(unit, pc, instruction, lanes, address, width, count):
    where = address[:, None] + np.arange(width * count)
    return np.ascontiguousarray(unit.wave.params[where]).view(WORD[width])


LOADS = {"global": global_load, "const": global_load, "shared": shared_load, "local": local_load, "param": param_load}
STORES = {"global": global_store, "shared": shared_store, "local": local_store}
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}


def in_space(space: str, address: np.ndarray) -> np.ndarray:
    """A space's own addresses, as its functions take them."""
    if space in ("global", "const"):
        return address.astype(np.uint64)
    window = WINDOWS[space]
    address = address.astype(np.int64)
    return np.where(address >= window, address - window, address)


def by_space(space: str, address: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Generic addresses: each space with the lanes whose addresses are in its window."""
    if space != "generic":
        return [(space, np.ones(len(address), bool))]
    where = address.astype(np.uint64) >> np.uint64(60)
    kinds = {"global": 0, "shared": 1, "local": 2, "param": 4}
    return [(name, mask) for name, n in kinds.items() if (mask := where == n).any()]


@builds("ld", "ldu")
def load(program: Program, instruction: Instruction) -> Step:
    space, count = space_of(instruction), vector(instruction)
    dtype = DTYPES[instruction.type]
    width = BYTES[instruction.type]
    to, source = instruction.operands
    if space == "param" and isinstance(source.base, Register):  # of a function that was inlined
        return program_move(program, source.base, to, dtype)
    outs = [program.write(x, dtype) for x in items(to)]
    address_of = program.address(source)
    pc = len(program.steps)

    def run(unit, mask):
        lanes = unit.lanes(mask)
        address = address_of(unit)[lanes]
        for name, there in by_space(space, address):
            chosen = lanes[there]
            values = LOADS[name](unit, pc, instruction, chosen, in_space(name, address[there]), width, count).view(
                dtype
            )
            for i, out in enumerate(outs):
                if out is not None:
                    scatter(unit.slots[out], chosen, values[:, i])

    return run


def scatter(target: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
    if len(lanes) == len(target):
        target[...] = values
    else:
        target[lanes] = values


def program_move(program: Program, source, to, dtype) -> Step:
    a, d = program.read(source, dtype), program.write(to, dtype)
    return lambda unit, mask: put(unit.slots[d], unit.slots[a], mask)


@builds("st")
def store(program: Program, instruction: Instruction) -> Step:
    space, count = space_of(instruction), vector(instruction)
    width = BYTES[instruction.type]
    dtype = WORD[width]
    to, source = instruction.operands
    if space == "param":
        return program_move(program, source, to.base, dtype)
    values_of = [program.read(x, dtype) for x in items(source)]
    address_of = program.address(to)
    pc = len(program.steps)

    def run(unit, mask):
        lanes = unit.lanes(mask)
        address = address_of(unit)[lanes]
        values = np.empty((len(lanes), count), dtype)
        for i, slot in enumerate(values_of):
            values[:, i] = np.broadcast_to(unit.slots[slot], unit.count)[lanes]
        for name, there in by_space(space, address):
            STORES[name](unit, pc, instruction, lanes[there], in_space(name, address[there]), values[there])

    return run


# ------------------------------------------------------------------------------------------------ atomics


def combine(parts: tuple[str, ...]) -> Callable:
    operation = next(p for p in parts[1:] if p in ATOMICS)
    return ATOMICS[operation]


ATOMICS = {
    "add": lambda old, x: old + x, "min": lambda old, x: np.minimum(old, x), "max": lambda old, x: np.maximum(old, x),
    "and": lambda old, x: old & x, "or": lambda old, x: old | x, "xor": lambda old, x: old ^ x, "exch": lambda old, x: x,
    "inc": lambda old, x: old.dtype.type(0) if old >= x else old + old.dtype.type(1),
    "dec": lambda old, x: x if old == 0 or old > x else old - old.dtype.type(1),
    "cas": lambda old, expected, new: new if old == expected else old,
}  # fmt: skip


@builds("atom", "red")
def atomics(program: Program, instruction: Instruction) -> Step:
    """Lanes in order, blocks in order. Release and acquire make what a block did visible to the blocks after it."""
    parts = instruction.parts
    if instruction.type in ("f16", "bf16", "f16x2", "bf16x2") or vector(instruction) > 1:
        return half_atomics(program, instruction)
    function, space = combine(parts), space_of(instruction)
    dtype = DTYPES[instruction.type]
    width = BYTES[instruction.type]
    operands = list(instruction.operands)
    out = program.write(operands.pop(0), dtype) if parts[0] == "atom" else None
    address_of = program.address(operands.pop(0))
    values_of = [program.read(x, dtype) for x in operands]
    acquires = "acquire" in parts or "acq_rel" in parts
    releases = "release" in parts or "acq_rel" in parts
    pc = len(program.steps)

    def run(unit, mask):
        lanes = unit.lanes(mask)
        address = address_of(unit)[lanes]
        values = tuple(np.broadcast_to(unit.slots[s], unit.count)[lanes] for s in values_of)
        for name, there in by_space(space, address):
            chosen, where = lanes[there], in_space(name, address[there])
            view, index = atomic_place(unit, pc, instruction, name, chosen, where, width)
            if acquires or releases:
                order_blocks(unit, chosen, where, acquires, releases)
            old = atomic(function, view.view(dtype), index, range(len(chosen)), tuple(v[there] for v in values))
            if out is not None:
                scatter(unit.slots[out], chosen, old)

    return run


def atomic_place(unit, pc, instruction, space, lanes, address, width) -> tuple[np.ndarray, np.ndarray]:
    """(view, index of each lane's element)."""
    if space == "shared":
        shared = unit.wave.shared
        shared_place(unit, instruction, lanes, address, width, width)
        unit.wave.counts.shared_access(pc, lanes >> 5, unit.lane[lanes], address, width)
        if problem := shared.check_atomic(unit.block[lanes], address, width, unit.thread[lanes]):
            raise unit.fault(problem.kind, problem.message, instruction, lanes[problem.at], "shared memory")
        return shared.views[width], shared.index(unit.block[lanes], address, width, 1)[:, 0]
    memory = unit.wave.memory
    global_access(unit, instruction, lanes, address, width, width, "updates")
    unit.wave.counts.global_access(pc, lanes >> 5, address, width)
    memory.unmark(address, width)
    pieces = memory.split(address, width)
    if len(pieces) > 1:
        raise unit.fault("unsupported", "one atomic on several tensors", instruction, lanes[0])
    view, index = pieces[0][0].elements(address, width, 1)
    return view, index[:, 0]


def order_blocks(unit, lanes, address, acquires: bool, releases: bool) -> None:
    order = unit.wave.memory.order
    for block, where in dict.fromkeys(zip(unit.number[lanes].tolist(), address.tolist(), strict=True)):
        if acquires:
            order.acquire(where, block)
        if releases:
            order.release(where, block)


def half_atomics(program: Program, instruction: Instruction) -> Step:
    """add.noftz of float16 and bfloat16, alone or in pairs, and vectors of floats."""
    from .arithmetic import value

    kind, count = instruction.type, vector(instruction)
    operation = next(p for p in instruction.parts[1:] if p in ATOMICS)
    add = value((operation, kind)).compute
    dtype = WORD[BYTES[kind]] if kind != "f32" else np.float32
    operands = list(instruction.operands)
    first = operands.pop(0) if instruction.parts[0] == "atom" else None
    outs = [program.write(x, dtype) for x in items(first)] if first is not None else []
    address_of = program.address(operands.pop(0))
    values_of = [program.read(x, dtype) for x in items(operands[0])]
    space = space_of(instruction)
    pc = len(program.steps)

    def function(old, x):
        return add(np.atleast_1d(old), np.atleast_1d(x))[0]

    def run(unit, mask):
        lanes = unit.lanes(mask)
        for name, there in by_space(space, address_of(unit)[lanes]):
            chosen = lanes[there]
            where = in_space(name, address_of(unit)[chosen])
            for i in range(count):
                view, index = atomic_place(unit, pc, instruction, name, chosen, where + where.dtype.type(i * BYTES[kind]), BYTES[kind])  # fmt: skip
                x = np.broadcast_to(unit.slots[values_of[i]], unit.count)[chosen]
                old = atomic(function, view.view(dtype), index, range(len(chosen)), (x,))
                if outs and outs[i] is not None:
                    scatter(unit.slots[outs[i]], chosen, old)

    return run


# ------------------------------------------------------------------------------------------------ matrices


def matrix_rows(unit, mask, address_of, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(warps (n,), lanes that give row addresses (n * count * 8,), their addresses) of ldmatrix and stmatrix."""
    warps = np.arange(unit.count // 32) if mask is None else np.flatnonzero(mask.reshape(-1, 32).any(1))
    lanes = (warps[:, None] * 32 + np.arange(8 * count)).ravel()
    return warps, lanes, np.broadcast_to(address_of(unit), unit.count)[lanes].astype(np.int64)


def matrix_count(instruction: Instruction) -> int:
    return int(next(p for p in instruction.parts if p in ("x1", "x2", "x4"))[1:])


@builds("ldmatrix")
def load_matrix(program: Program, instruction: Instruction) -> Step:
    """Lanes 8i to 8i+7 give the rows of matrix i, of eight 16-bit elements; lane t gets the elements 2(t%4) and
    2(t%4)+1 of row t/4 (.trans: of column t/4)."""
    count, trans = matrix_count(instruction), "trans" in instruction.parts
    if instruction.type != "b16":
        return None
    outs = [program.write(x, np.uint32) for x in items(instruction.operands[0])]
    address_of = program.address(instruction.operands[1])
    pc = len(program.steps)

    def run(unit, mask):
        warps, lanes, address = matrix_rows(unit, mask, address_of, count)
        shared, block = unit.wave.shared, unit.block[lanes]
        shared_place(unit, instruction, lanes, address, 16, 16)
        counts = unit.wave.counts
        counts.shared_requests[pc] += len(warps)
        counts.wavefronts(pc, lanes >> 3, address, 16)
        if problem := shared.check_read(block, address, 16, unit.thread[lanes]):
            raise unit.fault(problem.kind, problem.message, instruction, lanes[problem.at], "shared memory")
        tile = shared.load(block, address, 4, 4).view(np.uint16).reshape(len(warps), count, 8, 8)
        if trans:
            tile = np.ascontiguousarray(tile.swapaxes(2, 3))
        words = tile.view(np.uint32).reshape(len(warps), count, 32)
        for i, out in enumerate(outs):
            unit.slots[out].reshape(-1, 32)[warps] = words[:, i]

    return run


@builds("stmatrix")
def store_matrix(program: Program, instruction: Instruction) -> Step:
    count, trans = matrix_count(instruction), "trans" in instruction.parts
    if instruction.type != "b16":
        return None
    address_of = program.address(instruction.operands[0])
    values_of = [program.read(x, np.uint32) for x in items(instruction.operands[1])]
    pc = len(program.steps)

    def run(unit, mask):
        warps, lanes, address = matrix_rows(unit, mask, address_of, count)
        words = np.stack([unit.slots[s].reshape(-1, 32)[warps] for s in values_of], 1)
        tile = words.view(np.uint16).reshape(len(warps), count, 8, 8)
        if trans:
            tile = np.ascontiguousarray(tile.swapaxes(2, 3))
        rows = tile.view(np.uint32).reshape(-1, 4)
        shared = unit.wave.shared
        shared_place(unit, instruction, lanes, address, 16, 16)
        unit.wave.counts.shared_requests[pc] += len(warps)
        unit.wave.counts.wavefronts(pc, lanes >> 3, address, 16)
        if problem := shared.check_write(unit.block[lanes], address, rows, unit.thread[lanes]):
            raise unit.fault(problem.kind, problem.message, instruction, lanes[problem.at], "shared memory")
        shared.store(unit.block[lanes], address, rows)

    return run


@builds("prefetch", "prefetchu", "discard", "applypriority")
def nothing(program: Program, instruction: Instruction) -> Step:
    return lambda unit, mask: None


def address_operand(operand) -> Address:
    return operand if isinstance(operand, Address) else Address(operand, 0)


def no_result(operand) -> bool:
    return isinstance(operand, Symbol) and operand.name == "_"
