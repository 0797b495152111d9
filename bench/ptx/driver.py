"""A Triton driver whose GPU is the PTX machine: under `with device("sm_80"):` launches on CPU tensors run there."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import triton
from triton.backends.driver import GPUDriver
from triton.backends.nvidia import driver as nvidia
from triton.runtime.cache import get_cache_manager

from flashattn.kernels.configs import SHARED_MEMORY

from ..compiled import MULTIPROCESSOR, NoDriver, driver, unassembled
from .counts import Counts
from .faults import Fault
from .machine import MAX_INSTRUCTIONS, execute
from .memory import Named, named
from .parse import parse
from .program import Program
from .rates import bounds, gpu_of
from .tensor_maps import encode_map

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
# From Triton 3.8 on it takes a third argument, which it does not use.
UNUSED = (None,) * (len(inspect.signature(nvidia.make_tensordesc_arg).parameters) - 2)


class Launch(NamedTuple):
    """One launch that ran: what it was and what it did."""

    kernel: str
    architecture: str
    grid: tuple[int, int, int]
    threads: int  # of a block
    shared_bytes: int
    counts: Counts

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@contextlib.contextmanager
def device(architecture: str, *, max_instructions: int = MAX_INSTRUCTIONS) -> Iterator[Device]:
    """Within the block every Triton kernel that is launched on CPU tensors is compiled for `architecture` ("sm_80",
    "sm_90" …) and executed by the PTX machine. `launches` of what it gives is the list of what ran, with its counts.

    Raises `Fault` where a kernel does what a GPU would punish or would let pass unseen: the tensor, block, thread, PTX
    line and Python line are in it. max_instructions: of one warp, past it a kernel counts as endless.

    It models results, order and counts. It models no time, no caches and no occupancy.

    >>> import torch, triton, triton.language as tl
    >>> from bench import ptx
    >>> with ptx.device("sm_80") as gpu:  # doctest: +SKIP
    ...     add_kernel[(4,)](x, y, out, 1000, BLOCK=256)
    >>> gpu.launches[0].counts.total("global_bytes")  # doctest: +SKIP
    12000
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    gpu = Device(architecture, max_instructions)
    with driver(gpu), unassembled():
        yield gpu


class Device(NoDriver, GPUDriver):
    """What Triton asks of a driver."""

    def __init__(self, architecture: str, max_instructions: int):
        NoDriver.__init__(self, architecture)
        self.max_instructions = max_instructions
        self.launches: list[Launch] = []
        self.utils = self
        self.launcher_cls = Launcher

    def show(self, lines: bool = False) -> None:
        """Print what the launches did; lines: with the counts of each line of Python."""
        from ..report import make_console
        from . import report  # which knows of Launch

        console = make_console(200)
        for launch in self.launches:
            report.print_launch(console, launch)
            if lines:
                report.print_lines(console, launch)

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia.ty_to_cpp(ty)

    def get_benchmarker(self):
        """For autotuning: runs the kernel once, and takes its bound for its time."""

        def once(call, *, quantiles, **_):
            before = len(self.launches)
            call()
            least = [bounds(x.counts, x.architecture, x.blocks)[0].microseconds for x in self.launches[before:]]
            return [sum(least) / 1e3] * len(quantiles)

        return once

    def get_device_properties(self, number: int) -> dict[str, int]:
        """Of the GPU, but for its multiprocessors: a kernel that launches a block for each has one block here. Clocks
        are in kHz; the memory's and its bus are such that they make its bandwidth."""
        gpu, bus = gpu_of(self.architecture), 4096  # bits
        return {
            "max_shared_mem": SHARED_MEMORY[self.architecture], "warpSize": 32, "multiprocessor_count": 1,
            "max_num_regs": MULTIPROCESSOR[self.architecture].registers, "sm_clock_rate": int(gpu.clock * 1e6),
            "mem_clock_rate": int(gpu.bandwidth * 1e6 * 8 / 2 / bus), "mem_bus_width": bus,
        }  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, number: int) -> tuple:
        """(module, function, registers of a thread, spills, most threads of a block). The assembler never ran: a thread
        counts as having all registers that it may have."""
        return name, name, most_registers(binary.decode(), MULTIPROCESSOR[self.architecture].registers), 0, 1024

    def fill_tma_descriptor_tiled(self, base, swizzle, itemsize, element, box, sizes, strides, fill) -> np.ndarray:
        """The numbers of element types differ between the CUDA driver and PTX."""
        element = {8: 9, 9: 10, 10: 8}.get(element, element)
        return np.frombuffer(encode_map(base, element, sizes, strides, box, swizzle, fill), np.uint8)

    fill_tma_descriptor = fill_tma_descriptor_tiled  # its name in Triton 3.6

    def allocate(self, size: int, align: int) -> torch.Tensor:
        """Workspace that a kernel asks for."""
        memory = torch.zeros(size + align, dtype=torch.uint8)
        return memory[-memory.data_ptr() % align :][:size]


def most_registers(ptx: str, registers: int) -> int:
    """That a thread of a kernel may have, of those of a multiprocessor."""
    threads, bound = (re.search(rf"\.{name}\s+(\d+)", ptx) for name in ("reqntid", "maxnreg"))
    share = registers // int(threads.group(1)) // 8 * 8 if threads else 255
    return min(255, share, int(bound.group(1)) if bound else 255)


