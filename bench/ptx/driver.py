"""A Triton driver for the PTX machine: within `with device("sm_80"):` it executes launches on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import triton
from triton.backends.driver import GPUDriver
from triton.backends.nvidia import driver as nvidia
from triton.runtime.cache import get_cache_manager

from flashattn.kernels.configs import SHARED_MEMORY

from ..architectures import MULTIPROCESSOR
from ..compiled import NoDriver, skip_assembler, use_driver
from ..table import make_console
from . import instructions, report  # noqa: F401  (instructions registers them)
from .faults import Fault, Judge
from .frontend.parse import parse
from .frontend.program import Program
from .machine.counts import Counts, Launch
from .machine.execute import MAX_INSTRUCTIONS, execute
from .memory.extents import TensorExtent, make_extent, unwrap_tensor
from .memory.tensor_maps import encode_map
from .memory.uninitialised import UninitialisedMemory
from .rates import compute_bounds, find_gpu

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
# Since Triton 3.8 it takes a third argument, which it does not use.
UNUSED = (None,) * (len(inspect.signature(nvidia.make_tensordesc_arg).parameters) - 2)


@contextlib.contextmanager
def device(
    architecture: str, *, max_instructions: int = MAX_INSTRUCTIONS, on_fault: str | Mapping[str, str] = ()
) -> Iterator[Device]:
    """Within the context every Triton kernel that is launched on CPU tensors is compiled for `architecture` ("sm_80",
    "sm_90" …) and executed by the PTX machine. The device's `launches` lists what ran, with its counts.

    Raises `Fault` at an error that would stop a GPU, or pass unnoticed on it; it names the kernel, tensor, element,
    block, thread, PTX line and Python line. on_fault: "raise", "note" (keep it in the device's `notes` and go on) or
    "ignore", for all kinds of `ptx.CHOICES` or as {kind: choice}; the default is `ptx.CHOICES`. Faults after which a
    kernel cannot go on are always raised. max_instructions: of one warp, more count as an endless loop.

    It models results, memory ordering and counts. It does not model time, caches or occupancy.

    >>> import torch, triton, triton.language as tl
    >>> from bench import ptx
    >>> with ptx.device("sm_80") as gpu:  # doctest: +SKIP
    ...     add_kernel[(4,)](x, y, out, 1000, BLOCK=256)
    >>> gpu.launches[0].counts.total("global_bytes")  # doctest: +SKIP
    12000
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    gpu = Device(architecture, max_instructions, on_fault)
    with use_driver(gpu), skip_assembler(), gpu.unwritten.watch():
        yield gpu


class Device(NoDriver, GPUDriver):
    """The interface of a Triton driver."""

    def __init__(self, architecture: str, max_instructions: int, on_fault: str | Mapping[str, str]):
        NoDriver.__init__(self, architecture)
        self.max_instructions, self.judge, self.unwritten = max_instructions, Judge(on_fault), UninitialisedMemory()
        self.launches: list[Launch] = []
        self.utils = self
        self.launcher_cls = Launcher

    @property
    def notes(self) -> list[Fault]:
        """The faults that were noted: the first of each kind, kernel, instruction and tensor."""
        return self.judge.notes

    def show(self, lines: bool = False) -> None:
        """Prints the counts of the launches. lines: also for each line of Python."""
        console = make_console(200)
        for launch in self.launches:
            report.print_launch(console, launch)
            if lines:
                report.print_lines(console, launch)
        for note in self.notes:
            console.print(f"noted: {note}", markup=False, highlight=False)

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia.ty_to_cpp(ty)

    def get_benchmarker(self):
        """For autotuning: runs the kernel once and returns its lower bound as its time."""

        def once(call, *, quantiles, **_):
            before = len(self.launches)
            call()
            least = [compute_bounds(x.counts, x.architecture, x.blocks)[0].microseconds for x in self.launches[before:]]
            return [sum(least) / 1e3] * len(quantiles)

        return once

    def get_device_properties(self, number: int) -> dict[str, int]:
        """Those of the GPU, but with one multiprocessor, so that persistent kernels launch one block. Clocks are in
        kHz; memory clock and bus width give the bandwidth."""
        gpu, bus = find_gpu(self.architecture), 4096  # bits
        return {
            "max_shared_mem": SHARED_MEMORY[self.architecture], "warpSize": 32, "multiprocessor_count": 1,
            "max_num_regs": MULTIPROCESSOR[self.architecture].registers, "sm_clock_rate": int(gpu.clock * 1e6),
            "mem_clock_rate": int(gpu.bandwidth * 1e6 * 8 / 2 / bus), "mem_bus_width": bus,
        }  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, number: int) -> tuple:
        """(module, function, registers of a thread, spills, maximum threads of a block). The assembler has not run: a
        thread counts as using all registers that it may use."""
        return name, name, bound_registers(binary.decode(), MULTIPROCESSOR[self.architecture].registers), 0, 1024

    def fill_tma_descriptor_tiled(self, base, swizzle, itemsize, element, box, sizes, strides, fill) -> np.ndarray:
        """The CUDA driver and PTX number the element types differently."""
        element = {8: 9, 9: 10, 10: 8}.get(element, element)
        return np.frombuffer(encode_map(base, element, sizes, strides, box, swizzle, fill), np.uint8)

    fill_tma_descriptor = fill_tma_descriptor_tiled  # its name in Triton 3.6

    def allocate(self, size: int, align: int) -> torch.Tensor:
        """Workspace for a kernel."""
        memory = torch.empty(size + align, dtype=torch.uint8)
        return memory[-memory.data_ptr() % align :][:size]


