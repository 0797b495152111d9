"""The kernels of an older GPU on the one that is there: Triton compiles for the older one, whose PTX later GPUs can run
too, and the assembler makes machine code for the GPU at hand."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ARCHITECTURES = ("sm_80", "sm_86", "sm_89")  # whose PTX is portable: sm_90 is compiled for sm_90a
ASSEMBLER = """#!/usr/bin/env bash
exec "{ptxas}" "${{@/--gpu-name={architecture}/--gpu-name={own}}}"
"""


def can_run_kernels_of(architecture: str, own: str) -> bool:
    from flashattn.kernels.configs import find_shared_memory  # here, since tests run without Triton too

    older, later = (int(name.removeprefix("sm_")) for name in (architecture, own))
    return older <= later and find_shared_memory(architecture) <= find_shared_memory(own)


@contextlib.contextmanager
def use_kernels_of(architecture: str, own: str) -> Iterator[None]:
    """Within the block Triton compiles for `architecture`, and the machine code runs on `own`, as "sm_90"."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        assembler = Path(folder) / "ptxas"
        assembler.write_text(ASSEMBLER.format(ptxas=knobs.nvidia.ptxas.path, architecture=architecture, own=own))
        assembler.chmod(0o755)
        patch.setenv("TRITON_PTXAS_PATH", str(assembler))
        patch.setenv("TRITON_CACHE_DIR", folder)  # Triton's key does not tell the assemblers apart
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        patch.setattr(CudaDriver, "get_current_target", lambda self: target)
        yield
