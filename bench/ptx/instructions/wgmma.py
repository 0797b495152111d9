"""wgmma: products of a warp group with operands in shared memory, asynchronous until they are waited for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..frontend.program import (
    Program,
    Step,
    builds,
    put,
    results_of,
)
from ..frontend.syntax import Group, Immediate, Instruction, Register
from .mma import WORDS, Fragment, accumulator, finish, fragment, numbers, shape_of

# ------------------------------------------------------------------------------------------------ wgmma


@dataclass
class Product:
    """One wgmma of some lanes: the registers it works on, and each lane's group."""

    registers: frozenset[str]  # of the result
    inputs: frozenset[str]  # registers of A: they may be read, not written
    lanes: np.ndarray  # mask
    group: np.ndarray


class Operand:
    """A or B in shared memory: where a 64-bit descriptor puts each element.

    Bits 0-13: address / 16; 16-29: leading byte offset / 16; 32-45: stride byte offset / 16; 49-51: base offset; 62-63:
    swizzle, 0 none, 1, 2, 3: 128, 64, 32 bytes. With rows of the M or N dimension and columns of K:
    K-major: groups of 8 rows lie `stride` apart; a row of a group is as long as the swizzle; without one, 16 bytes, and
    the next 16 bytes of a row lie `leading` away. MN-major: the same with rows and columns exchanged: groups of 8
    columns lie `stride` apart, the next swizzle-width of rows `leading` away (without a swizzle the two
    offsets change places).
    """

    def __init__(self, rows: int, columns: int, itemsize: int, transposed: bool):
        self.itemsize, self.transposed = itemsize, transposed
        r, c = np.indices((rows, columns))
        self.long, self.short = (r, c) if transposed else (c, r)  # along a line of memory, across lines
        self.places: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def place(self, descriptor: int) -> tuple[np.ndarray, np.ndarray]:
        """(`offsets`, the addresses of the 16-byte pieces that they touch); kept, for loops come to the same few."""
        if descriptor not in self.places:
            offsets = self.offsets(descriptor)
            self.places[descriptor] = offsets, np.unique(offsets // 16 * 16)
        return self.places[descriptor]

    def offsets(self, descriptor: int) -> np.ndarray:
        """Byte address of each element, (rows, columns)."""
        start = (descriptor & 0x3FFF) << 4
        leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        mode = descriptor >> 62 & 3
        if descriptor >> 49 & 7:
            raise ValueError("a descriptor with a base offset")
        bits = {0: 0, 1: 3, 2: 2, 3: 1}[mode]
        width = 16 << bits
        along = self.long * self.itemsize
        if mode == 0 and self.transposed:
            leading, stride = stride, leading
        address = start + along // width * leading + along % width + self.short // 8 * stride + self.short % 8 * width
        return address ^ ((address >> 7 & ((1 << bits) - 1)) << 4)


@builds("wgmma")
def wgmma(program: Program, instruction: Instruction) -> Step | None:
    verb = instruction.parts[1]
    if verb == "fence":
        return lambda unit, mask: None
    if verb == "commit_group":
        return commit
    if verb == "wait_group":
        allowed = instruction.operands[0].bits
        return lambda unit, mask: wait(unit, mask, allowed)
    return wgmma_product(program, instruction) if verb == "mma_async" else None


def wgmma_product(program: Program, instruction: Instruction) -> Step:
    """D = A B + D of four warps: 64 rows, 16 to a warp. A in registers or in shared memory, B in shared memory."""
    program.pending_use = pending_use
    shape = shape_of(instruction)
    d_kind, a_kind, b_kind = instruction.parts[-3:]
    d, a, b, scale_d, *rest = instruction.operands
    in_registers = isinstance(a, Group)
    flags = [x.bits for x in rest]
    scale_a, scale_b = flags[:2] if len(flags) >= 2 else (1, 1)
    turned = flags[2:]  # for 16-bit types: A (where it is in shared memory) and B are MN-major
    size = np.dtype(WORDS[a_kind]).itemsize
    right = Operand(shape.n, shape.k, size, bool(turned and turned[-1]))
    left = None if in_registers else Operand(64, shape.k, size, bool(turned and turned[0]))
    place = accumulator(shape.n, d_kind == "f16")
    result = Fragment(program, d, d_kind, place, (16, shape.n))
    register_a = (
        Fragment(program, a, a_kind, fragment(len(a.items), a_kind, True), (16, shape.k)) if in_registers else None
    )
    descriptors = [None if in_registers else program.read(a, np.uint64), program.read(b, np.uint64)]
    keeps = program.read(scale_d, np.bool_) if isinstance(scale_d, Register) else None
    keeps_always = isinstance(scale_d, Immediate) and scale_d.bits != 0
    registers = frozenset(x.name for x in d.items)
    inputs = frozenset(x.name for x in a.items) if in_registers else frozenset()
    pc, flops = len(program.steps), 2 * 64 * shape.n * shape.k

    def run(unit, mask):
        groups = warp_groups(unit, mask, instruction)
        warps = (groups[:, None] * 4 + np.arange(4)).ravel()
        y = shared_matrix(unit, pc, instruction, groups, right, descriptors[1], WORDS[b_kind], b_kind)
        if in_registers:
            x = register_a.matrix(unit, warps, WORDS[a_kind], a_kind).reshape(len(groups), 64, shape.k)
        else:
            x = shared_matrix(unit, pc, instruction, groups, left, descriptors[0], WORDS[a_kind], a_kind)
        total = scale_a * scale_b * (x @ y.swapaxes(1, 2)).reshape(len(warps), 16, shape.n)
        if keeps is not None:
            keep = np.broadcast_to(unit.slots[keeps], unit.count)[warps * 32]
        else:
            keep = np.full(len(warps), keeps_always)
        if keep.any():
            total = np.where(keep[:, None, None], total + result.sums(unit, warps), total)
        result.store(unit, warps, finish(total, d_kind, False))
        active = np.ones(unit.count, bool) if mask is None else mask
        unit.products.append(Product(registers, inputs, active.copy(), unit.committed.copy()))
        unit.wave.counts.flops[pc] += flops * len(groups)

    return run


def warp_groups(unit, mask, instruction: Instruction) -> np.ndarray:
    """Numbers of the warp groups, four warps each, that are there; all four must be."""
    if mask is None:
        return np.arange(unit.count // 128)
    rows = mask.reshape(-1, 128)
    partial = rows.any(1) & ~rows.all(1)
    if partial.any():
        message = "a wgmma that not all lanes of its four warps have reached"
        raise unit.fault("barrier", message, instruction, int(np.argmax(partial)) * 128)
    return np.flatnonzero(rows.any(1))


def shared_matrix(unit, pc, instruction, groups, operand: Operand, slot, dtype, kind) -> np.ndarray:
    """(groups, rows, columns) as float64: the warp group's first lane stands for its reads."""
    lanes = groups * 128
    descriptors = np.broadcast_to(unit.slots[slot], unit.count)[lanes]
    distinct, which = np.unique(descriptors, return_inverse=True)
    placed = [operand.place(int(x)) for x in distinct]
    offsets, pieces = (np.stack(each)[which] for each in zip(*placed, strict=True))
    shared, block = unit.wave.shared, unit.block[lanes]
    where, owner = pieces.ravel(), np.repeat(lanes, pieces.shape[1])
    if problem := shared.place(where, 16, 16):
        raise unit.refuse(problem, instruction, owner)
    if problem := shared.check_read(unit.block[owner], where, 16, unit.thread[owner], agent=True):
        unit.report(problem, instruction, owner)
    grains = shared.grains(unit.block[owner], where, 16).reshape(len(groups), -1)
    shared.product_reads(grains, unit.warps.start, unit.committed[lanes], pc)
    itemsize = np.dtype(dtype).itemsize
    view = shared.data.view(dtype)
    bits = view[(block[:, None, None] * shared.stride + offsets) // itemsize]
    unit.wave.counts.shared_requests[pc] += len(groups)
    unit.wave.counts.shared_wavefronts[pc] += pieces.size * 16 // 128  # the swizzles leave no bank conflict
    unit.wave.counts.shared_ideal[pc] += pieces.size * 16 // 128
    return numbers(bits, kind)


def commit(unit, mask) -> None:
    put(unit.committed, unit.committed + 1, mask)


def wait(unit, mask, allowed: int) -> None:
    """All but the last `allowed` groups are done: their registers may be read, their operands overwritten."""
    active = np.ones(unit.count, bool) if mask is None else mask
    wait_for(unit, active, unit.committed - allowed)


def wait_for(unit, lanes: np.ndarray, count: np.ndarray) -> None:
    """Of these lanes' groups the first `count` are done."""
    for product in unit.products:
        product.lanes = product.lanes & ~(lanes & (product.group < count))
    unit.products = [product for product in unit.products if product.lanes.any()]
    rows = np.flatnonzero(lanes.reshape(-1, 32).any(1)) * 32
    unit.wave.shared.products_done(unit.block[rows], unit.warp[rows], count[rows])


def pending_use(unit, instruction: Instruction, names: frozenset[str], mask) -> None:
    """Before an instruction that is not a wgmma uses a register of one that has not been waited for. The assembler sees
    that too, and makes it wait: so do the lanes here, if that is to pass."""
    if instruction.parts[0] == "wgmma":
        return
    for product in list(unit.products):
        taken = names & product.registers or (results_of(instruction) & product.inputs)
        lanes = product.lanes if mask is None else product.lanes & mask
        if taken and lanes.any():
            message = f"uses {min(taken)}, which a wgmma works on: it has not been waited for"
            unit.wave.judge(unit.fault("pending wgmma", message, instruction, int(np.argmax(lanes))))
            wait_for(unit, lanes, product.group + 1)
