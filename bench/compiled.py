"""Compiles kernels ahead of time, without a GPU, and inspects the machine code.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

import flashattn.backends
from flashattn.kernels import tune

from .architectures import MULTIPROCESSOR, WAVE_64

# Names of the matrix instructions in SASS and in AMD assembly.
TENSOR_INSTRUCTION = re.compile(r"\b(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)\b|\bv_(mfma|wmma|smfmac)_")


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    registers: int  # per thread
    stack_bytes: int  # local memory per thread
    spills: int  # instructions that access it
    shared_bytes: int
    tensor_instructions: int
    warps: int
    code: str = field(repr=False)  # SASS, or AMD's assembly

    @property
    def occupancy(self) -> float:
        """Resident warps / the most that a multiprocessor holds, by registers, shared memory and warps per block."""
        if not self.architecture.startswith("sm_"):
            waves = int(re.search(r"; Occupancy: (\d+)", self.code).group(1))  # per SIMD unit, by the compiler
            return waves / (8 if self.architecture in WAVE_64 else 16)
        limits = MULTIPROCESSOR[self.architecture]
        by_registers = limits.registers // (-(-self.registers * 32 // 256) * 256 * self.warps)  # allocated by 256
        by_shared = limits.shared // (self.shared_bytes + 1024)  # the driver reserves 1 KiB of each block
        return min(limits.blocks, limits.warps // self.warps, by_registers, by_shared) * self.warps / limits.warps


def make_target(architecture: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as Triton's target."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64 if architecture in WAVE_64 else 32)


class NoDriver:
    """A driver for a GPU that does not exist."""

    # Triton caches kernels by device number: each architecture has one, and another for kernels without machine code.
    ids: ClassVar[dict[tuple[str, bool], int]] = {}

    def __init__(self, architecture: str):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return make_target(self.architecture)

    def get_current_device(self) -> int:
        return self.ids.setdefault((self.architecture, CUDABackend.make_cubin is return_ptx), len(self.ids))

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def return_ptx(backend, ptx: str, *_) -> bytes:
    """PTX in place of machine code."""
    return ptx.encode()


@contextlib.contextmanager
def skip_assembler() -> Iterator[None]:
    """Within the block Triton stops at PTX, where machine code is not needed: ptxas takes up to half of the time. Such
    kernels have separate hashes in Triton's cache on disk, so that no GPU gets one."""
    name, assemble = CUDABackend.hash, CUDABackend.make_cubin
    if assemble is return_ptx:
        yield
        return
    CUDABackend.hash = lambda backend: f"{name(backend)}-ptx"
    CUDABackend.make_cubin = return_ptx
    try:
        yield
    finally:
        CUDABackend.hash, CUDABackend.make_cubin = name, assemble


@contextlib.contextmanager
def use_driver(replacement: NoDriver) -> Iterator[None]:
    """Within the block Triton launches on this driver, and the triton backend accepts CPU tensors."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing is compiled")
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(replacement)
    try:
        with flashattn.backends.triton_on_cpu():
            yield
    finally:
        triton.runtime.driver._active = before


@contextlib.contextmanager
def compile_only(architecture: str, report: Callable[[object], None] = lambda compiled: None) -> Iterator[None]:
    """Within the block every Triton launch is compiled for `architecture` and reported, but not run."""
    with use_driver(NoDriver(architecture)), tune.compile_only(report):
        yield


@contextlib.contextmanager
def compile_for(architecture: str) -> Iterator[list[Kernel]]:
    """Within the block every Triton launch is compiled for `architecture` and added to the list, but not run."""
    kernels: list[Kernel] = []
    with compile_only(architecture, lambda compiled: kernels.append(inspect(compiled, architecture))):
        yield kernels


def inspect(compiled, architecture: str) -> Kernel:
    registers, stack, spills, code = (inspect_nvidia if architecture.startswith("sm_") else inspect_amd)(compiled)
    metadata, tensor = compiled.metadata, len(TENSOR_INSTRUCTION.findall(code))
    return Kernel(
        metadata.name, architecture, registers, stack, spills, metadata.shared, tensor, metadata.num_warps, code
    )


def inspect_nvidia(compiled) -> tuple[int, int, int, str]:
    """(registers, stack bytes, spill instructions, code) from the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return registers, stack, len(re.findall(r"\b(?:STL|LDL)\b", sass)), sass


def inspect_amd(compiled) -> tuple[int, int, int, str]:
    """The same from the assembly text."""
    text = compiled.asm["amdgcn"]
    registers, scratch, spills = (
        int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))
        for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    return registers, scratch, spills, text


@functools.cache
def find_tool(name: str) -> str:
    """A CUDA binary tool, from the Triton wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def run_tool(name: str, *args: str) -> str:
    return subprocess.run([find_tool(name), *args], capture_output=True, text=True, check=True).stdout
