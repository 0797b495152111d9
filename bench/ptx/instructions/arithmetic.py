"""Arithmetic instructions: functions on NumPy arrays, chosen by the parts of the opcode.

`find_operation(parts)` returns the function and the types of its operands and results. Types are NumPy dtypes of the
register's bits: a float32 operand arrives as a float32 view. PTX ISA 8.7, chapter 9.7.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..frontend.program import Program, Step, assign, implements, write_masked
from ..frontend.syntax import Instruction, split_vector
from ..frontend.types import DTYPES
from . import floats, integers
from .convert import build_conversion
from .integers import FLOAT_TYPES, INTEGER_OPERATIONS, Operation


def find_operation(parts: tuple[str, ...]) -> Operation | None:
    """None if the instruction is not arithmetic."""
    base = parts[0]
    if base == "cvt":
        return Operation(*build_conversion(parts))
    kind = parts[-1]
    if kind in FLOAT_TYPES and base in FLOAT_OPERATIONS:
        return choose_float_operation(parts)
    if base in INTEGER_OPERATIONS:
        return INTEGER_OPERATIONS[base](parts)
    return None


def flush_subnormals(x: np.ndarray) -> np.ndarray:
    """.ftz: subnormals to zero, the sign kept."""
    small = np.abs(x) < floats.TINY
    return np.where(small, np.copysign(np.float32(0), x), x) if np.any(small) else x


def canonicalise_nan(x: np.ndarray) -> np.ndarray:
    """Replaces every NaN by the canonical one, as the GPU does."""
    nan = np.isnan(x)
    if not np.any(nan):
        return x
    return np.where(nan, floats.NAN32.view(np.float32) if x.dtype == np.float32 else np.nan, x)


def round_directed(rounded: np.ndarray, error: np.ndarray, mode: str) -> np.ndarray:
    """Rounds in a direction, given the result rounded to nearest and the sign of its error (exact - rounded)."""
    toward = rounded.dtype.type({"rz": 0, "rm": -np.inf, "rp": np.inf}[mode])
    moves = {"rz": rounded * error < 0, "rm": error < 0, "rp": error > 0}[mode]
    return np.where(moves, np.nextafter(rounded, toward), rounded)


def is_sum_of_positive_zeros(base: str, operands: tuple) -> np.ndarray:
    """Where both terms are +0. Of other terms that cancel the sum rounds down to -0."""
    first = operands[0] * operands[1] if base == "fma" else operands[0]
    last = -operands[-1] if base == "sub" else operands[-1]
    return (first == 0) & (last == 0) & ~np.signbit(first) & ~np.signbit(last)


def has_overflowed(result: np.ndarray, operands: tuple, base: str) -> np.ndarray:
    """Where an infinite result is a finite one that overflowed."""
    finite = np.isinf(result)
    for x in operands:
        finite = finite & np.isfinite(x)
    return finite & (operands[1] != 0) if base in ("div", "rcp") else finite


def min_or_max(a: np.ndarray, b: np.ndarray, least: bool, nan: bool) -> np.ndarray:
    """max or min of floats: the other operand wins over a NaN, or with .NaN loses; -0 is less than +0."""
    out = (np.fmin if least else np.fmax)(a, b)
    kind = np.uint32 if out.dtype == np.float32 else np.uint64 if out.dtype == np.float64 else np.uint16
    zeros = (a == b) & (out == 0)
    if np.any(zeros):
        x, y = (np.broadcast_to(v, out.shape).astype(out.dtype).view(kind) for v in (a, b))
        out = np.where(zeros, (x | y if least else x & y).view(out.dtype), out)
    return np.where(np.isnan(a) | np.isnan(b), out.dtype.type(np.nan), out) if nan else out


def find_rounding_error(base: str, result: np.ndarray, operands: tuple) -> np.ndarray:
    """A number with the sign of exact minus rounded result: enough for directed rounding."""
    a, b = (np.asarray(x, np.float64) for x in operands[:2])
    if base in ("add", "sub"):
        s, error = floats.two_sum(a, -b if base == "sub" else b)
        return np.where(s == result, error, s - result)
    if base == "mul":
        if result.dtype == np.float64:
            return floats.two_product(a, b)[1]
        return a * b - result
    if base == "fma":
        c = np.asarray(operands[2], np.float64)
        if result.dtype == np.float64:
            high, low = floats.two_product(a, b)
            s, error = floats.two_sum(high, c)
            return (s - result) + (error + low)
        s, error = floats.two_sum(a * b, c)
        return np.where(s == result, error, s - result)
    if base == "div":
        high, low = floats.two_product(np.asarray(result, np.float64), b)
        return np.copysign(1.0, b) * ((a - high) - low)
    high, low = floats.two_product(np.asarray(result, np.float64), np.asarray(result, np.float64))  # sqrt
    return (a - high) - low


def fma(a, b, c):
    return floats.fma32(a, b, c) if np.result_type(a, b, c) == np.float32 else floats.fma64(a, b, c)


# Approximations (ex2, lg2, sin …) are computed in float64 and rounded once, within the documented error of 1 ulp or
# more (PTX ISA, tables under each instruction).
def approximate(function: Callable) -> Callable:
    def compute(a):
        return function(np.asarray(a, np.float64)).astype(np.asarray(a).dtype)

    return compute


FLOAT_OPERATIONS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma, "mad": fma, "div": np.divide,
    "sqrt": np.sqrt, "rcp": lambda a: np.asarray(a).dtype.type(1) / a,
    "min": lambda *x: min_or_max(*x[:2], True, False), "max": lambda *x: min_or_max(*x[:2], False, False),
    "abs": np.abs, "neg": np.negative, "rsqrt": approximate(lambda a: 1 / np.sqrt(a)), "ex2": approximate(np.exp2),
    "lg2": approximate(np.log2), "sin": approximate(np.sin), "cos": approximate(np.cos), "tanh": approximate(np.tanh),
    "copysign": lambda a, b: np.copysign(b, a), "testp": None, "setp": None, "selp": None, "set": None,
}  # fmt: skip
OPERAND_COUNT = {"add": 2, "sub": 2, "mul": 2, "fma": 3, "mad": 3, "div": 2, "min": 2, "max": 2, "copysign": 2}
ROUNDED_OPERATIONS = ("add", "sub", "mul", "fma", "div", "sqrt", "rcp")
KEEPS_NAN = ("abs", "neg", "copysign", "min", "max")  # a NaN keeps its bits


def choose_float_operation(parts: tuple[str, ...]) -> Operation:
    base, kind = parts[0], parts[-1]
    if base == "testp":
        return build_testp(parts)
    if base in ("setp", "selp", "set"):
        return INTEGER_OPERATIONS[base](parts)
    count = OPERAND_COUNT.get(base, 1)
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return Operation(
            build_half_function(parts, count), (DTYPES[half_storage(kind)],) * count, (DTYPES[half_storage(kind)],)
        )
    return Operation(build_float_function(parts), (DTYPES[kind],) * count, (DTYPES[kind],))


def half_storage(kind: str) -> str:
    return "b32" if kind.endswith("x2") else "b16"


def build_float_function(parts: tuple[str, ...]) -> Callable:
    """The base function with its modifiers: .ftz, .sat, .rz …, .NaN."""
    base, kind = parts[0], parts[-1]
    function = FLOAT_OPERATIONS[base]
    mode = next((m for m in ("rz", "rm", "rp") if m in parts), None)
    ftz, sat = "ftz" in parts, "sat" in parts
    coarse = base in ("rcp", "rsqrt") and kind == "f64"  # .approx.ftz.f64: the lower 32 bits are zero
    if "NaN" in parts:
        function = lambda a, b: min_or_max(a, b, base == "min", True)  # noqa: E731

    def compute(*operands):
        if ftz and kind == "f32":
            operands = tuple(flush_subnormals(x) for x in operands)
        result = function(*operands)
        if mode and base in ROUNDED_OPERATIONS:
            left = (np.ones_like(operands[0]), operands[0]) if base == "rcp" else operands
            error = find_rounding_error("div" if base == "rcp" else base, result, (*left, left[0])[:3])
            error = np.where(has_overflowed(result, left, base), -np.sign(result), error)
            result = round_directed(result, error, mode)
            if mode == "rm" and base in ("add", "sub", "fma"):
                exact_zero = (result == 0) & (error == 0) & ~is_sum_of_positive_zeros(base, operands)
                result = np.where(exact_zero, -np.abs(result), result)
        if base not in KEEPS_NAN:
            result = canonicalise_nan(result)
        if ftz and kind == "f32":
            result = flush_subnormals(result)
        if sat:
            result = np.where(np.isnan(result), result.dtype.type(0), np.clip(result, 0, 1))
        if coarse and "approx" in parts:
            result = (result.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
        return result

    return compute


def build_half_function(parts: tuple[str, ...], count: int) -> Callable:
    """16-bit arithmetic, scalar or packed: exact or rounded to odd in float64, then rounded once to the format."""
    base, kind = parts[0], parts[-1]
    pair, name = kind.endswith("x2"), kind.removesuffix("x2")

    def exact(*x):
        if base == "fma":
            return floats.add_to_odd(x[0] * x[1], x[2])
        if base in ("add", "sub"):
            return floats.add_to_odd(x[0], -x[1] if base == "sub" else x[1])
        if base in ("min", "max"):
            return min_or_max(x[0], x[1], base == "min", "NaN" in parts)
        return FLOAT_OPERATIONS[base](*x)

    def one(*bits):
        bits = tuple(np.asarray(b) for b in bits)
        if base == "neg":
            return bits[0] ^ np.uint16(0x8000)
        if base == "abs":
            return bits[0] & np.uint16(0x7FFF)
        result = exact(*(np.atleast_1d(floats.decode(b, name)) for b in bits))
        if "relu" in parts:
            result = np.where(np.isnan(result), result, np.maximum(result, 0))
        if "sat" in parts:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1))
        return floats.encode(result, name)

    def two(*bits):
        low = one(*(np.asarray(b).astype(np.uint16) for b in bits))
        high = one(*((np.asarray(b) >> np.uint32(16)).astype(np.uint16) for b in bits))
        return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))

    return two if pair else one


def build_testp(parts: tuple[str, ...]) -> Operation:
    tests = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny),
    }  # fmt: skip
    return Operation(tests[parts[1]], (DTYPES[parts[-1]],), (np.bool_,))


# ------------------------------------------------------------------------------------------------ instructions


@implements("cvt", *FLOAT_OPERATIONS, *INTEGER_OPERATIONS)
def build_arithmetic(program: Program, instruction: Instruction) -> Step | None:
    known = find_operation(instruction.parts)
    if known is None:
        return None
    first, *rest = instruction.operands
    operands = [program.make_source_slot(x, t) for x, t in zip(rest, known.operands, strict=True)]
    out = [program.make_dest_slot(x, t) for x, t in zip(split_vector(first), known.results, strict=False)]
    return assign(known.compute, operands, out, len(known.results) > 1)


@implements("add.cc", "addc", "sub.cc", "subc", "mad.lo", "mad.hi", "madc")
def add_with_carry(program: Program, instruction: Instruction) -> Step | None:
    """Addition with carry-in (addc, subc, madc) and carry-out (.cc)."""
    parts, base = instruction.parts, instruction.parts[0]
    takes, gives = base in ("addc", "subc", "madc"), "cc" in parts
    if not (takes or gives):
        return build_arithmetic(program, instruction)
    dtype = DTYPES[parts[-1]]
    wide = integers.to_unsigned(dtype)
    size = np.dtype(dtype).itemsize * 8
    operands = [program.make_source_slot(x, wide) for x in instruction.operands[1:]]
    out = program.make_dest_slot(instruction.operands[0], wide)
    times = integers.multiply_high if "hi" in parts else np.multiply
    if size != 32:
        return None

    def run(unit, mask):
        *factors, last = (np.asarray(unit.slots[i]) for i in operands)
        first = times(*factors) if len(factors) == 2 else factors[0]
        first, last = first.astype(np.int64), last.astype(np.int64)
        carry = unit.carry if takes else 0
        total = first - last - carry if base.startswith("sub") else first + last + carry
        write_masked(unit.slots[out], (total & 0xFFFFFFFF).astype(wide), mask)
        if gives:
            write_masked(unit.carry, (total >> 32) & 1, mask)

    return run
