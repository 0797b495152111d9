"""Integer arithmetic, logic, comparisons and selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..frontend.types import DTYPES
from . import floats

FLOAT_TYPES = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")


class Operation(NamedTuple):
    compute: Callable
    operands: tuple[type, ...]
    results: tuple[type, ...]


def widen(dtype: type) -> type:
    return np.dtype(dtype.__name__.replace("16", "x").replace("32", "64").replace("x", "32")).type


def to_unsigned(dtype: type) -> type:
    return np.dtype(dtype.__name__ if dtype.__name__[0] == "u" else "u" + dtype.__name__).type


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product."""
    dtype = np.result_type(a, b).type
    size = np.dtype(dtype).itemsize * 8
    if size < 64:
        return ((a.astype(widen(dtype)) * b.astype(widen(dtype))) >> widen(dtype)(size)).astype(dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    ua, ub = np.asarray(a).astype(np.uint64), np.asarray(b).astype(np.uint64)
    al, ah, bl, bh = ua & low, ua >> half, ub & low, ub >> half
    middle = ah * bl + ((al * bl) >> half)
    high = ah * bh + (middle >> half) + ((al * bh + (middle & low)) >> half)
    if dtype == np.int64:
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.astype(dtype)


def build_mul(parts: tuple[str, ...]) -> Operation:
    """mul and mad: .lo, .hi or .wide."""
    dtype = DTYPES[parts[-1]]
    half = parts[1] if parts[1] in ("lo", "hi", "wide") else "lo"
    if half == "wide":
        out = widen(dtype)
        times = lambda a, b: np.multiply(a, b, dtype=out)  # noqa: E731
    else:
        out = dtype
        times = np.multiply if half == "lo" else multiply_high
    if parts[0] == "mul":
        return Operation(times, (dtype, dtype), (out,))
    return Operation(lambda a, b, c: times(a, b) + c, (dtype, dtype, out), (out,))


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounds toward zero. Division by zero gives all ones, as on the hardware (undefined in PTX)."""
    dtype = np.result_type(a, b).type
    kind = to_unsigned(dtype)
    zero = b == 0
    ua, ub = absolute(a, kind), absolute(np.where(zero, dtype(1), b), kind)
    q = ua // ub
    q = np.where((a < 0) ^ (b < 0), kind(0) - q, q)
    return np.where(zero, kind(0) - kind(1), q).astype(dtype)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    dtype = np.result_type(a, b).type
    return np.where(b == 0, a, a - divide(a, b) * b).astype(dtype)


def absolute(x: np.ndarray, kind: type) -> np.ndarray:
    x = np.asarray(x)
    bits = x.astype(kind)
    return np.where(x < 0, kind(0) - bits, bits)


def shift_left(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    """A shift by the width or more gives 0; the amount is 32 bits wide for every type."""
    dtype = np.asarray(a).dtype.type
    size = np.dtype(dtype).itemsize * 8
    return np.where(n >= size, dtype(0), a << np.minimum(n, size - 1).astype(dtype))


def shift_right(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    dtype = np.asarray(a).dtype.type
    size = np.dtype(dtype).itemsize * 8
    shifted = a >> np.minimum(n, size - 1).astype(dtype)
    return shifted if np.issubdtype(dtype, np.signedinteger) else np.where(n >= size, dtype(0), shifted)


def build_shift(parts: tuple[str, ...]) -> Operation:
    dtype = DTYPES[parts[-1]]
    return Operation(shift_left if parts[0] == "shl" else shift_right, (dtype, np.uint32), (dtype,))


def build_funnel_shift(parts: tuple[str, ...]) -> Operation:
    """shf: 32 of the 64 bits (high, low), shifted by n modulo 32 (.wrap) or by at most 32 (.clamp)."""
    left, wrap = parts[1] == "l", parts[2] == "wrap"

    def compute(low, high, n):
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low).astype(np.uint64)
        moved = (both << n) >> np.uint64(32) if left else both >> n
        return moved.astype(np.uint32)

    return Operation(compute, (np.uint32,) * 3, (np.uint32,))


def build_extract_field(parts: tuple[str, ...]) -> Operation:
    """bfe: `length` bits from `start`, the sign bit repeated for signed types."""
    dtype = DTYPES[parts[-1]]
    size = np.dtype(dtype).itemsize * 8

    def compute(a, start, length):
        start, length = start & np.uint32(255), length & np.uint32(255)
        bits = np.asarray(a).astype(to_unsigned(dtype))
        kept = np.minimum(length, np.maximum(size - start.astype(np.int64), 0).astype(np.uint32))
        mask = shift_left(to_unsigned(dtype)(1) + np.zeros_like(bits), kept) - to_unsigned(dtype)(1)
        taken = shift_right(bits, start) & mask
        if not np.issubdtype(dtype, np.signedinteger):
            return taken
        at = np.minimum(start + length - np.uint32(1), np.uint32(size - 1))
        negative = (shift_right(bits, at) & to_unsigned(dtype)(1)).astype(bool) & (length != 0)
        return np.where(negative, taken | ~mask, taken).astype(dtype)

    return Operation(compute, (dtype, np.uint32, np.uint32), (dtype,))


def build_insert_field(parts: tuple[str, ...]) -> Operation:
    """bfi: `length` bits of a into b at `start`."""
    dtype = DTYPES[parts[-1]]

    def compute(a, b, start, length):
        start, length = start & np.uint32(255), length & np.uint32(255)
        one = dtype(1) + np.zeros_like(a + b)
        mask = shift_left(shift_left(one, length) - dtype(1), start)
        return (b & ~mask) | (shift_left(a + np.zeros_like(one), start) & mask)

    return Operation(compute, (dtype, dtype, np.uint32, np.uint32), (dtype,))


def build_permute(parts: tuple[str, ...]) -> Operation:
    """prmt: each byte of the result is one of the eight of (b, a), or its replicated sign."""
    mode = parts[2] if len(parts) > 2 else None
    table = {
        "f4e": lambda s, i: (s + i) & 7, "b4e": lambda s, i: (s - i) & 7, "rc8": lambda s, i: s & 3,
        "ecl": lambda s, i: np.maximum(s & 3, i), "ecr": lambda s, i: np.minimum(s & 3, i),
        "rc16": lambda s, i: (s & 1) * 2 + (i & 1),
    }  # fmt: skip

    def compute(a, b, selector):
        both = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | np.asarray(a).astype(np.uint64)
        out = np.uint32(0)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            source = nibble & np.uint32(7) if mode is None else table[mode](selector.astype(np.int64), i)
            byte = (both >> (np.asarray(source).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
            if mode is None:
                sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
                byte = np.where(nibble & np.uint32(8), sign, byte)
            out = out | (byte << np.uint32(8 * i))
        return out

    return Operation(compute, (np.uint32,) * 3, (np.uint32,))


def build_lop3(parts: tuple[str, ...]) -> Operation:
    """lop3: a function of three bits, given by its truth table in the last operand, a constant."""
    dtype = np.uint32

    def compute(a, b, c, table):
        out = dtype(0)
        for i in range(8):
            if int(np.asarray(table).flat[0]) >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out

    return Operation(compute, (dtype,) * 4, (dtype,))


def count_bits(a: np.ndarray) -> np.ndarray:
    return np.bitwise_count(a).astype(np.uint32)


def count_leading_zeros(a: np.ndarray) -> np.ndarray:
    a = np.asarray(a)
    size = a.dtype.itemsize * 8
    for step in (1, 2, 4, 8, 16, 32)[: size.bit_length() - 1]:  # fill with ones below the highest one
        a = a | (a >> a.dtype.type(step))
    return np.uint32(size) - count_bits(a)


def reverse_bits(a: np.ndarray) -> np.ndarray:
    a = np.ascontiguousarray(a)
    flat = np.unpackbits(a.view(np.uint8).reshape(-1, a.dtype.itemsize), axis=1, bitorder="little")
    return np.packbits(flat[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(a.shape)


def build_bfind(parts: tuple[str, ...]) -> Operation:
    """bfind: the position of the most significant 1 (signed: of the bit that differs from the sign), -1 if none."""
    dtype = DTYPES[parts[-1]]
    size = np.dtype(dtype).itemsize * 8

    def compute(a):
        bits = np.where(a < 0, ~a, a).astype(to_unsigned(dtype))
        zeros = count_leading_zeros(bits)
        if "shiftamt" in parts:
            return np.where(zeros == size, np.uint32(0xFFFFFFFF), zeros)
        return np.uint32(size - 1) - zeros

    return Operation(compute, (dtype,), (np.uint32,))


def build_dp4a(parts: tuple[str, ...]) -> Operation:
    """dp4a: c plus the dot product of four bytes."""
    types = [np.int8 if kind == "s32" else np.uint8 for kind in parts[-2:]]

    def compute(a, b, c):
        lanes = np.broadcast(a, b).shape

        def octets(x, t):
            return np.ascontiguousarray(np.broadcast_to(x, lanes)).view(t).reshape(*lanes, 4)

        return (octets(a, types[0]).astype(np.int64) * octets(b, types[1]).astype(np.int64)).sum(-1).astype(
            np.uint32
        ) + c

    return Operation(compute, (np.uint32,) * 3, (np.uint32,))


def make_elementwise(function: Callable, count: int, out: type | None = None) -> Callable:
    def build(parts):
        dtype = DTYPES[parts[-1]]
        return Operation(function, (dtype,) * count, (out or dtype,))

    return build


def make_saturating(function: Callable) -> Callable:
    """add and sub, with .sat of s32."""

    def build(parts):
        dtype = DTYPES[parts[-1]]
        if "sat" not in parts:
            return Operation(function, (dtype, dtype), (dtype,))
        limits = np.iinfo(dtype)
        return Operation(
            lambda a, b: np.clip(function(np.int64(a), np.int64(b)), limits.min, limits.max).astype(dtype),
            (dtype, dtype),
            (dtype,),
        )

    return build


def make_min_max(function: Callable) -> Callable:
    def build(parts):
        dtype = DTYPES[parts[-1]]
        if "relu" not in parts:
            return Operation(function, (dtype, dtype), (dtype,))
        return Operation(lambda a, b: np.maximum(function(a, b), dtype(0)), (dtype, dtype), (dtype,))

    return build


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def choose_comparison(name: str, kind: str) -> Callable:
    """With a NaN the ordered comparisons eq … ge are false, the unordered equ … geu true."""
    if name in ("num", "nan"):
        return (lambda a, b: np.isnan(a) | np.isnan(b)) if name == "nan" else lambda a, b: ~(np.isnan(a) | np.isnan(b))
    plain = COMPARISONS.get(name) or COMPARISONS.get(name[:-1])
    if kind == "bf16":
        inner, plain = plain, lambda a, b: inner(floats.bf16_to_f32(a), floats.bf16_to_f32(b))
    if kind in FLOAT_TYPES and name.endswith("u") and name != "u":
        return lambda a, b: plain(a, b) | np.isnan(a) | np.isnan(b)
    if kind in FLOAT_TYPES and name == "ne":
        return lambda a, b: plain(a, b) & ~(np.isnan(a) | np.isnan(b))
    return plain


COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def build_setp(parts: tuple[str, ...]) -> Operation:
    """setp: compare(a, b), combined with c by .and/.or/.xor; the second result uses the negated comparison."""
    kind = parts[-1]
    dtype = DTYPES[kind]
    compare = choose_comparison(parts[1], kind)
    combine = COMBINE.get(parts[2])
    if combine is None:
        return Operation(lambda a, b: (compare(a, b), ~compare(a, b)), (dtype, dtype), (np.bool_, np.bool_))
    return Operation(
        lambda a, b, c: (combine(compare(a, b), c), combine(~compare(a, b), c)),
        (dtype, dtype, np.bool_), (np.bool_, np.bool_),
    )  # fmt: skip


def build_set(parts: tuple[str, ...]) -> Operation:
    """set: all ones, or 1.0, where the comparison is true."""
    if parts[-1].endswith("x2"):
        return build_set_pair(parts)
    kind, out = DTYPES[parts[-1]], parts[-2]
    compare = choose_comparison(parts[1], parts[-1])
    true = np.float32(1) if out == "f32" else DTYPES[out](np.iinfo(DTYPES[out]).max if out[0] == "u" else -1)
    return Operation(lambda a, b: np.where(compare(a, b), true, DTYPES[out](0)), (kind, kind), (DTYPES[out],))


HALF_ONES = {"f16": 0x3C00, "bf16": 0x3F80}


def build_set_pair(parts: tuple[str, ...]) -> Operation:
    """set of packed halves: 1.0, or all ones for an integer result, in each half where the comparison is true."""
    kind, out = parts[-1].removesuffix("x2"), parts[-2].removesuffix("x2")
    compare, true = choose_comparison(parts[1], "f64"), HALF_ONES.get(out, 0xFFFF)

    def compute(a, b):
        x, y = (floats.decode(np.atleast_1d(v).astype(np.uint32).view(np.uint16), kind) for v in (a, b))
        return np.where(compare(*np.broadcast_arrays(x, y)), np.uint16(true), np.uint16(0)).view(np.uint32)

    return Operation(compute, (np.uint32, np.uint32), (np.uint32,))


def build_selp(parts: tuple[str, ...]) -> Operation:
    dtype = DTYPES[parts[-1]]
    return Operation(lambda a, b, p: np.where(p, a, b), (dtype, dtype, np.bool_), (dtype,))


def invert(a: np.ndarray) -> np.ndarray:
    return np.logical_not(a) if np.asarray(a).dtype == np.bool_ else ~a


def make_logical(ufunc: Callable, on_predicates: Callable) -> Callable:
    def build(parts):
        dtype = DTYPES[parts[-1]]
        return Operation(on_predicates if dtype is np.bool_ else ufunc, (dtype, dtype), (dtype,))

    return build


INTEGER_OPERATIONS = {
    "add": make_saturating(np.add), "sub": make_saturating(np.subtract), "mul": build_mul, "mad": build_mul,
    "div": make_elementwise(divide, 2), "rem": make_elementwise(remainder, 2), "abs": make_elementwise(np.abs, 1),
    "neg": make_elementwise(lambda a: np.asarray(a).dtype.type(0) - a, 1),
    "min": make_min_max(np.minimum), "max": make_min_max(np.maximum),
    "and": make_logical(np.bitwise_and, np.logical_and), "or": make_logical(np.bitwise_or, np.logical_or),
    "xor": make_logical(np.bitwise_xor, np.logical_xor), "not": make_elementwise(invert, 1),
    "cnot": make_elementwise(lambda a: (a == 0).astype(np.asarray(a).dtype), 1),
    "shl": build_shift, "shr": build_shift, "shf": build_funnel_shift,
    "bfe": build_extract_field, "bfi": build_insert_field, "prmt": build_permute, "lop3": build_lop3,
    "popc": make_elementwise(count_bits, 1, np.uint32), "clz": make_elementwise(count_leading_zeros, 1, np.uint32),
    "brev": make_elementwise(reverse_bits, 1), "bfind": build_bfind,
    "sad": make_elementwise(lambda a, b, c: c + (np.maximum(a, b) - np.minimum(a, b)), 3), "dp4a": build_dp4a,
    "setp": build_setp, "set": build_set, "selp": build_selp,
    "slct": lambda parts: Operation(
        lambda a, b, c: np.where(c >= 0, a, b), (DTYPES[parts[1]],) * 2 + (DTYPES[parts[2]],), (DTYPES[parts[1]],)
    ),
}  # fmt: skip
