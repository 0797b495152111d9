"""The kernels compile to the opcodes that `opcodes.json` has for this version of Triton, with as many registers, spills
and bytes of shared memory.

A refactoring leaves the table equal, and so proves that it changed no kernel. A change that means to change a kernel
records it anew (`python -m tests.kernels.record_opcodes`; words choose cases) and says why in its commit. Here some
cases are compiled, with every kernel among them; `python -m tests.kernels.record_opcodes --check` compiles all.
"""

import pytest

from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

pytest.importorskip("triton")

from tests.kernels import opcodes
from tests.kernels.record_opcodes import differences

SAMPLE = [
    ("causal", "sm_90"), ("everything", "sm_80"), ("packed", "gfx942"), ("window", "sm_80"), ("block_mask", "gfx942"),
    ("paged, modified", "sm_80"), ("decode several", "gfx942"), ("layer_norm everything", "sm_80"),
    ("layer_norm wide", "gfx942"), ("everything, twice", "sm_80"), ("layer_norm wide, twice", "gfx942"),
    ("layer_norm, jvp", "sm_90"),
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded():
    table = opcodes.read_table()
    if not table:
        pytest.skip("opcodes.json is of another version of Triton")
    return table


@pytest.mark.parametrize("case, architecture", SAMPLE)
def test_opcodes_are_those_recorded(case, architecture, recorded):
    found = {case: {architecture: opcodes.compile_case(case, architecture)}}
    assert not differences(found, recorded)


def test_the_sample_has_every_kernel(recorded):
    every = {kernel for archs in recorded.values() for kernels in archs.values() for kernel in kernels}
    assert every == {kernel for case, architecture in SAMPLE for kernel in recorded[case][architecture]}


def test_every_case_is_recorded(recorded):
    assert {(case, arch) for case, archs in recorded.items() for arch in archs} == set(opcodes.jobs([]))
