"""Tensor maps: what bulk copies know of a tensor, made on the host or field by field on the device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .loads import global_access, in_space, shared_place
from .program import PARAM_WINDOW, Program, Step, builds
from .syntax import Instruction
from .warps import constant_bits


class TensorMap(NamedTuple):
    """What the 128 bytes of a CUtensorMap say, in this machine's own layout of them (`FIELDS`). Innermost
    dimension first, as in CUDA."""

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
    """tensormap.replace writes a field of a map in shared memory, tensormap.cp_fenceproxy copies it to global."""
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
            unit.report(problem, instruction, lanes)
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
