"""Kernels compiled ahead of time, without a GPU, and what the compiler made of them.

with compile_for("sm_90") as kernels:
    flashattn.backends.triton.forward(q, k, v, score)   # on CPU tensors: compiles, launches nothing
print(kernels[0].registers, kernels[0].stack_bytes)
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

WAVE_64 = ("gfx90a", "gfx942", "gfx950")  # AMD architectures with 64 threads in a wavefront; the others have 32
# Names of the matrix instructions in SASS and in AMD assembly.
TENSOR_INSTRUCTION = re.compile(r"\b(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)\b|\bv_(mfma|wmma|smfmac)_")


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    stack_bytes: int  # local memory a thread: what did not fit the registers
    spills: int  # instructions that store to or load from it
    shared_bytes: int
    tensor_instructions: int


def target(architecture: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as Triton's target."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64 if architecture in WAVE_64 else 32)


class NoDriver:
    """A driver that names a GPU but has none."""

    ids: ClassVar[
        dict[str, int]
    ] = {}  # Triton caches kernels by device number, so each architecture has one of its own

    def __init__(self, architecture: str):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return target(self.architecture)

    def get_current_device(self) -> int:
        return self.ids.setdefault(self.architecture, len(self.ids))

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_for(architecture: str) -> Iterator[list[Kernel]]:
    """Within the block every Triton launch compiles for `architecture` and is reported in the list, but not run."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing is compiled")
    kernels: list[Kernel] = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(inspect(compiled, architecture))
        return compiled

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(NoDriver(architecture))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = launch
        driver._active = before


def inspect(compiled, architecture: str) -> Kernel:
    figures = inspect_nvidia(compiled) if architecture.startswith("sm_") else inspect_amd(compiled)
    return Kernel(compiled.metadata.name, architecture, *figures[:3], compiled.metadata.shared, figures[3])


def inspect_nvidia(compiled) -> tuple[int, int, int, int]:
    """(registers, stack bytes, spill instructions, tensor instructions) from the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return registers, stack, len(re.findall(r"\b(?:STL|LDL)\b", sass)), len(TENSOR_INSTRUCTION.findall(sass))


def inspect_amd(compiled) -> tuple[int, int, int, int]:
    """The same from the assembly text."""
    text = compiled.asm["amdgcn"]
    registers, scratch, spills = (
        int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))
        for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    return registers, scratch, spills, len(TENSOR_INSTRUCTION.findall(text))


@functools.cache
def tool_path(name: str) -> str:
    """A CUDA binary tool, from the Triton wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def run_tool(name: str, *args: str) -> str:
    return subprocess.run([tool_path(name), *args], capture_output=True, text=True, check=True).stdout
