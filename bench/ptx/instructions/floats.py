"""Floating-point formats on NumPy arrays: decoded to float64, encoded from it with a given rounding.

float64 represents every value of these formats. A result that needs more precision (a fused multiply-add, a sum of
distant exponents) is first rounded to odd: to the neighbour whose last bit is odd, so that a second rounding to at most
51 bits is correct (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NAN32 = np.uint32(0x7FFFFFFF)  # the one NaN of the GPU's float32 arithmetic
NAN16 = np.uint16(0x7FFF)  # of float16 and bfloat16
TINY = np.float32(2.0**-126)  # the smallest normal float32


class Format(NamedTuple):
    """mantissa: stored bits; smallest: exponent of the smallest normal; largest: the largest finite number."""

    mantissa: int
    smallest: int
    largest: float


FORMATS = {
    "f64": Format(52, -1022, float(np.finfo(np.float64).max)),
    "f32": Format(23, -126, float(np.finfo(np.float32).max)),
    "tf32": Format(10, -126, float(2.0**128 - 2.0**117)),
    "bf16": Format(7, -126, float(2.0**128 - 2.0**120)),
    "f16": Format(10, -14, 65504.0),
    "e5m2": Format(2, -14, 57344.0),
    "e4m3": Format(3, -6, 448.0),
}


# ------------------------------------------------------------------------------------------------ rounding


def round_to_odd(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Rounds to odd, given the float64 nearest to the exact result and its error (exact - value)."""
    even = (value.view(np.uint64) & np.uint64(1)) == 0
    move = even & (error != 0) & np.isfinite(value)
    return np.where(move, np.nextafter(value, np.where(error > 0, np.inf, -np.inf)), value)


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a + b rounded, rounding error), by Knuth."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a * b rounded, rounding error), by Dekker, with Veltkamp's splitting."""

    def halves(x):
        t = x * 134217729.0  # 2^27 + 1
        high = t - (t - x)
        return high, x - high

    p = a * b
    (ah, al), (bh, bl) = halves(a), halves(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd."""
    s, error = two_sum(a, b)
    return round_to_odd(s, np.where(np.isfinite(s), error, 0))


def round_to_format(value: np.ndarray, name: str, mode: str = "rn") -> np.ndarray:
    """Rounds float64 values to a format, as float64. mode: rn (ties to even), rna (ties away from zero), rz, rm (down),
    rp (up). Overflow gives infinity, or the largest finite number if the mode rounds toward zero there."""
    form = FORMATS[name]
    value = np.asarray(value, np.float64)
    if name == "f64":
        return value
    exponent = np.frexp(value)[1] - 1
    quantum = np.maximum(exponent, form.smallest) - form.mantissa
    scaled = np.ldexp(value, -quantum)
    rounded = np.ldexp(round_to_integer(scaled, mode), quantum)
    toward_zero = (mode == "rz") | ((mode == "rm") & (value > 0)) | ((mode == "rp") & (value < 0))
    over = np.abs(rounded) > form.largest
    limit = np.where(toward_zero, form.largest, np.inf)
    rounded = np.where(over & np.isfinite(value), np.copysign(limit, value), rounded)
    return np.where(np.isfinite(value), np.copysign(rounded, value), value)


def round_to_integer(value: np.ndarray, mode: str) -> np.ndarray:
    """To an integer, as a float. mode: rn or rni, rna, rz or rzi, rm or rmi, rp or rpi."""
    if mode == "rna":
        return np.copysign(np.floor(np.abs(value) + 0.5), value)
    return {"rn": np.rint, "rz": np.trunc, "rm": np.floor, "rp": np.ceil}[mode[:2]](value)


# ------------------------------------------------------------------------------------------------ bits


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), NAN16, rounded.astype(np.uint16))


def f32_to_f16(value: np.ndarray) -> np.ndarray:
    half = np.asarray(value).astype(np.float16)
    return np.where(np.isnan(half), NAN16, half.view(np.uint16))


def make_fp8_table(name: str) -> np.ndarray:
    """The 256 values of an 8-bit format. e4m3 has no infinity and one NaN, e5m2 is the upper half of a float16."""
    bits = np.arange(256, dtype=np.uint16)
    if name == "e5m2":
        return (bits << np.uint16(8)).view(np.float16).astype(np.float64)
    exponent, fraction = (bits >> 3) & 15, bits & 7
    value = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent.astype(float) - 10))
    value = np.where((bits & 0x7F) == 0x7F, np.nan, value)
    return np.where(bits & 0x80, -value, value)


FP8 = {name: make_fp8_table(name) for name in ("e4m3", "e5m2")}


def decode(bits: np.ndarray, name: str) -> np.ndarray:
    """Bits of a format (uint8, uint16, uint32 or uint64) as float64."""
    if name == "f64":
        return bits.view(np.float64)
    if name == "f32":
        return bits.view(np.float32).astype(np.float64)
    if name == "tf32":  # the tensor cores read the upper 19 bits of a float32
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if name == "f16":
        return bits.view(np.float16).astype(np.float64)
    if name == "bf16":
        return bf16_to_f32(bits).astype(np.float64)
    return FP8[name][bits]


def encode(value: np.ndarray, name: str, mode: str = "rn", saturate: bool = False) -> np.ndarray:
    """float64 to the bits of a format. saturate: overflow gives the largest finite number, not infinity."""
    rounded = round_to_format(value, name, mode)
    if saturate or name == "e4m3":
        largest = FORMATS[name].largest
        rounded = np.clip(rounded, -largest, largest)  # NaN stays NaN
    nan = np.isnan(rounded)
    if name == "f64":
        return rounded.view(np.uint64)
    if name in ("f32", "tf32"):
        return np.where(nan, NAN32, rounded.astype(np.float32).view(np.uint32))
    if name == "f16":
        return np.where(nan, NAN16, rounded.astype(np.float16).view(np.uint16))
    if name == "bf16":
        return np.where(nan, NAN16, (rounded.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    if name == "e5m2":
        bits = (rounded.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
        return np.where(nan, np.uint8(0x7F), bits)
    positive = np.searchsorted(FP8["e4m3"][:127], np.abs(rounded)).astype(np.uint8)
    return np.where(nan, np.uint8(0x7F), positive | (np.signbit(rounded).astype(np.uint8) << 7))


def round_integer_to_odd(value: np.ndarray) -> np.ndarray:
    """64-bit integers as float64, rounded to odd if they have more than 53 bits."""
    high = (value >> value.dtype.type(32)).astype(np.float64) * 2.0**32  # keeps the sign
    low = (value & value.dtype.type(0xFFFFFFFF)).astype(np.float64)
    return add_to_odd(high, low)


# ------------------------------------------------------------------------------------------------ fused multiply-add


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32 with one rounding, to nearest even.

    The product is exact in float64. Rounding the sum to float64 first matters only if the result is a tie of the second
    rounding: then the sum is rounded to odd."""
    product = np.multiply(a, b, dtype=np.float64)
    s = product + c
    tie = (s.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    tie |= np.abs(s) < 2.0**-126
    if tie.any():
        s = add_to_odd(product, np.asarray(c, np.float64))
    return s.astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float64 with one rounding; two above 2^996 or below 2^-969, where splitting is not exact."""
    high, low = two_product(a, b)
    th, tl = two_sum(c, low)
    vh, vl = two_sum(high, th)
    exact = vh + add_to_odd(tl, vl)
    plain = a * b + c
    return np.where(np.isfinite(exact), exact, plain)
