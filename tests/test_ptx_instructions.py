"""Single instructions of the PTX machine against exact values: NaN, infinities, subnormals, ties of rounding.

The truth is computed in whole numbers and fractions, by none of the machine's own functions.
"""

import itertools
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from common import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.ptx.driver import run_text

SIZES = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}


def register(kind: str) -> str:
    return {np.uint8: "b16", np.uint16: "b16", np.uint32: "b32", np.uint64: "b64"}[SIZES[kind]]


def compute(op: str, out: str, *inputs: tuple[str, list[int]], immediates: str = "", extra: str = "") -> list[int]:
    """`op` of each lane's inputs, given as (bits, numbers) each; the bits of the results."""
    n = len(inputs[0][1])
    lanes = -(-n // 32) * 32
    lines, declared = [], []
    buffers = []
    for i, (kind, numbers) in enumerate(inputs):
        data = np.zeros(lanes, SIZES[kind])
        data[:n] = np.array(numbers, dtype=object).astype(SIZES[kind])
        buffers.append(torch.from_numpy(data.view(np.dtype(f"i{data.itemsize}"))))
        declared.append(f".reg .{register(kind)} %a{i};")
        lines.append(
            f"ld.param.b64 %rd1, [p{i}]; mad.wide.u32 %rd2, %lane, {data.itemsize}, %rd1; ld.global.b{kind} %a{i}, [%rd2];"
        )
    result = torch.zeros(lanes, dtype=getattr(torch, f"int{out}"))
    given = ", ".join(f"%a{i}" for i in range(len(inputs)))
    text = f"""
    .target sm_90a
    .visible .entry kernel({", ".join(f".param .u64 p{i}" for i in range(len(inputs)))}, .param .u64 out)
    {{ .reg .b32 %lane; .reg .b64 %rd<4>; .reg .{register(out)} %d; .reg .pred %p<4>; {" ".join(declared)} {extra}
      mov.u32 %lane, %tid.x;
      {" ".join(lines)}
      {op.replace("ARGS", given) if "ARGS" in op else f"{op} %d, {given}{immediates};"}
      ld.param.b64 %rd1, [out]; mad.wide.u32 %rd2, %lane, {result.element_size()}, %rd1; st.global.b{out} [%rd2], %d; ret;
    }}"""
    run_text(text, *buffers, result, threads=lanes)
    return result.numpy().view(SIZES[out])[:n].tolist()


# ------------------------------------------------------------------------------------------------ the truth

# bits of mantissa, lowest exponent, and whether there are infinities
FORMATS = {"f64": (52, -1022, 1023), "f32": (23, -126, 127), "f16": (10, -14, 15), "bf16": (7, -126, 127)}
CODES = {"f64": "<d", "f32": "<f", "f16": "<e"}


def to_float(bits: int, kind: str) -> float:
    if kind == "bf16":
        return to_float(bits << 16, "f32")
    size = {"f64": 8, "f32": 4, "f16": 2}[kind]
    return struct.unpack(CODES[kind], bits.to_bytes(size, "little"))[0]


def to_bits(x: float, kind: str) -> int:
    """Of a float that the format holds exactly."""
    if math.isnan(x):
        return {"f64": 0x7FF8000000000000, "f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}[kind]
    if kind == "bf16":
        return to_bits(x, "f32") >> 16
    return int.from_bytes(struct.pack(CODES[kind], x), "little")


def rounded(x: Fraction, kind: str, mode: str = "rn", zero: float = 0.0) -> float:
    """An exact number to the format. zero: the sign of a result that is exactly 0."""
    mantissa, lowest, highest = FORMATS[kind]
    if x == 0:
        return zero
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    quantum = Fraction(2) ** (max(exponent, lowest) - mantissa)
    scaled = size / quantum
    whole, rest = scaled.numerator // scaled.denominator, scaled % 1
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": rest > 0 and x < 0,
        "rp": rest > 0 and x > 0,
    }[mode]
    size = (whole + bool(up)) * quantum
    largest = (2 - Fraction(1, 2**mantissa)) * Fraction(2) ** highest
    if size > largest:
        inward = mode == "rz" or (mode == "rm" and x > 0) or (mode == "rp" and x < 0)
        return math.copysign(float(largest) if inward else math.inf, x)
    return math.copysign(float(size), x)


EDGES = {
    "f32": [
        0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x3F800000, 0xBF800001, 0x3F7FFFFF, 0x7F7FFFFF,
        0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x33800000, 0x4B800001, 0x34000000, 0xB3000000, 0x0D800000,
    ],
    "f64": [
        0, 1 << 63, 1, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x3FF0000000000000, 0xBFF0000000000001, 0x3FEFFFFFFFFFFFFF,
        0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000, 0x3CA0000000000000, 0x4340000000000001, 0x4008000000000000,
    ],
    "f16": [0, 0x8000, 1, 0x83FF, 0x0400, 0x3C00, 0xBC01, 0x3BFF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x1000, 0x0C00],
    "bf16": [0, 0x8000, 1, 0x807F, 0x0080, 0x3F80, 0xBF81, 0x3F7F, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x3B80, 0x3B00],
}  # fmt: skip
WIDTH = {"f32": "32", "f64": "64", "f16": "16", "bf16": "16"}


def exact(base: str, kind: str, mode: str, *x: float) -> float:
    """The correctly rounded result, or what IEEE 754 gives where there is none."""
    sign = -1 if base == "sub" else 1
    if base in ("add", "sub"):
        a, b = x[0], sign * x[1]
        if not all(map(math.isfinite, (a, b))):
            return a + b
        zero = a if a == b == 0 and math.copysign(1, a) == math.copysign(1, b) else -0.0 if mode == "rm" else 0.0
        return rounded(Fraction(a) + Fraction(b), kind, mode, zero)
    if base == "mul":
        if not all(map(math.isfinite, x)):
            return x[0] * x[1]
        return rounded(Fraction(x[0]) * Fraction(x[1]), kind, mode, x[0] * x[1] if 0 in x else 0.0)
    a, b, c = x
    if not all(map(math.isfinite, x)):
        product = a * b if not all(map(math.isfinite, (a, b))) else math.copysign(0.0, a) * b
        return product + c
    total = Fraction(a) * Fraction(b) + Fraction(c)
    product_sign = math.copysign(1, a) * math.copysign(1, b)
    both_zero = (a == 0 or b == 0) and c == 0
    zero = c if both_zero and product_sign == math.copysign(1, c) else -0.0 if mode == "rm" else 0.0
    return rounded(total, kind, mode, zero)


def same(got: list[int], expected: list[float], kind: str, inputs) -> None:
    for i, (bits, want) in enumerate(zip(got, expected, strict=True)):
        value = to_float(bits, kind)
        if math.isnan(want):
            assert math.isnan(value), (inputs[i], bits)
        else:
            assert bits == to_bits(want, kind), ([hex(x) for x in inputs[i]], value, want)


OPERATIONS = [
    *(f"{base}.{mode}.f32" for base in ("add", "sub", "mul", "fma") for mode in ("rn", "rz", "rm", "rp")),
    *(f"{base}.rn.f64" for base in ("add", "sub", "mul", "fma")),
    *(f"{base}.rn.{kind}" for base in ("add", "sub", "mul", "fma") for kind in ("f16", "bf16")),
]


@pytest.mark.parametrize("op", OPERATIONS)
def test_edges_of_arithmetic(op):
    base, mode, kind = op.split(".")
    edges = EDGES[kind]
    if base == "fma":
        inputs = [(a, b, c) for a, b in itertools.product(edges, edges) for c in edges[::3]]
        inputs = inputs[: 1024 - 1024 % 32]
    else:
        inputs = list(itertools.product(edges, edges))
    got = compute(op, WIDTH[kind], *((WIDTH[kind], list(column)) for column in zip(*inputs, strict=True)))
    if kind == "f64" and base in ("mul", "fma"):  # the machine's doc: products under 2^-969 are rounded twice
        keep = [i for i, x in enumerate(inputs) if not tiny_product(*x[:2])]
        inputs, got = [inputs[i] for i in keep], [got[i] for i in keep]
    same(got, [exact(base, kind, mode, *(to_float(b, kind) for b in x)) for x in inputs], kind, inputs)


def tiny_product(a: int, b: int) -> bool:
    x, y = to_float(a, "f64"), to_float(b, "f64")
    return (
        math.isfinite(x) and math.isfinite(y) and x != 0 != y and abs(Fraction(x) * Fraction(y)) < Fraction(1, 2**969)
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_fused_multiply_add(data):
    """Near ties of the rounding to float32, where rounding twice is wrong."""
    lane = st.tuples(*[st.integers(0, (1 << 24) - 1)] * 2, st.integers(-60, 4), st.integers(-3, 3), st.booleans())
    inputs = []
    for a, b, shift, nudge, negative in data.draw(st.lists(lane, min_size=32, max_size=32)):
        x, y = float(a | 1 << 23), float(b | 1 << 23)
        z = float(np.float32(math.ldexp(x * y, shift) + nudge)) * (-1 if negative else 1)
        inputs.append(tuple(to_bits(float(np.float32(v)), "f32") for v in (x, y, z)))
    got = compute("fma.rn.f32", "32", *(("32", list(column)) for column in zip(*inputs, strict=True)))
    same(got, [exact("fma", "f32", "rn", *(to_float(b, "f32") for b in x)) for x in inputs], "f32", inputs)


def test_fma_rounds_once():
    """(1 + 2^-12)^2 - (1 + 2^-11) is 2^-24: a product rounded first would give 0."""
    a, c = to_bits(1 + 2.0**-12, "f32"), to_bits(-(1 + 2.0**-11), "f32")
    assert compute("fma.rn.f32", "32", ("32", [a]), ("32", [a]), ("32", [c])) == [to_bits(2.0**-24, "f32")]


@pytest.mark.parametrize("op", ["div.rn.f32", "div.rz.f32", "div.rn.f64", "sqrt.rn.f32", "sqrt.rp.f32", "rcp.rn.f32"])
def test_division_and_roots(op):
    base, mode, kind = op.split(".")
    values = [x for x in EDGES[kind] if 0 < to_float(x, kind) < math.inf] + [
        to_bits(v, kind) for v in (3.0, 7.0, 10.0, 0.5)
    ]
    if base == "div":
        inputs = list(itertools.product(values, values))
        if kind == "f64":
            inputs = [x for x in inputs if all(2.0**-900 < to_float(b, kind) < 2.0**900 for b in x)]
        expected = [rounded(Fraction(to_float(a, kind)) / Fraction(to_float(b, kind)), kind, mode) for a, b in inputs]
    elif base == "rcp":
        inputs = [(x,) for x in values]
        expected = [rounded(1 / Fraction(to_float(x, kind)), kind, mode) for (x,) in inputs]
    else:
        inputs = [(x,) for x in values]
        expected = [square_root(to_float(x, kind), kind, mode) for (x,) in inputs]
    got = compute(op, WIDTH[kind], *((WIDTH[kind], list(column)) for column in zip(*inputs, strict=True)))
    same(got, expected, kind, inputs)


def square_root(x: float, kind: str, mode: str) -> float:
    scale = 2**400
    root = math.isqrt(int(Fraction(x) * scale * scale))
    below = Fraction(root, scale)
    return rounded(below if below * below == Fraction(x) else below + Fraction(1, 2 * scale), kind, mode)


def test_flush_to_zero():
    tiny, negative = 0x00400000, 0x80400000
    one = to_bits(1.0, "f32")
    a, b = ("32", [tiny, negative, 0x00800000]), ("32", [one, one, to_bits(0.5, "f32")])
    assert compute("mul.rn.ftz.f32", "32", a, b) == [0, 0x80000000, 0]
    assert compute("mul.rn.f32", "32", a, b) == [tiny, negative, tiny]


def test_nan_and_signed_zeros_in_min_and_max():
    nan, zero, minus, one = 0x7FC00000, 0, 0x80000000, to_bits(1.0, "f32")
    a, b = ("32", [nan, one, nan, zero, minus]), ("32", [one, nan, nan, minus, zero])
    assert compute("max.f32", "32", a, b)[:2] == [one, one]
    assert math.isnan(to_float(compute("max.f32", "32", a, b)[2], "f32"))
    assert compute("max.f32", "32", a, b)[3:] == [zero, zero]
    assert compute("min.f32", "32", a, b)[3:] == [minus, minus]
    assert all(math.isnan(to_float(x, "f32")) for x in compute("min.NaN.f32", "32", a, b)[:3])


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_comparisons_of_floats(name):
    edges = EDGES["f32"]
    pairs = list(itertools.product(edges, edges))
    op = f"setp.{name}.f32 %p1, ARGS; selp.b32 %d, 1, 0, %p1;"
    got = compute(op, "32", *(("32", list(column)) for column in zip(*pairs, strict=True)))
    plain = {"eq": float.__eq__, "ne": float.__ne__, "lt": float.__lt__, "le": float.__le__, "gt": float.__gt__, "ge": float.__ge__}  # fmt: skip
    for (a, b), result in zip(pairs, got, strict=True):
        x, y = to_float(a, "f32"), to_float(b, "f32")
        unordered = math.isnan(x) or math.isnan(y)
        if name in ("num", "nan"):
            expected = unordered == (name == "nan")
        else:
            expected = name.endswith("u") if unordered else bool(plain[name[:2]](x, y))
        assert result == expected, (name, x, y)


APPROXIMATE = {  # function, range, largest error stated in the PTX ISA: relative or absolute
    "ex2.approx.ftz.f32": (lambda x: 2.0**x, (-120, 120), 2.0**-22, 0),
    "lg2.approx.f32": (math.log2, (0.01, 1e6), 2.0**-22, 2.0**-22),
    "sin.approx.f32": (math.sin, (-3.1, 3.1), 0, 2.0**-20.5),
    "cos.approx.f32": (math.cos, (-3.1, 3.1), 0, 2.0**-20.5),
    "tanh.approx.f32": (math.tanh, (-9, 9), 2.0**-11, 0),
    "rcp.approx.ftz.f32": (lambda x: 1 / x, (0.01, 1e6), 2.0**-23, 0),
    "rsqrt.approx.f32": (lambda x: x**-0.5, (0.01, 1e6), 2.0**-22.9, 0),
    "sqrt.approx.f32": (math.sqrt, (0.01, 1e6), 2.0**-23, 0),
    "div.full.f32": (None, None, 2.0**-22, 0),
}


@pytest.mark.parametrize("op", APPROXIMATE)
def test_approximations(op):
    function, span, relative, absolute = APPROXIMATE[op]
    random = np.random.default_rng(0)
    if function is None:
        pairs = random.standard_normal((2, 512)).astype(np.float32)
        got = compute(op, "32", *(("32", row.view(np.uint32).tolist()) for row in pairs))
        expected = pairs[0].astype(float) / pairs[1].astype(float)
    else:
        x = random.uniform(*span, 512).astype(np.float32)
        got = compute(op, "32", ("32", x.view(np.uint32).tolist()))
        expected = np.array([function(float(v)) for v in x])
    got = np.array([to_float(b, "f32") for b in got])
    assert (np.abs(got - expected) <= relative * np.abs(expected) + absolute).all()


def test_special_values_of_approximations():
    inf, minus, nan = 0x7F800000, 0xFF800000, 0x7FC00000
    assert compute("ex2.approx.ftz.f32", "32", ("32", [minus, inf, 0]))[:3] == [0, inf, to_bits(1.0, "f32")]
    assert compute("lg2.approx.f32", "32", ("32", [0, inf]))[:2] == [minus, inf]
    assert compute("rcp.approx.ftz.f32", "32", ("32", [0, 0x80000000, inf])) == [inf, minus, 0]
    assert compute("rsqrt.approx.f32", "32", ("32", [0, inf])) == [inf, 0]
    assert all(
        math.isnan(to_float(x, "f32")) for x in compute("lg2.approx.f32", "32", ("32", [nan, to_bits(-1.0, "f32")]))
    )


# ------------------------------------------------------------------------------------------------ conversions


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_conversion_to_16_bits(to, mode):
    """All float32 that lie on, just below and just above a tie of neighbours, and the edges."""
    halves = range(0, 0x7F80 if to == "bf16" else 0x7C00, 37)
    inputs = list(EDGES["f32"])
    for bits in halves:
        middle = (
            Fraction(to_float(bits, to)) + Fraction(to_float(min(bits + 1, 0x7F7F if to == "bf16" else 0x7BFF), to))
        ) / 2
        at = to_bits(float(np.float32(float(middle))), "f32")
        inputs += [at, max(at - 1, 0), at + 1, at | 0x80000000]
    inputs = inputs[:960]
    got = compute(f"cvt.{mode}.{to}.f32", "16", ("32", inputs))
    expected = []
    for bits in inputs:
        x = to_float(bits, "f32")
        expected.append(rounded(Fraction(x), to, mode, x) if math.isfinite(x) else x)
    same(got, expected, to, [(x,) for x in inputs])
    pair = compute(f"cvt.{mode}.{to}x2.f32", "32", ("32", inputs), ("32", inputs[::-1]))
    assert pair == [a << 16 | b for a, b in zip(got, got[::-1], strict=True)]


def float8(bits: int, kind: str) -> float:
    sign, exponent_bits, mantissa_bits, bias = (bits >> 7, 4, 3, 7) if kind == "e4m3" else (bits >> 7, 5, 2, 15)
    exponent, fraction = bits >> mantissa_bits & (1 << exponent_bits) - 1, bits & (1 << mantissa_bits) - 1
    if kind == "e4m3" and bits & 0x7F == 0x7F:
        return math.nan
    if kind == "e5m2" and exponent == 31:
        return math.nan if fraction else math.copysign(math.inf, -sign or 1)
    if exponent == 0:
        return (-1) ** sign * fraction * 2.0 ** (1 - bias - mantissa_bits)
    return (-1) ** sign * (1 + fraction / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_conversion_of_8_bits(kind):
    """All 256 values out of the format, and into it every tie between neighbours."""
    got = compute(f"cvt.rn.f16x2.{kind}x2", "32", ("16", list(range(256))))
    for bits, result in enumerate(got):
        value = float8(bits, kind)
        low = to_float(result & 0xFFFF, "f16")
        assert low == value or (math.isnan(low) and math.isnan(value))
    values = sorted({float8(b, kind) for b in range(256) if math.isfinite(float8(b, kind))})
    inputs = (
        values
        + [(a + b) / 2 for a, b in itertools.pairwise(values)]
        + [values[-1] * 1.01, 1e9, -1e9, math.inf, math.nan]
    )
    bits = [to_bits(float(np.float32(x)), "f32") for x in inputs]
    got = compute(f"cvt.rn.satfinite.{kind}x2.f32", "16", ("32", [0] * len(bits)), ("32", bits))
    for x, result in zip(inputs, got, strict=True):
        value = float8(result & 0xFF, kind)
        if math.isnan(x):
            assert math.isnan(value)
            continue
        clipped = min(max(x, values[0]), values[-1])
        distance = min(abs(v - clipped) for v in values)
        nearest = [v for v in values if abs(v - clipped) == distance]
        assert value in nearest, x
        if len(nearest) == 2:
            assert result & 1 == 0, x  # a tie goes to the even one


@pytest.mark.parametrize("to", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_conversion_to_integers(to, mode):
    """Out of range goes to the end of the range, NaN to 0, of 64 bits to the top bit alone."""
    bits = int(to[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    values = [
        0.0,
        -0.0,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        -2.5,
        0.99999994,
        127.5,
        255.5,
        3e4,
        7e4,
        2.0**31,
        -(2.0**31),
        2.0**32,
    ]
    values += [2.0**63, -(2.0**63), 2.0**64, 1e30, -1e30, math.inf, -math.inf, math.nan, 1e-40, -1e-40]
    values = [float(np.float32(v)) for v in values]
    width = str(max(bits, 32))
    got = compute(f"cvt.{mode}.{to}.f32", width, ("32", [to_bits(v, "f32") for v in values]))
    whole = {"rni": lambda v: round(v), "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode]
    for v, result in zip(values, got, strict=True):
        if math.isnan(v):
            expected = 1 << 63 if bits == 64 else 0
        else:
            expected = (high if v > 0 else low) if math.isinf(v) else min(max(whole(Fraction(v)), low), high)
        assert result & (1 << bits) - 1 == expected & (1 << bits) - 1, (v, result)


@pytest.mark.parametrize("source", ["s64", "u64", "s32", "u32", "s16", "u8"])
@pytest.mark.parametrize("to", ["f32", "f64", "f16", "bf16"])
def test_conversion_from_integers(source, to):
    bits = int(source[1:])
    values = [0, 1, 2, 3, 127, 255, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1]
    if bits == 64:
        values += [
            (1 << 53) + 1,
            (1 << 54) + 2,
            (1 << 54) + 3,
            (1 << 24) + 1,
            (1 << 62) + (1 << 38),
            (1 << 62) + (1 << 38) + 1,
        ]
    if bits >= 32:
        values += [(1 << 24) + 1, (1 << 24) + 3, 2049, 2051, 257, 0x7FFFFF80, 65519, 65520]
    values = sorted({v & (1 << bits) - 1 for v in values})
    width = "8" if bits == 8 else str(bits)
    got = compute(f"cvt.rn.{to}.{source}", WIDTH[to], (width, values))
    signed = [v - (1 << bits) if source[0] == "s" and v >> bits - 1 else v for v in values]
    same(got, [rounded(Fraction(v), to) for v in signed], to, [(v,) for v in values])


def test_widths_of_integers():
    assert compute("cvt.s32.s8", "32", ("32", [0x80, 0x17F, 0xFF])) == [0xFFFFFF80, 0x7F, 0xFFFFFFFF]
    assert compute("cvt.u32.u16", "32", ("16", [0xFFFF])) == [0xFFFF]
    assert compute("cvt.sat.u8.s32", "32", ("32", [300, 0xFFFFFFFF, 7])) == [255, 0, 7]
    assert compute("cvt.s64.s32", "64", ("32", [0x80000000])) == [0xFFFFFFFF80000000]


# ------------------------------------------------------------------------------------------------ whole numbers

WORDS = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF]


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


M = 0xFFFFFFFF
BINARY = {
    "add.s32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": max,
    "min.relu.s32": lambda a, b: max(min(signed(a), signed(b)), 0),
    "shl.b32": lambda a, b: a << min(b, 32),
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "div.u32": lambda a, b: a // b if b else M,
    "rem.u32": lambda a, b: a % b if b else a,
    "div.s32": lambda a, b: math.trunc(Fraction(signed(a), signed(b))) if b else M,
    "rem.s32": lambda a, b: signed(a) - math.trunc(Fraction(signed(a), signed(b))) * signed(b) if b else a,
    "add.sat.s32": lambda a, b: min(max(signed(a) + signed(b), -(1 << 31)), (1 << 31) - 1),
}


@pytest.mark.parametrize("op", BINARY)
def test_binary(op):
    pairs = list(itertools.product(WORDS, WORDS))
    got = compute(op, "32", *(("32", list(column)) for column in zip(*pairs, strict=True)))
    assert got == [BINARY[op](a, b) & M for a, b in pairs]


@pytest.mark.parametrize("op", ["mul.wide.s32", "mul.wide.u32", "mul.hi.u64", "mul.hi.s64", "div.s64", "shr.s64"])
def test_wide(op):
    bits = 32 if "wide" in op else 64
    words = WORDS if bits == 32 else [*WORDS, 1 << 63, (1 << 64) - 1, 0x0123456789ABCDEF]
    pairs = list(itertools.product(words, words))
    second = "32" if op.startswith("shr") else str(bits)
    got = compute(
        op, "64", (str(bits), [a for a, _ in pairs]), (second, [b & ((1 << int(second)) - 1) for _, b in pairs])
    )
    for (a, b), result in zip(pairs, got, strict=True):
        x, y = (signed(a, bits), signed(b, bits)) if op.endswith(("s32", "s64")) else (a, b)
        if op.startswith("shr"):
            expected = x >> min(b & M, 63)
        elif op.startswith("div"):
            expected = math.trunc(Fraction(x, y)) if y else -1
        else:
            expected = x * y >> (0 if "wide" in op else 64)
        assert result == expected & (1 << 64) - 1, (op, hex(a), hex(b))


UNARY = {
    "not.b32": lambda a: ~a, "neg.s32": lambda a: -a, "abs.s32": lambda a: abs(signed(a)), "popc.b32": int.bit_count,
    "clz.b32": lambda a: 32 - a.bit_length(), "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "bfind.u32": lambda a: a.bit_length() - 1, "cnot.b32": lambda a: int(a == 0),
    "bfind.s32": lambda a: (a if signed(a) >= 0 else ~a & M).bit_length() - 1,
}  # fmt: skip


@pytest.mark.parametrize("op", UNARY)
def test_unary(op):
    assert compute(op, "32", ("32", WORDS)) == [UNARY[op](a) & M for a in WORDS]


def test_fields():
    cases = [(a, p, n) for a in (0xDEADBEEF, 0x7FFFFFFF) for p in (0, 3, 28, 31, 40) for n in (0, 1, 8, 32, 200)]
    columns = [("32", list(column)) for column in zip(*cases, strict=True)]
    for op in ("bfe.u32", "bfe.s32"):
        expected = []
        for a, p, n in cases:
            kept = (a >> p if p < 32 else 0) & (1 << min(n, 64)) - 1
            top = n and a >> min(p + n - 1, 31) & 1
            if op == "bfe.s32" and top:
                kept |= -1 << min(n, max(32 - p, 0))
            expected.append(kept & M)
        assert compute(op, "32", *columns) == expected, op
    inserted = compute("bfi.b32", "32", ("32", [0xF, 0xFF]), ("32", [0, M]), immediates=", 4, 8")
    assert inserted == [0xF0, 0xFFFFFFFF]
    assert compute("bfi.b32", "32", ("32", [0]), ("32", [M]), immediates=", 28, 8") == [0x0FFFFFFF]


def test_permutations_and_lookups():
    a, b = 0x33221100, 0x77665544
    for selector, expected in (
        (0x3210, a),
        (0x7654, b),
        (0x0123, 0x00112233),
        (0x5140, 0x55114400),
        (0xF7E6, 0x00770066),
    ):
        assert compute("prmt.b32", "32", ("32", [a]), ("32", [b]), immediates=f", {selector:#x}") == [expected]
    assert compute("prmt.b32", "32", ("32", [0x80]), ("32", [0]), immediates=", 0x8888") == [0xFFFFFFFF]
    words = ("32", [0xF0F0F0F0]), ("32", [0xCCCCCCCC]), ("32", [0xAAAAAAAA])
    for table in (0xC0, 0xE8, 0x96, 0x1B):
        expected = sum((table >> ((i >> 2 & 1) * 4 + (i >> 1 & 1) * 2 + (i & 1)) & 1) << i for i in range(8))
        assert compute("lop3.b32", "32", *words, immediates=f", {table:#x}")[0] & 0xFF == expected & 0xFF


def test_funnel_shifts():
    low, high = 0x89ABCDEF, 0x01234567
    both = high << 32 | low
    for n in (0, 1, 8, 31, 32, 40):
        for op, amount in (("shf.l.wrap.b32", n % 32), ("shf.l.clamp.b32", min(n, 32))):
            got = compute(op, "32", ("32", [low]), ("32", [high]), ("32", [n]))
            assert got == [(both << amount) >> 32 & M], (op, n)
        got = compute("shf.r.wrap.b32", "32", ("32", [low]), ("32", [high]), ("32", [n]))
        assert got == [both >> n % 32 & M]


def test_carries():
    """128 bits added in four steps."""
    op = """mov.b64 {%l0, %h0}, %a0; mov.b64 {%l1, %h1}, %a1; add.cc.u32 %l0, %l0, %l1; addc.u32 %h0, %h0, %h1;
            mov.b64 %d, {%l0, %h0}; // ARGS"""
    pairs = [(0xFFFFFFFF, 1), (M << 32 | M, 1), (0x123456789, 0xFEDCBA987)]
    extra = ".reg .b32 %l0, %l1, %h0, %h1;"
    got = compute(op, "64", *(("64", list(column)) for column in zip(*pairs, strict=True)), extra=extra)
    assert got == [(a + b) & (1 << 64) - 1 for a, b in pairs]
    subtract = op.replace("add.cc", "sub.cc").replace("addc", "subc")
    got = compute(subtract, "64", *(("64", list(column)) for column in zip(*pairs, strict=True)), extra=extra)
    assert got == [(a - b) & (1 << 64) - 1 for a, b in pairs]


# ------------------------------------------------------------------------------------------------ warps and matrices


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(mode, width):
    clamp = ((32 - width) << 8) | (0 if mode == "up" else 31)
    values = [100 + i for i in range(32)]
    for n in (0, 1, 3, 5):
        got = compute(f"shfl.sync.{mode}.b32 %d|%p1, ARGS, {n}, {clamp}, -1;", "32", ("32", values))
        for i, result in enumerate(got):
            segment = i // width * width
            j = {"up": i - n, "down": i + n, "bfly": i ^ n, "idx": segment + n % width}[mode]
            inside = segment <= j < segment + width
            assert result == values[j if inside else i], (mode, width, n, i)


def test_votes_and_reductions():
    values = list(range(5, 37))
    odd = "and.b32 %d, ARGS, 1; setp.eq.b32 %p1, %d, 1;"
    assert set(compute(odd + "vote.sync.ballot.b32 %d, %p1, -1;", "32", ("32", values))) == {0x55555555}
    assert set(compute(odd + "vote.sync.any.pred %p2, %p1, -1; selp.b32 %d, 1, 0, %p2;", "32", ("32", values))) == {1}
    assert set(compute(odd + "vote.sync.all.pred %p2, %p1, -1; selp.b32 %d, 1, 0, %p2;", "32", ("32", values))) == {0}
    assert set(compute("redux.sync.add.u32 %d, ARGS, -1;", "32", ("32", values))) == {sum(values)}
    assert set(compute("redux.sync.max.s32 %d, ARGS, -1;", "32", ("32", [0xFFFFFFFF] * 31 + [0xFFFFFFFE]))) == {
        0xFFFFFFFF
    }
    got = compute("match.any.sync.b32 %d, ARGS, -1;", "32", ("32", [i % 3 for i in range(32)]))
    assert got == [sum(1 << j for j in range(32) if j % 3 == i % 3) for i in range(32)]
    assert compute("elect.sync %d|%p1, -1; selp.b32 %d, 1, 0, %p1; // ARGS", "32", ("32", values)) == [1] + [0] * 31


def test_product_of_small_matrices():
    """mma.m16n8k16 with A and B of one number each, so that each element of D is one known product: the layouts."""
    random = np.random.default_rng(0)
    a, b = random.integers(-4, 5, (16, 16)), random.integers(-4, 5, (16, 8))
    g, t = np.arange(32) // 4, np.arange(32) % 4

    def pack(low, high):
        halves = np.stack([low, high], 1).astype(np.float16).view(np.uint16).astype(np.uint32)
        return ("32", (halves[:, 0] | halves[:, 1] << 16).tolist())

    rows, columns = (g, g + 8, g, g + 8), (2 * t, 2 * t, 2 * t + 8, 2 * t + 8)
    registers = [pack(a[r, c], a[r, c + 1]) for r, c in zip(rows, columns, strict=True)]
    registers += [pack(b[k, g], b[k + 1, g]) for k in (2 * t, 2 * t + 8)]
    for i in range(4):
        op = (
            "mov.b32 %z, 0f3F800000; mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%c0, %c1, %c2, %c3}, "
            f"{{%a0, %a1, %a2, %a3}}, {{%a4, %a5}}, {{%z, %z, %z, %z}}; mov.b32 %d, %c{i}; // ARGS"
        )
        got = compute(op, "32", *registers, extra=".reg .b32 %c<4>, %z;")
        expected = (a @ b)[g + 8 * (i // 2), 2 * t + i % 2] + 1
        assert [to_float(x, "f32") for x in got] == expected.tolist()
