"""Tensor maps: the descriptors of bulk tensor copies (TMA), encoded by the host or written by the kernel."""

from __future__ import annotations

from typing import NamedTuple


class TensorMap(NamedTuple):
    """The content of the 128 bytes of a CUtensorMap, whose layout here is this machine's own (`FIELDS`). Innermost
    dimension first, as in CUDA."""

    base: int
    sizes: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # bytes; the first is the element's size
    box: tuple[int, ...]  # elements
    swizzle: int  # 0: none, 1, 2, 3: 32, 64, 128 bytes
    fill: int  # 1: NaN outside the tensor
    itemsize: int


MAP_BYTES = 128
# The fields of a tensor map by their names in tensormap.replace: (offset, size of an entry) in bytes.
FIELDS = {
    "global_address": (0, 8), "rank": (8, 4), "elemtype": (12, 4), "global_dim": (16, 4), "global_stride": (40, 8),
    "box_dim": (72, 4), "element_stride": (92, 4), "interleave_layout": (112, 4), "swizzle_mode": (116, 4),
    "fill_mode": (120, 4), "swizzle_atomicity": (124, 4),
}  # fmt: skip
# Element size by elemtype: u8 u16 u32 s32 u64 s64 f16 f32 f32.ftz f64 bf16 tf32 tf32.ftz.
TYPE_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)


def encode_map(base: int, element: int, sizes, strides, box, swizzle: int, fill: int) -> bytes:
    """sizes, strides (in elements) and box are outermost first, as in Triton."""
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
    def get_field(name, at=0):
        start, size = FIELDS[name]
        return int.from_bytes(data[start + at * size : start + (at + 1) * size], "little")

    rank, itemsize = get_field("rank") + 1, TYPE_BYTES[get_field("elemtype")]
    return TensorMap(
        get_field("global_address"), tuple(get_field("global_dim", i) for i in range(rank)),
        (itemsize, *(get_field("global_stride", i) for i in range(rank - 1))),
        tuple(get_field("box_dim", i) for i in range(rank)), get_field("swizzle_mode"), get_field("fill_mode"),
        itemsize,
    )  # fmt: skip
