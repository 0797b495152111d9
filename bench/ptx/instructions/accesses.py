"""Memory accesses of lanes: each is checked and counted before it is performed."""

from __future__ import annotations

import functools

import numpy as np

from ..faults import Fault
from ..frontend.program import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from ..frontend.syntax import Address, Instruction
from ..frontend.types import UNSIGNED
from ..memory.global_memory import WarpConflict
from .rounding import is_rounding_difference

SPACES = ("global", "shared", "local", "param", "const")


def find_space(instruction: Instruction) -> str:
    parts = [p.split("::")[0] for p in instruction.parts]
    return next((s for s in SPACES if s in parts), "generic")


def count_elements(instruction: Instruction) -> int:
    return next((int(p[1:]) for p in instruction.parts if p in ("v2", "v4", "v8")), 1)


# ------------------------------------------------------------------------------------------------ one access


def check_global_access(
    unit, instruction: Instruction, lanes: np.ndarray, address: np.ndarray, nbytes: int, align: int, does: str,
    partly: bool = False,
) -> np.ndarray | None:  # fmt: skip
    """Checks that accesses to global memory are aligned and within a tensor. partly: the caller can leave out lanes
    that are outside. Returns the mask of those inside; None: all."""
    memory = unit.wave.memory
    bad = address % np.uint64(align) != 0
    if bad.any():
        does = f"{does} {nbytes} bytes {{}}; the address is not a multiple of {align}"
        raise make_global_fault(unit, "misaligned", does, instruction, lanes, address, int(np.argmax(bad)), nbytes)
    if strays := memory.find_stray(instruction.provenance, address, nbytes, instruction.used_bytes):
        kind, outside = strays
        does_where = f"{does} {nbytes} bytes {{}}"
        fault = make_global_fault(unit, kind, does_where, instruction, lanes, address, int(np.argmax(outside)), nbytes)
        if kind == "out of bounds" and not partly:
            raise fault
        unit.wave.judge(fault)
        if kind == "out of bounds":
            return ~outside
    if unit.merges_warps:
        pieces, write = memory.split_by_segment(address, nbytes), does in ("writes", "updates")
        if memory.has_warp_conflict(pieces, address, nbytes, unit.grid_block[lanes], unit.warp[lanes], write):
            raise WarpConflict
    return None


def make_global_fault(unit, kind, message, instruction, lanes, address, at, nbytes) -> Fault:
    """Of the access of lanes[at]. message: {} is replaced by the place in a tensor."""
    memory, where = unit.wave.memory, int(address[at])
    tensor = memory.find_nearest_tensor(where, memory.find_tensors(instruction.provenance))
    if tensor is None:
        return unit.make_fault(
            kind, message.format(f"at address {where:#x}, with no tensor in the launch"), instruction, lanes[at]
        )
    place = tensor.describe(where, nbytes)
    if kind == "out of view" and not tensor.start <= where < tensor.end:
        place += f", {memory.find_nearest_tensor(where).describe(where, nbytes)}"
    return unit.make_fault(
        kind, message.format(place), instruction, lanes[at], tensor.name, element=tensor.find_element_index(where)
    )


def is_strong(instruction: Instruction) -> bool:
    """Whether an access is strong in the PTX memory model: such accesses do not race."""
    return any(p in ("volatile", "relaxed", "acquire", "release") for p in instruction.parts)


def order_blocks(unit, lanes, address, acquires: bool = False, releases: bool = False) -> None:
    """A release at an address orders what a block did before the blocks that acquire there."""
    order = unit.wave.memory.order
    for block, where in dict.fromkeys(zip(unit.grid_block[lanes].tolist(), address.tolist(), strict=True)):
        if acquires:
            order.acquire(where, block)
        if releases:
            order.release(where, block)


def load_global(unit, pc: int, instruction: Instruction, lanes, address, width: int, count: int) -> np.ndarray:
    return read_global(unit, pc, instruction, lanes, address, width, count, width * count, "reads")


def read_global(unit, pc, instruction, lanes, address, width, count, align: int, does: str) -> np.ndarray:
    """A read by a load or a copy: (n, count) elements; zeros outside of memory, if the caller lets that pass."""
    nbytes, memory = width * count, unit.wave.memory
    inside = check_global_access(unit, instruction, lanes, address, nbytes, align, does, partly=True)
    if inside is not None:
        found = np.zeros((len(lanes), count), UNSIGNED[width])
        if inside.any():
            rest = lanes[inside], address[inside]
            found[inside] = read_global(unit, pc, instruction, *rest, width, count, align, does)
        return found
    unit.wave.counts.count_global_access(pc, lanes >> 5, address, nbytes)
    if is_strong(instruction):
        if "acquire" in instruction.parts:
            order_blocks(unit, lanes, address, acquires=True)
    elif race := memory.check_read(address, nbytes, unit.grid_block[lanes]):
        report_race(unit, instruction, lanes, address, nbytes, race, does, "wrote")
    report_unwritten(unit, instruction, lanes, address, nbytes, does)
    return memory.load(address, width, count)


def store_global(unit, pc: int, instruction: Instruction, lanes, address, values: np.ndarray) -> None:
    nbytes = values.dtype.itemsize * values.shape[1]
    inside = check_global_access(unit, instruction, lanes, address, nbytes, nbytes, "writes", partly=True)
    if inside is not None:
        if inside.any():
            store_global(unit, pc, instruction, lanes[inside], address[inside], values[inside])
        return
    unit.wave.counts.count_global_access(pc, lanes >> 5, address, nbytes)
    if is_strong(instruction):
        if "release" in instruction.parts:
            order_blocks(unit, lanes, address, releases=True)
        unit.wave.memory.changes += 1
    elif race := unit.wave.memory.check_write(address, values, unit.grid_block[lanes]):
        report_race(unit, instruction, lanes, address, nbytes, race, "writes", "read or wrote")
    unit.wave.memory.store(address, values)


