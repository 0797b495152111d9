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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

import flashattn.backends
from flashattn.kernels import tune

WAVE_64 = ("gfx90a", "gfx942", "gfx950")  # AMD architectures with 64 threads in a wavefront; the others have 32
# Names of the matrix instructions in SASS and in AMD assembly.
TENSOR_INSTRUCTION = re.compile(r"\b(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)\b|\bv_(mfma|wmma|smfmac)_")


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    registers: int  # of a thread
    stack_bytes: int  # local memory a thread: what did not fit the registers
    spills: int  # instructions that store to or load from it
    shared_bytes: int
    tensor_instructions: int
    warps: int
    code: str = field(repr=False)  # SASS, or AMD's assembly

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that fit, by registers, shared memory and warps of a block."""
        if not self.architecture.startswith("sm_"):
            waves = int(re.search(r"; Occupancy: (\d+)", self.code).group(1))  # of a SIMD unit, by the compiler
            return waves / (8 if self.architecture in WAVE_64 else 16)
        limits = MULTIPROCESSOR[self.architecture]
        by_registers = limits.registers // (-(-self.registers * 32 // 256) * 256 * self.warps)  # given out by 256
        by_shared = limits.shared // (self.shared_bytes + 1024)  # of each block the driver keeps 1 KiB
        return min(limits.blocks, limits.warps // self.warps, by_registers, by_shared) * self.warps / limits.warps


class Multiprocessor(NamedTuple):
    registers: int
    warps: int
    blocks: int
    shared: int  # bytes


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MULTIPROCESSOR = {
    "sm_80": Multiprocessor(65536, 64, 32, 167936), "sm_86": Multiprocessor(65536, 48, 16, 102400),
    "sm_87": Multiprocessor(65536, 48, 16, 167936), "sm_89": Multiprocessor(65536, 48, 24, 102400),
    "sm_90": Multiprocessor(65536, 64, 32, 233472), "sm_100": Multiprocessor(65536, 64, 32, 233472),
    "sm_103": Multiprocessor(65536, 64, 32, 233472), "sm_110": Multiprocessor(65536, 48, 24, 233472),
    "sm_120": Multiprocessor(65536, 48, 24, 102400), "sm_121": Multiprocessor(65536, 48, 24, 102400),
}  # fmt: skip


def target(architecture: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as Triton's target."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64 if architecture in WAVE_64 else 32)


class NoDriver:
    """A driver that names a GPU but has none."""

    # Triton caches kernels by device number: each architecture has one, and another for kernels that are not assembled.
    ids: ClassVar[dict[tuple[str, bool], int]] = {}

    def __init__(self, architecture: str):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return target(self.architecture)

    def get_current_device(self) -> int:
        return self.ids.setdefault((self.architecture, CUDABackend.make_cubin is no_cubin), len(self.ids))

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def no_cubin(backend, ptx: str, *_) -> bytes:
    """The text stands for the machine code."""
    return ptx.encode()


@contextlib.contextmanager
def unassembled() -> Iterator[None]:
    """Within the block Triton stops at PTX, for those who read no machine code: ptxas takes up to half of the time.
    Such kernels have names of their own in Triton's cache on disk, so that no GPU is given one."""
    name, assemble = CUDABackend.hash, CUDABackend.make_cubin
    if assemble is no_cubin:
        yield
        return
    CUDABackend.hash = lambda backend: f"{name(backend)}-ptx"
    CUDABackend.make_cubin = no_cubin
    try:
        yield
    finally:
        CUDABackend.hash, CUDABackend.make_cubin = name, assemble


@contextlib.contextmanager
def driver(replacement: NoDriver) -> Iterator[None]:
    """Triton launches on this driver within the block, and flashattn's triton backend takes CPU tensors."""
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
    """Within the block every Triton launch compiles for `architecture`, is reported, and does not run."""
    with driver(NoDriver(architecture)), tune.compile_only(report):
        yield


@contextlib.contextmanager
def compile_for(architecture: str) -> Iterator[list[Kernel]]:
    """Within the block every Triton launch compiles for `architecture` and is reported in the list, but not run."""
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
def tool_path(name: str) -> str:
    """A CUDA binary tool, from the Triton wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def run_tool(name: str, *args: str) -> str:
    return subprocess.run([tool_path(name), *args], capture_output=True, text=True, check=True).stdout
