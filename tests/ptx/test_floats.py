"""Floating-point arithmetic and conversions against exact values: NaN, infinities, subnormals, ties."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tests.ptx.run_text import EDGES, WIDTH, assert_same, compute, round_to_format, to_bits, to_float


def round_exactly(base: str, kind: str, mode: str, *x: float) -> float:
    """The correctly rounded result, or what IEEE 754 gives where there is none."""
    sign = -1 if base == "sub" else 1
    if base in ("add", "sub"):
        a, b = x[0], sign * x[1]
        if not all(map(math.isfinite, (a, b))):
            return a + b
        zero = a if a == b == 0 and math.copysign(1, a) == math.copysign(1, b) else -0.0 if mode == "rm" else 0.0
        return round_to_format(Fraction(a) + Fraction(b), kind, mode, zero)
    if base == "mul":
        if not all(map(math.isfinite, x)):
            return x[0] * x[1]
        return round_to_format(Fraction(x[0]) * Fraction(x[1]), kind, mode, x[0] * x[1] if 0 in x else 0.0)
    a, b, c = x
    if not all(map(math.isfinite, x)):
        product = a * b if not all(map(math.isfinite, (a, b))) else math.copysign(0.0, a) * b
        return product + c
    total = Fraction(a) * Fraction(b) + Fraction(c)
    product_sign = math.copysign(1, a) * math.copysign(1, b)
    both_zero = (a == 0 or b == 0) and c == 0
    zero = c if both_zero and product_sign == math.copysign(1, c) else -0.0 if mode == "rm" else 0.0
    return round_to_format(total, kind, mode, zero)


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
        keep = [i for i, x in enumerate(inputs) if not is_tiny_product(*x[:2])]
        inputs, got = [inputs[i] for i in keep], [got[i] for i in keep]
    assert_same(got, [round_exactly(base, kind, mode, *(to_float(b, kind) for b in x)) for x in inputs], kind, inputs)


def is_tiny_product(a: int, b: int) -> bool:
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
    assert_same(
        got, [round_exactly("fma", "f32", "rn", *(to_float(b, "f32") for b in x)) for x in inputs], "f32", inputs
    )


def test_fma_rounds_once():
    """(1 + 2^-12)^2 - (1 + 2^-11) is 2^-24: a product rounded first would give 0."""
    a, c = to_bits(1 + 2.0**-12, "f32"), to_bits(-(1 + 2.0**-11), "f32")
    assert compute("fma.rn.f32", "32", ("32", [a]), ("32", [a]), ("32", [c])) == [to_bits(2.0**-24, "f32")]
    tie = [to_bits(x, "f32") for x in (2.0**-60, -(2.0**-60), 0.0)]  # the product alone lies between two neighbours
    got = compute("fma.rn.f32", "32", ("32", [a] * 3), ("32", [a] * 3), ("32", tie))
    below, above = 1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-23
    assert [to_float(x, "f32") for x in got] == [above, below, below]


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
        expected = [
            round_to_format(Fraction(to_float(a, kind)) / Fraction(to_float(b, kind)), kind, mode) for a, b in inputs
        ]
    elif base == "rcp":
        inputs = [(x,) for x in values]
        expected = [round_to_format(1 / Fraction(to_float(x, kind)), kind, mode) for (x,) in inputs]
    else:
        inputs = [(x,) for x in values]
        expected = [square_root(to_float(x, kind), kind, mode) for (x,) in inputs]
    got = compute(op, WIDTH[kind], *((WIDTH[kind], list(column)) for column in zip(*inputs, strict=True)))
    assert_same(got, expected, kind, inputs)


def square_root(x: float, kind: str, mode: str) -> float:
    scale = 2**400
    root = math.isqrt(int(Fraction(x) * scale * scale))
    below = Fraction(root, scale)
    return round_to_format(below if below * below == Fraction(x) else below + Fraction(1, 2 * scale), kind, mode)


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
    plain = {each: getattr(float, f"__{each}__") for each in ("eq", "ne", "lt", "le", "gt", "ge")}
    for (a, b), result in zip(pairs, got, strict=True):
        x, y = to_float(a, "f32"), to_float(b, "f32")
        unordered = math.isnan(x) or math.isnan(y)
        if name in ("num", "nan"):
            expected = unordered == (name == "nan")
        else:
            expected = name.endswith("u") if unordered else bool(plain[name[:2]](x, y))
        assert result == expected, (name, x, y)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["eq", "lt", "neu", "nan"])
def test_comparisons_of_pairs_of_halves(kind, name):
    edges = EDGES[kind]
    lows, highs = edges, edges[1:] + edges[:1]
    a = [low | high << 16 for low, high in zip(lows, highs, strict=True)]
    b = [edges[3] | high << 16 for high in edges]
    got = compute(f"set.{name}.{kind}x2.{kind}x2", "32", ("32", a), ("32", b))
    holds = {"eq": float.__eq__, "lt": float.__lt__, "neu": float.__ne__, "nan": lambda x, y: x != x or y != y}[name]
    one = to_bits(1.0, kind)
    for x, y, result in zip(a, b, got, strict=True):
        for half in (0, 16):
            p, q = (to_float(bits >> half & 0xFFFF, kind) for bits in (x, y))
            assert result >> half & 0xFFFF == (one if holds(p, q) else 0), (p, q)


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
        expected.append(round_to_format(Fraction(x), to, mode, x) if math.isfinite(x) else x)
    assert_same(got, expected, to, [(x,) for x in inputs])
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
    assert_same(got, [round_to_format(Fraction(v), to) for v in signed], to, [(v,) for v in values])


def test_widths_of_integers():
    assert compute("cvt.s32.s8", "32", ("32", [0x80, 0x17F, 0xFF])) == [0xFFFFFF80, 0x7F, 0xFFFFFFFF]
    assert compute("cvt.u32.u16", "32", ("16", [0xFFFF])) == [0xFFFF]
    assert compute("cvt.sat.u8.s32", "32", ("32", [300, 0xFFFFFFFF, 7])) == [255, 0, 7]
    assert compute("cvt.s64.s32", "64", ("32", [0x80000000])) == [0xFFFFFFFF80000000]