class Launcher:
    """What a compiled kernel calls to launch: the arguments become the bytes of the kernel's parameters."""

    def __init__(self, src, metadata):
        if getattr(metadata, "num_ctas", 1) != 1:
            raise Fault("unsupported", f"{metadata.name} runs in clusters of {metadata.num_ctas} blocks")
        self.metadata = metadata
        self.signature = src.signature  # name -> type
        self.descriptors = getattr(metadata, "tensordesc_meta", None)

    @property
    def program(self) -> Program:
        return load(self.metadata.hash, self.metadata.name, self.metadata.shared)

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        gpu = triton.runtime.driver.active
        if enter is not None:
            enter(launch_metadata)
        grid = (x, y, z)
        values, tensors = self.flatten(args)
        for kind in ("global", "profile"):
            size = getattr(self.metadata, f"{kind}_scratch_size") * x * y * z
            scratch = gpu.allocate(size, getattr(self.metadata, f"{kind}_scratch_align")) if size else None
            values.append(scratch)
            tensors.append((f"{kind} scratch", scratch))
        program = self.program
        params = pack(program, values)
        threads = self.metadata.num_warps * 32
        counts = execute(program, grid, threads, params, extents(tensors), gpu.max_instructions)
        gpu.launches.append(Launch(self.metadata.name, gpu.architecture, grid, threads, program.shared_bytes, counts))
        if leave is not None:
            leave(launch_metadata)

    def flatten(self, args: tuple) -> tuple[list, list[tuple[str, object]]]:
        """(the values of the compiled kernel's parameters in their order, each tensor among them with its name)."""
        values: list[object] = []
        tensors: list[tuple[str, object]] = []
        descriptors = iter(self.descriptors or [])

        def visit(name, kind, value):
            if isinstance(kind, tuple):
                fields = getattr(type(value), "_fields", range(len(kind)))
                for field, k, v in zip(fields, kind, value, strict=True):
                    visit(f"{name}.{field}", k, v)
            elif kind.startswith("tensordesc"):
                tensors.append((name, value.base))
                values.extend(nvidia.make_tensordesc_arg(value, next(descriptors, None), *UNUSED))
            elif kind != "constexpr":
                tensors.append((name, value))
                values.append(value)

        for (name, kind), value in zip(self.signature.items(), args, strict=True):
            visit(name, kind, value)
        return values, tensors


def extents(values: Iterable[tuple[str, object]]) -> list[Named]:
    """Of the tensors among (name, value); they must lie in the CPU's memory."""
    found = []
    for name, value in values:
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise ValueError(f"{name} must be a CPU tensor to run on the PTX machine, got {value.device}")
            found.append(named(name, value))
    return [extent for extent in found if extent is not None]


def pack(program: Program, values: list) -> bytes:
    """The bytes of the kernel's parameters."""
    function = program.function
    if len(values) != len(function.params):
        raise Fault("unsupported", f"{len(values)} arguments for a kernel of {len(function.params)} parameters")
    data = bytearray(function.param_bytes)
    for param, value in zip(function.params, values, strict=True):
        data[param.offset : param.offset + param.bytes] = parameter_bytes(param.type, param.bytes, value)
    return bytes(data)


def parameter_bytes(kind: str, size: int, value) -> bytes:
    if isinstance(value, np.ndarray):  # a tensor map
        return value.tobytes()
    if value is None:
        return bytes(size)
    if isinstance(value, torch.Tensor) or hasattr(value, "data_ptr"):
        return value.data_ptr().to_bytes(8, "little")
    if kind in ("f32", "f64"):
        return struct.pack("<f" if kind == "f32" else "<d", float(value))
    if isinstance(value, float):  # a float16 or bfloat16 scalar comes as bits of a wider parameter
        return struct.pack("<f", value)[:size] if size == 4 else struct.pack("<e", value)
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


def run_text(text: str, *args, grid: tuple[int, ...] = (1,), threads: int = 32) -> Counts:
    """Runs the first kernel of a PTX text on CPU tensors, whole numbers and floats, one for each parameter.

    >>> import torch
    >>> out = torch.zeros(32, dtype=torch.int32)
    >>> counts = run_text('''.target sm_80
    ... .visible .entry lanes(.param .u64 out) {
    ...   .reg .b32 %r<2>; .reg .b64 %rd<3>;
    ...   ld.param.b64 %rd1, [out];
    ...   mov.u32 %r1, %tid.x;
    ...   mad.wide.u32 %rd2, %r1, 4, %rd1;
    ...   st.global.b32 [%rd2], %r1;
    ...   ret; }''', out)
    >>> out[:4].tolist(), counts.total("global_sectors")
    ([0, 1, 2, 3], 4)
    """
    module = parse(text)
    program = Program(next(iter(module.kernels.values())), module)
    tensors = extents((f"argument {i}", x) for i, x in enumerate(args))
    return execute(program, (*grid, 1, 1)[:3], threads, pack(program, list(args)), tensors)


@functools.lru_cache(maxsize=16)  # a large kernel takes some 20 MB
def load(hash: str, name: str, shared: int) -> Program:
    """The program of a compiled kernel: Triton keeps the PTX beside the binary in its cache."""
    group = get_cache_manager(hash).get_group(f"{name}.json")
    text = Path(next(path for file, path in group.items() if file.endswith(".ptx"))).read_text()
    module = parse(text, local_file)
    return Program(module.kernels[name], module, shared)


def local_file(path: str) -> str:
    """The file of this process: a kernel may have been compiled, and kept, for the same source in another place."""
    tail = os.sep + os.sep.join(Path(path).parts[-2:])
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and file.endswith(tail):
            return file
    return path
