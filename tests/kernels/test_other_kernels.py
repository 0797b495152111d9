"""The assembler's part in running the kernels of another GPU; their results need a GPU (`--kernels-of`)."""

import pytest

from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.other_kernels import can_run_kernels_of, use_kernels_of


@triton.jit
def copy(x, y):
    tl.store(y, tl.load(x))


def test_later_gpus_with_room_run_them():
    assert can_run_kernels_of("sm_80", "sm_90")
    assert can_run_kernels_of("sm_89", "sm_100")
    assert not can_run_kernels_of("sm_89", "sm_80")
    assert not can_run_kernels_of("sm_80", "sm_89")  # too little shared memory


def test_the_machine_code_is_for_the_gpu_at_hand():
    source = ASTSource(copy, {"x": "*fp32", "y": "*fp32"})
    with use_kernels_of("sm_89", own="sm_90"):
        compiled = triton.compile(source, target=GPUTarget("cuda", 89, 32))
    assert ".target sm_89" in compiled.asm["ptx"]
    assert compiled.asm["cubin"][48] == 90  # e_flags of the ELF header