def bound_registers(ptx: str, registers: int) -> int:
    """The registers that a thread may use, given those of a multiprocessor."""
    threads, bound = (re.search(rf"\.{name}\s+(\d+)", ptx) for name in ("reqntid", "maxnreg"))
    share = registers // int(threads.group(1)) // 8 * 8 if threads else 255
    return min(255, share, int(bound.group(1)) if bound else 255)


class Argument(NamedTuple):
    """The value of a parameter of a compiled kernel, and the tensor that it gives access to."""

    name: str
    value: object
    tensor: torch.Tensor | None = None


class Launcher:
    """Launches a compiled kernel: encodes its arguments as the bytes of its parameters."""

    def __init__(self, src, metadata):
        if getattr(metadata, "num_ctas", 1) != 1:
            raise Fault("unsupported", f"{metadata.name} runs in clusters of {metadata.num_ctas} blocks")
        self.metadata = metadata
        self.signature = src.signature  # name -> type
        self.descriptors = getattr(metadata, "tensordesc_meta", None)

    @property
    def program(self) -> Program:
        return load_program(self.metadata.hash, self.metadata.name, self.metadata.shared)

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        gpu = triton.runtime.driver.active
        if enter is not None:
            enter(launch_metadata)
        grid = (x, y, z)
        values = self.flatten(args)
        for kind in ("global", "profile"):
            size = getattr(self.metadata, f"{kind}_scratch_size") * x * y * z
            scratch = gpu.allocate(size, getattr(self.metadata, f"{kind}_scratch_align")) if size else None
            values.append(Argument(f"{kind} scratch", scratch, scratch))
        program = self.program
        params = pack_params(program, [argument.value for argument in values])
        threads = self.metadata.num_warps * 32
        tensors = find_extents(program, values)
        counts = execute(program, grid, threads, params, tensors, gpu.judge, gpu.unwritten, gpu.max_instructions)
        gpu.launches.append(Launch(self.metadata.name, gpu.architecture, grid, threads, program.shared_bytes, counts))
        if leave is not None:
            leave(launch_metadata)

    def flatten(self, args: tuple) -> list[Argument]:
        """The arguments in the order of the compiled kernel's parameters."""
        found: list[Argument] = []
        descriptors = iter(self.descriptors or [])

        def visit(name, kind, value):
            if isinstance(kind, tuple):
                fields = getattr(type(value), "_fields", range(len(kind)))
                for field, k, v in zip(fields, kind, value, strict=True):
                    visit(f"{name}.{field}", k, v)
            elif kind.startswith("tensordesc"):
                first, *rest = nvidia.make_tensordesc_arg(value, next(descriptors, None), *UNUSED)
                found.append(Argument(name, first, unwrap_tensor(value.base)))
                found.extend(Argument(name, x) for x in rest)
            elif kind != "constexpr":
                found.append(Argument(name, value, unwrap_tensor(value)))

        for (name, kind), value in zip(self.signature.items(), args, strict=True):
            visit(name, kind, value)
        return found


def find_extents(program: Program, arguments: list[Argument]) -> list[TensorExtent]:
    """The extents of the tensors among the arguments, which must be CPU tensors."""
    found = []
    for param, (name, _, tensor) in zip(program.function.params, arguments, strict=False):
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must be a CPU tensor to run on the PTX machine, got {tensor.device}")
        found.append(make_extent(name, tensor, param.name))
    return [extent for extent in found if extent is not None]


def pack_params(program: Program, values: list) -> bytes:
    """The bytes of the kernel's parameters."""
    function = program.function
    if len(values) != len(function.params):
        raise Fault("unsupported", f"{len(values)} arguments for a kernel of {len(function.params)} parameters")
    data = bytearray(function.param_bytes)
    for param, value in zip(function.params, values, strict=True):
        data[param.offset : param.offset + param.bytes] = encode_param(param.type, param.bytes, value)
    return bytes(data)


def encode_param(kind: str, size: int, value) -> bytes:
    if isinstance(value, np.ndarray):  # a tensor map
        return value.tobytes()
    if value is None:
        return bytes(size)
    if isinstance(value, torch.Tensor) or hasattr(value, "data_ptr"):
        return value.data_ptr().to_bytes(8, "little")
    if kind in ("f32", "f64"):
        return struct.pack("<f" if kind == "f32" else "<d", float(value))
    if isinstance(value, float):  # a float16 or bfloat16 scalar is the bits of a wider parameter
        return struct.pack("<f", value)[:size] if size == 4 else struct.pack("<e", value)
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


def run_text(text: str, *args, grid: tuple[int, ...] = (1,), threads: int = 32, judge: Judge | None = None) -> Counts:
    """Runs the first kernel of a PTX text on CPU tensors, integers and floats, one for each parameter. judge: handles
    faults, as `on_fault` of `device` does.

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
    tensors = find_extents(program, [Argument(f"argument {i}", x, unwrap_tensor(x)) for i, x in enumerate(args)])
    return execute(
        program,
        (*grid, 1, 1)[:3],
        threads,
        pack_params(program, list(args)),
        tensors,
        judge or Judge(),
        UninitialisedMemory(),
    )


@functools.lru_cache(maxsize=16)  # a large program takes some 20 MB
def load_program(hash: str, name: str, shared: int) -> Program:
    """The program of a compiled kernel, whose PTX is beside the binary in Triton's cache."""
    group = get_cache_manager(hash).get_group(f"{name}.json")
    text = Path(next(path for file, path in group.items() if file.endswith(".ptx"))).read_text()
    module = parse(text, find_local_file)
    return Program(module.kernels[name], module, shared)


def find_local_file(path: str) -> str:
    """The file in this process: a cached kernel may come from the same source in another directory."""
    tail = os.sep + os.sep.join(Path(path).parts[-2:])
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and file.endswith(tail):
            return file
    return path
