"""Loops of tensor instructions in NVIDIA's machine code."""

import pytest

from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.compiled import compile_for
from bench.sass import find_tensor_loops
from tests.ptx import rings

HGMMA = "HGMMA.64x64x16.F32 R24, gdesc[UR12], R24"


def list_loops(*lines: str) -> list[tuple[int, int]]:
    """(first instruction, instructions) of each loop; labels end with a colon."""
    text, at = [], 0
    for line in lines:
        text.append(line if line.endswith(":") else f"        /*{16 * at:04x}*/    {line} ;")
        at += not line.endswith(":")
    return [(loop.start // 16, loop.instructions) for loop in find_tensor_loops("\n".join(text))]


def test_innermost_loops():
    inner = [".L_x_2:", HGMMA, "@P1 BRA `(.L_x_2)"]
    assert list_loops(".L_x_1:", "NOP", *inner, "@!P0 BRA `(.L_x_1)", "EXIT") == [(1, 2)]
    assert list_loops(".L_x_1:", HGMMA, "@P2 EXIT", "@!P0 BRA `(.L_x_1)", "EXIT") == [(0, 3)]
    assert list_loops(".L_x_1:", "NOP", "@!P0 BRA `(.L_x_1)", HGMMA, "EXIT") == []


def test_a_wait_after_the_code_is_no_loop():
    wait = [".L_x_3:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R3", "@!P0 BRA `(.L_x_3)", "BRA `(.L_x_2)"]
    assert list_loops("@!P0 BRA `(.L_x_3)", ".L_x_2:", HGMMA, "EXIT", *wait) == []
    body = [".L_x_1:", "@!P0 BRA `(.L_x_3)", ".L_x_2:", HGMMA, "@P1 BRA `(.L_x_1)"]
    assert list_loops(*body, "EXIT", *wait) == [(0, 3)]


def test_the_dispatch_of_roles_is_no_loop():
    dispatch = [".L_x_1:", "LDS.U8 R2, [R2]", ".L_x_9:", "BRX R2 -0x1b0"]
    assert list_loops(*dispatch, HGMMA, "BRA `(.L_x_1)", "EXIT") == []
    assert list_loops(*dispatch, ".L_x_2:", HGMMA, "@P0 BRA `(.L_x_2)", "BRA `(.L_x_1)", "EXIT") == [(2, 2)]


def test_a_warp_specialised_kernel():
    """One loop of each consumer."""
    with compile_for("sm_90") as kernels:
        rings.run(tiles=5)
    found = find_tensor_loops(kernels[0].code)
    assert [loop.tensor_instructions for loop in found] == [8, 8]
    assert [loop.flops for loop in found] == [8 * 2 * 64 * 64 * 16 // 4] * 2
