"""cvt: conversions between number formats, in every form that compilers emit. PTX ISA 8.7, 9.7.9.21."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import floats

INTEGER_TYPES = {
    "s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32,
    "s64": np.int64, "u64": np.uint64,
}  # fmt: skip
BIT_TYPES = {
    "f64": np.uint64, "f32": np.uint32, "tf32": np.uint32, "f16": np.uint16, "bf16": np.uint16, "f16x2": np.uint32,
    "bf16x2": np.uint32, "e4m3x2": np.uint16, "e5m2x2": np.uint16,
}  # fmt: skip


def build_conversion(parts: tuple[str, ...]) -> tuple[Callable, tuple, tuple]:
    """(function, operand dtypes, result dtypes) of cvt{.rounding}{.ftz}{.sat…}.to.from."""
    to, source = parts[-2], parts[-1]
    mode = next((p for p in parts if p in ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")), None)
    if to in INTEGER_TYPES and source in INTEGER_TYPES:
        return build_integer_conversion(INTEGER_TYPES[source], INTEGER_TYPES[to], "sat" in parts)
    if to in INTEGER_TYPES:
        return build_float_to_integer(source, INTEGER_TYPES[to], mode or "rzi", "ftz" in parts)
    if source in INTEGER_TYPES:
        kind = INTEGER_TYPES[source]
        if to == "f64":
            return lambda x: np.asarray(x).astype(np.float64).view(np.uint64), (kind,), (np.uint64,)
        return lambda x: floats.encode(decode_integer(x), to, mode or "rn"), (kind,), (BIT_TYPES[to],)
    if to.endswith("x2") and source.endswith("x2"):
        return build_pair_conversion(source.removesuffix("x2"), to.removesuffix("x2"), parts)
    if to.endswith("x2"):
        return build_pack(source, to.removesuffix("x2"), parts, mode)
    one = build_float_conversion(source, to, parts, mode)
    return one, (BIT_TYPES[source],), (BIT_TYPES[to],)


def decode_integer(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    return floats.round_integer_to_odd(np.atleast_1d(x)) if x.dtype.itemsize == 8 else x.astype(np.float64)


def build_integer_conversion(source: type, to: type, saturate: bool) -> tuple[Callable, tuple, tuple]:
    if not saturate:
        return lambda x: np.asarray(x).astype(to), (source,), (to,)
    low, high = np.iinfo(to).min, np.iinfo(to).max
    limits = np.iinfo(source)
    low, high = source(max(low, limits.min)), source(min(high, limits.max))
    return lambda x: np.clip(x, low, high).astype(to), (source,), (to,)


def build_float_to_integer(source: str, to: type, mode: str, ftz: bool) -> tuple[Callable, tuple, tuple]:
    """Out of range gives the nearest limit, NaN gives 0 (for 64 bits 1 << 63)."""
    low, high = np.iinfo(to).min, np.iinfo(to).max

    def compute(bits):
        x = floats.decode(np.atleast_1d(bits), source)
        if ftz and source == "f32":
            x = np.where(np.abs(x) < 2.0**-126, 0, x)
        whole = floats.round_to_integer(x, mode)
        inside = (whole >= float(low)) & (whole < float(high) + 1)
        exact = np.where(inside, whole, 0).astype(to)
        out = np.where(inside, exact, np.where(whole > 0, to(high), to(low)))
        nan = to(0) if np.dtype(to).itemsize < 8 else to(1 << 63) if low == 0 else to(low)
        return np.where(np.isnan(x), nan, out).astype(to)

    return compute, (BIT_TYPES[source],), (to,)


def build_float_conversion(source: str, to: str, parts: tuple[str, ...], mode: str | None) -> Callable:
    if (source, to, mode) == ("f32", "bf16", "rn") and len(parts) == 4:
        return lambda bits: floats.f32_to_bf16(np.asarray(bits).view(np.float32))
    if (source, to, mode) == ("f32", "f16", "rn") and len(parts) == 4:
        return lambda bits: floats.f32_to_f16(np.asarray(bits).view(np.float32))
    if (source, to) == ("bf16", "f32"):
        return lambda bits: floats.bf16_to_f32(np.asarray(bits)).view(np.uint32)
    if (source, to) == ("f32", "f64"):
        return lambda bits: np.asarray(bits).view(np.float32).astype(np.float64).view(np.uint64)

    def compute(bits):
        x = floats.decode(np.atleast_1d(bits), source)
        if "ftz" in parts and source == "f32":
            x = np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x)
        if mode and mode.endswith("i"):  # to an integer of the same type
            x = floats.round_to_integer(x, mode)
        return round_and_encode(x, to, parts, "rn" if mode is None or mode.endswith("i") else mode)

    return compute


def round_and_encode(x: np.ndarray, to: str, parts: tuple[str, ...], mode: str) -> np.ndarray:
    if "relu" in parts:
        x = np.where(x < 0, 0, x)
    if "sat" in parts:
        x = np.where(np.isnan(x), 0, np.clip(x, 0, 1))
    out = floats.encode(x, to, mode, "satfinite" in parts)
    if "ftz" in parts and to == "f32":
        value = out.view(np.float32)
        out = np.where(np.abs(value) < floats.TINY, out & np.uint32(0x80000000), out)
    return out


def build_pack(source: str, to: str, parts: tuple[str, ...], mode: str) -> tuple[Callable, tuple, tuple]:
    """Two float32 to a packed pair: the first operand is the upper half."""
    half = build_float_conversion(source, to, (*(p for p in parts[:-2]), to, source), mode)
    small = to in floats.FP8
    out = np.uint16 if small else np.uint32
    size = out(8 if small else 16)

    def compute(high, low):
        high, low = half(high), half(low)
        return np.asarray(low).astype(out) | (np.asarray(high).astype(out) << size)

    return compute, (np.uint32, np.uint32), (out,)


def build_pair_conversion(source: str, to: str, parts: tuple[str, ...]) -> tuple[Callable, tuple, tuple]:
    """Between f16x2 and packed 8-bit pairs."""
    kinds = {
        name: (np.uint8, 8, np.uint16) if name in floats.FP8 else (np.uint16, 16, np.uint32) for name in (source, to)
    }
    (one, size, both), (_, out_size, out_both) = kinds[source], kinds[to]

    def compute(bits):
        bits = np.atleast_1d(bits)
        low, high = bits.astype(one), (bits >> both(size)).astype(one)
        low, high = (round_and_encode(floats.decode(x, source), to, parts, "rn").astype(out_both) for x in (low, high))
        return low | (high << out_both(out_size))

    return compute, (both,), (out_both,)
