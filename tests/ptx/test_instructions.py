"""Integers, shuffles, votes and small matrix products on the PTX machine, each instruction against exact values."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tests.ptx.run_text import compute, to_float

WORDS = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF]


def to_signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


M = 0xFFFFFFFF
BINARY = {
    "add.s32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: to_signed(a) * to_signed(b) >> 32,
    "min.s32": lambda a, b: min(to_signed(a), to_signed(b)),
    "max.u32": max,
    "min.relu.s32": lambda a, b: max(min(to_signed(a), to_signed(b)), 0),
    "shl.b32": lambda a, b: a << min(b, 32),
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shr.s32": lambda a, b: to_signed(a) >> min(b, 31),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "div.u32": lambda a, b: a // b if b else M,
    "rem.u32": lambda a, b: a % b if b else a,
    "div.s32": lambda a, b: math.trunc(Fraction(to_signed(a), to_signed(b))) if b else M,
    "rem.s32": lambda a, b: to_signed(a) - math.trunc(Fraction(to_signed(a), to_signed(b))) * to_signed(b) if b else a,
    "add.sat.s32": lambda a, b: min(max(to_signed(a) + to_signed(b), -(1 << 31)), (1 << 31) - 1),
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
        x, y = (to_signed(a, bits), to_signed(b, bits)) if op.endswith(("s32", "s64")) else (a, b)
        if op.startswith("shr"):
            expected = x >> min(b & M, 63)
        elif op.startswith("div"):
            expected = math.trunc(Fraction(x, y)) if y else -1
        else:
            expected = x * y >> (0 if "wide" in op else 64)
        assert result == expected & (1 << 64) - 1, (op, hex(a), hex(b))


UNARY = {
    "not.b32": lambda a: ~a, "neg.s32": lambda a: -a, "abs.s32": lambda a: abs(to_signed(a)), "popc.b32": int.bit_count,
    "clz.b32": lambda a: 32 - a.bit_length(), "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "bfind.u32": lambda a: a.bit_length() - 1, "cnot.b32": lambda a: int(a == 0),
    "bfind.s32": lambda a: (a if to_signed(a) >= 0 else ~a & M).bit_length() - 1,
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