def report_race(unit, instruction, lanes, address, nbytes, race, does, did) -> None:
    at, other = race
    message = f"{does} {nbytes} bytes {{}}, which block {unit.wave.find_block_coordinates(other)} {did}"
    unit.wave.judge(make_global_fault(unit, "global race", message, instruction, lanes, address, at, nbytes))


def report_unwritten(unit, instruction, lanes, address, nbytes, does, kind: str = "uninitialised") -> None:
    at = unit.wave.memory.find_unwritten_read(address, nbytes, instruction.used_bytes)
    if at is not None:
        message = f"{does} {nbytes} bytes {{}}, which was never written"
        unit.wave.judge(make_global_fault(unit, kind, message, instruction, lanes, address, at, nbytes))


def check_shared_bounds(unit, instruction, lanes, address, nbytes, align) -> None:
    problem = unit.wave.shared.check_bounds(address, nbytes, align)
    if problem:
        raise unit.make_shared_fault(problem, instruction, lanes)


def load_shared(unit, pc, instruction, lanes, address, width: int, count: int) -> np.ndarray:
    shared, block, nbytes = unit.wave.shared, unit.block[lanes], width * count
    check_shared_bounds(unit, instruction, lanes, address, nbytes, nbytes)
    unit.wave.counts.count_shared_access(pc, lanes >> 5, unit.lane[lanes], address, nbytes)
    if problem := shared.check_read(block, address, nbytes, unit.thread[lanes], used_bytes=instruction.used_bytes):
        unit.report(problem, instruction, lanes)
    return shared.load(block, address, width, count)


def store_shared(unit, pc, instruction, lanes, address, values: np.ndarray) -> None:
    shared, block, nbytes = unit.wave.shared, unit.block[lanes], values.dtype.itemsize * values.shape[1]
    check_shared_bounds(unit, instruction, lanes, address, nbytes, nbytes)
    unit.wave.counts.count_shared_access(pc, lanes >> 5, unit.lane[lanes], address, nbytes)
    close = functools.partial(is_rounding_difference, unit.program, instruction.operands[1])
    if problem := shared.check_write(block, address, values, unit.thread[lanes], close):
        unit.report(problem, instruction, lanes)
    shared.store(block, address, values)


def locate_local(unit, instruction, lanes, address, nbytes) -> tuple:
    size = unit.program.local_bytes
    bad = (address < 0) | (address + nbytes > size) | (address % nbytes != 0)
    if bad.any():
        at = int(np.argmax(bad))
        message = f"{nbytes} bytes at {address[at]} of {size} bytes of local memory"
        raise unit.make_fault("out of bounds", message, instruction, lanes[at], "local memory")
    return lanes[:, None], address[:, None] + np.arange(nbytes)


def load_local(unit, pc, instruction, lanes, address, width, count):
    taken = unit.local[locate_local(unit, instruction, lanes, address, width * count)]
    return np.ascontiguousarray(taken).view(UNSIGNED[width])


def store_local(unit, pc, instruction, lanes, address, values):
    where = locate_local(unit, instruction, lanes, address, values.dtype.itemsize * values.shape[1])
    unit.local[where] = np.ascontiguousarray(values).view(np.uint8)


def locate_param(unit, instruction, lanes, address, nbytes, first: int = 0) -> tuple:
    """first: the lowest address allowed."""
    size = unit.program.param_bytes
    bad = (address < first) | (address + nbytes > size)
    if bad.any():
        at = int(np.argmax(bad))
        message = f"{nbytes} bytes at {address[at]} of {size} bytes of parameters"
        raise unit.make_fault("out of bounds", message, instruction, lanes[at], "parameters")
    rows = lanes[:, None] if len(unit.params) > 1 else 0
    return rows, address[:, None] + np.arange(nbytes)


def load_param(unit, pc, instruction, lanes, address, width, count):
    taken = unit.params[locate_param(unit, instruction, lanes, address, width * count)]
    return np.ascontiguousarray(taken).view(UNSIGNED[width])


def store_param(unit, pc, instruction, lanes, address, values):
    """Only to parameters of calls: a kernel cannot write its own."""
    nbytes, own = values.dtype.itemsize * values.shape[1], unit.program.function.param_bytes
    where = locate_param(unit, instruction, lanes, address, nbytes, own)
    unit.params[where] = np.ascontiguousarray(values).view(np.uint8)


LOADS = {"global": load_global, "const": load_global, "shared": load_shared, "local": load_local, "param": load_param}
STORES = {"global": store_global, "shared": store_shared, "local": store_local, "param": store_param}
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}


def to_space(space: str, address: np.ndarray) -> np.ndarray:
    """Addresses in a state space, from generic ones or its own."""
    if space in ("global", "const"):
        return address.astype(np.uint64)
    window = WINDOWS[space]
    address = address.astype(np.int64)
    return np.where(address >= window, address - window, address)


def split_by_space(space: str, address: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(state space, mask of lanes): for generic addresses, each space whose window contains some."""
    if space != "generic":
        return [(space, np.ones(len(address), bool))]
    where = address.astype(np.uint64) >> np.uint64(60)
    kinds = {"global": 0, "shared": 1, "local": 2, "param": 4}
    return [(name, mask) for name, n in kinds.items() if (mask := where == n).any()]


def to_address(operand) -> Address:
    return operand if isinstance(operand, Address) else Address(operand, 0)


def scatter(target: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
    if len(lanes) == len(target):
        target[...] = values
    else:
        target[lanes] = values
