"""Runs single PTX instructions and kernel bodies, and computes the results that number formats require, in fractions
and with none of the machine's code."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from bench import ptx
from bench.ptx.driver import run_text
from bench.ptx.faults import Judge

# For the project's own kernels: faults that a GPU tolerates, or that only cost time, are errors.
STRICT = {"last bits": "raise", "pending wgmma": "raise"}

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.shared .align 16 .b8 space[4096];
.visible .entry kernel(.param .u64 out, .param .u64 x)
{
    .reg .pred %p<8>; .reg .b32 %r<64>; .reg .b64 %rd<32>; .reg .f32 %f<64>;
    ld.param.b64 %rd1, [out];
    ld.param.b64 %rd2, [x];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r4, %r2, %r3, %r1;
    mul.wide.u32 %rd3, %r4, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    mov.b32 %r5, space;
    shl.b32 %r6, %r1, 2;
    add.s32 %r7, %r5, %r6;
"""


def run(body: str, threads: int = 128, blocks: int = 1, elements: int | None = None, judge: Judge | None = None):
    n = threads * blocks if elements is None else elements
    out, x = torch.zeros(max(threads * blocks, n), dtype=torch.int32), torch.arange(n, dtype=torch.int32)
    run_text(HEAD + body + "\n ret;\n}", out, x, grid=(blocks,), threads=threads, judge=judge)
    return out


def expect_fault(kind: str, body: str, match: str | None = None, **options) -> ptx.Fault:
    with pytest.raises(ptx.Fault, match=match) as raised:
        run(body, **options)
    fault = raised.value
    assert fault.kind == kind, str(fault)
    assert fault.block is not None
    assert fault.thread is not None
    assert fault.instruction.line > 0
    assert fault.instruction.text in str(fault)
    return fault


SIZES = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}


def register(kind: str) -> str:
    return {np.uint8: "b16", np.uint16: "b16", np.uint32: "b32", np.uint64: "b64"}[SIZES[kind]]


def compute(op: str, out: str, *inputs: tuple[str, list[int]], immediates: str = "", extra: str = "") -> list[int]:
    """The bits of the results of `op` for each lane's inputs, which are given as (width, values)."""
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
            f"ld.param.b64 %rd1, [p{i}]; mad.wide.u32 %rd2, %lane, {data.itemsize}, %rd1;"
            f"ld.global.b{kind} %a{i}, [%rd2];"
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
      ld.param.b64 %rd1, [out]; mad.wide.u32 %rd2, %lane, {result.element_size()}, %rd1;
      st.global.b{out} [%rd2], %d; ret;
    }}"""
    run_text(text, *buffers, result, threads=lanes)
    return result.numpy().view(SIZES[out])[:n].tolist()


# bits of mantissa, lowest exponent, and whether there are infinities
FORMATS = {"f64": (52, -1022, 1023), "f32": (23, -126, 127), "f16": (10, -14, 15), "bf16": (7, -126, 127)}
CODES = {"f64": "<d", "f32": "<f", "f16": "<e"}


def to_float(bits: int, kind: str) -> float:
    if kind == "bf16":
        return to_float(bits << 16, "f32")
    size = {"f64": 8, "f32": 4, "f16": 2}[kind]
    return struct.unpack(CODES[kind], bits.to_bytes(size, "little"))[0]


def to_bits(x: float, kind: str) -> int:
    """Of a float that the format represents exactly."""
    if math.isnan(x):
        return {"f64": 0x7FF8000000000000, "f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}[kind]
    if kind == "bf16":
        return to_bits(x, "f32") >> 16
    return int.from_bytes(struct.pack(CODES[kind], x), "little")


def round_to_format(x: Fraction, kind: str, mode: str = "rn", zero: float = 0.0) -> float:
    """Rounds an exact number. zero: the signed zero to return for an exact 0."""
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
        0, 1 << 63, 1, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x3FF0000000000000, 0xBFF0000000000001,
        0x3FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000, 0x3CA0000000000000,
        0x4340000000000001, 0x4008000000000000,
    ],
    "f16": [0, 0x8000, 1, 0x83FF, 0x0400, 0x3C00, 0xBC01, 0x3BFF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x1000,
            0x0C00],
    "bf16": [0, 0x8000, 1, 0x807F, 0x0080, 0x3F80, 0xBF81, 0x3F7F, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x3B80,
             0x3B00],
}  # fmt: skip
WIDTH = {"f32": "32", "f64": "64", "f16": "16", "bf16": "16"}


def assert_same(got: list[int], expected: list[float], kind: str, inputs) -> None:
    for i, (bits, want) in enumerate(zip(got, expected, strict=True)):
        value = to_float(bits, kind)
        if math.isnan(want):
            assert math.isnan(value), (inputs[i], bits)
        else:
            assert bits == to_bits(want, kind), ([hex(x) for x in inputs[i]], value, want)
