"""wgmma: asynchronous matrix products of a warp group, with operands in shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..frontend.program import Program, Step, find_results, implements, write_masked
from ..frontend.syntax import Group, Immediate, Instruction, Register
from .mma import ELEMENT_TYPES, Fragment, decode_elements, encode_sums, locate_accumulator, locate_fragment, parse_shape


@dataclass
class PendingWgmma:
    """One wgmma in flight: its registers, its lanes, and the group of each lane."""

    registers: frozenset[str]  # of D: neither read nor written until the wait
    inputs: frozenset[str]  # of A: not written until the wait
    lanes: np.ndarray  # mask
    group: np.ndarray


class SharedOperand:
    """A or B in shared memory: the address of each element, by a 64-bit matrix descriptor.

    Bits 0-13: address / 16; 16-29: leading byte offset / 16; 32-45: stride byte offset / 16; 49-51: base offset; 62-63:
    swizzle, 0 none, 1, 2, 3: 128, 64, 32 bytes. With rows along M or N and columns along K:
    K-major: groups of 8 rows are `stride` apart; a row of a group is as long as the swizzle, or 16 bytes without one,
    and the next 16 bytes of a row are `leading` away. MN-major: rows and columns are exchanged: groups of 8 columns are
    `stride` apart, the next swizzle width of rows is `leading` away (without a swizzle the two offsets are swapped).
    """

    def __init__(self, rows: int, columns: int, itemsize: int, transposed: bool):
        self.itemsize, self.transposed = itemsize, transposed
        r, c = np.indices((rows, columns))
        self.long, self.short = (r, c) if transposed else (c, r)  # contiguous index, strided index
        self.layouts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, descriptor: int) -> tuple[np.ndarray, np.ndarray]:
        """(`offsets`, the addresses of the 16-byte chunks that they touch); cached, since loops reuse descriptors."""
        if descriptor not in self.layouts:
            offsets = self.find_offsets(descriptor)
            self.layouts[descriptor] = offsets, np.unique(offsets // 16 * 16)
        return self.layouts[descriptor]

    def find_offsets(self, descriptor: int) -> np.ndarray:
        """The byte address of each element, (rows, columns)."""
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


@implements("wgmma")
def wgmma(program: Program, instruction: Instruction) -> Step | None:
    verb = instruction.parts[1]
    if verb == "fence":
        return lambda unit, mask: None
    if verb == "commit_group":
        return commit_group
    if verb == "wait_group":
        allowed = instruction.operands[0].bits
        return lambda unit, mask: wait_group(unit, mask, allowed)
    return build_mma_async(program, instruction) if verb == "mma_async" else None


def build_mma_async(program: Program, instruction: Instruction) -> Step:
    """D = A B + D of a warp group: 64 rows, 16 to a warp. A is in registers or shared memory, B in shared memory."""
    program.check_pending_use = check_pending_use
    shape = parse_shape(instruction)
    d_kind, a_kind, b_kind = instruction.parts[-3:]
    d, a, b, scale_d, *rest = instruction.operands
    in_registers = isinstance(a, Group)
    flags = [x.bits for x in rest]
    scale_a, scale_b = flags[:2] if len(flags) >= 2 else (1, 1)
    transposed = flags[2:]  # 16-bit types: whether A (in shared memory) and B are MN-major
    size = np.dtype(ELEMENT_TYPES[a_kind]).itemsize
    right = SharedOperand(shape.n, shape.k, size, bool(transposed and transposed[-1]))
    left = None if in_registers else SharedOperand(64, shape.k, size, bool(transposed and transposed[0]))
    place = locate_accumulator(shape.n, d_kind == "f16")
    result = Fragment(program, d, d_kind, place, (16, shape.n))
    a_fragment = (
        Fragment(program, a, a_kind, locate_fragment(len(a.items), a_kind, True), (16, shape.k))
        if in_registers
        else None
    )
    descriptors = [
        None if in_registers else program.make_source_slot(a, np.uint64),
        program.make_source_slot(b, np.uint64),
    ]
    use_d = program.make_source_slot(scale_d, np.bool_) if isinstance(scale_d, Register) else None
    always_use_d = isinstance(scale_d, Immediate) and scale_d.bits != 0
    registers = frozenset(x.name for x in d.items)
    inputs = frozenset(x.name for x in a.items) if in_registers else frozenset()
    pc, flops = len(program.steps), 2 * 64 * shape.n * shape.k

    def run(unit, mask):
        groups = find_warp_groups(unit, mask, instruction)
        warps = (groups[:, None] * 4 + np.arange(4)).ravel()
        y = read_shared_matrix(unit, pc, instruction, groups, right, descriptors[1], ELEMENT_TYPES[b_kind], b_kind)
        if in_registers:
            x = a_fragment.read_matrix(unit, warps, ELEMENT_TYPES[a_kind], a_kind).reshape(len(groups), 64, shape.k)
        else:
            x = read_shared_matrix(unit, pc, instruction, groups, left, descriptors[0], ELEMENT_TYPES[a_kind], a_kind)
        total = scale_a * scale_b * (x @ y.swapaxes(1, 2)).reshape(len(warps), 16, shape.n)
        if use_d is not None:
            keep = np.broadcast_to(unit.slots[use_d], unit.count)[warps * 32]
        else:
            keep = np.full(len(warps), always_use_d)
        if keep.any():
            total = np.where(keep[:, None, None], total + result.read_sums(unit, warps), total)
        result.store(unit, warps, encode_sums(total, d_kind, False))
        active = np.ones(unit.count, bool) if mask is None else mask
        unit.wgmmas.append(PendingWgmma(registers, inputs, active.copy(), unit.wgmma_groups.copy()))
        unit.wave.counts.flops[pc] += flops * len(groups)

    return run


def find_warp_groups(unit, mask, instruction: Instruction) -> np.ndarray:
    """Indices of the active warp groups; all of their threads must be active."""
    if mask is None:
        return np.arange(unit.count // 128)
    rows = mask.reshape(-1, 128)
    partial = rows.any(1) & ~rows.all(1)
    if partial.any():
        message = "not all threads of the warp group reach this wgmma"
        raise unit.make_fault("barrier", message, instruction, int(np.argmax(partial)) * 128)
    return np.flatnonzero(rows.any(1))


def read_shared_matrix(unit, pc, instruction, groups, operand: SharedOperand, slot, dtype, kind) -> np.ndarray:
    """(groups, rows, columns) as float64; the first lane of a warp group counts as the reader."""
    lanes = groups * 128
    descriptors = np.broadcast_to(unit.slots[slot], unit.count)[lanes]
    distinct, which = np.unique(descriptors, return_inverse=True)
    placed = [operand.locate(int(x)) for x in distinct]
    offsets, pieces = (np.stack(each)[which] for each in zip(*placed, strict=True))
    shared, block = unit.wave.shared, unit.block[lanes]
    where, owner = pieces.ravel(), np.repeat(lanes, pieces.shape[1])
    if problem := shared.check_bounds(where, 16, 16):
        raise unit.make_shared_fault(problem, instruction, owner)
    if problem := shared.check_read(unit.block[owner], where, 16, unit.thread[owner], async_proxy=True):
        unit.report(problem, instruction, owner)
    grains = shared.grain_indices(unit.block[owner], where, 16).reshape(len(groups), -1)
    shared.record_wgmma_reads(grains, unit.warps.start, unit.wgmma_groups[lanes], pc)
    itemsize = np.dtype(dtype).itemsize
    view = shared.data.view(dtype)
    bits = view[(block[:, None, None] * shared.stride + offsets) // itemsize]
    unit.wave.counts.shared_requests[pc] += len(groups)
    unit.wave.counts.shared_wavefronts[pc] += pieces.size * 16 // 128  # without bank conflicts, by the swizzle
    unit.wave.counts.shared_ideal[pc] += pieces.size * 16 // 128
    return decode_elements(bits, kind)


def commit_group(unit, mask) -> None:
    write_masked(unit.wgmma_groups, unit.wgmma_groups + 1, mask)


def wait_group(unit, mask, allowed: int) -> None:
    """Completes all but the last `allowed` groups: their registers may be read, their operands overwritten."""
    active = np.ones(unit.count, bool) if mask is None else mask
    complete_groups(unit, active, unit.wgmma_groups - allowed)


def complete_groups(unit, lanes: np.ndarray, count: np.ndarray) -> None:
    """Completes the first `count` groups of these lanes."""
    for pending in unit.wgmmas:
        pending.lanes = pending.lanes & ~(lanes & (pending.group < count))
    unit.wgmmas = [pending for pending in unit.wgmmas if pending.lanes.any()]
    rows = np.flatnonzero(lanes.reshape(-1, 32).any(1)) * 32
    unit.wave.shared.complete_wgmmas(unit.block[rows], unit.warp[rows], count[rows])


def check_pending_use(unit, instruction: Instruction, names: frozenset[str], mask) -> None:
    """A fault if an instruction other than wgmma uses a register of a wgmma in flight. The assembler inserts a wait
    there; if the caller lets the fault pass, so do the lanes here."""
    if instruction.parts[0] == "wgmma":
        return
    for pending in list(unit.wgmmas):
        taken = names & pending.registers or (find_results(instruction) & pending.inputs)
        lanes = pending.lanes if mask is None else pending.lanes & mask
        if taken and lanes.any():
            message = f"uses {min(taken)}, a register of a wgmma that has not been waited for"
            unit.wave.judge(unit.make_fault("pending wgmma", message, instruction, int(np.argmax(lanes))))
            complete_groups(unit, lanes, pending.group + 1)
