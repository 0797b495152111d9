"""The compiled report: registers, occupancy and loops of each kernel, for each architecture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from rich.console import Console

import flashattn
from flashattn.kernels.configs import SHARED_MEMORY

from . import launches, named_kernel
from .compiled import Kernel, compile_for
from .sass import Loop, find_tensor_loops
from .table import make_console, make_table
from .usage import UsageError


class Call(NamedTuple):
    """A call that launches kernels; the text tells its kernels from those of another call."""

    text: str
    run: Callable[[], object]


class CompiledKernel(NamedTuple):
    kernel: Kernel
    text: str


def make_calls(names: list[str]) -> list[Call]:
    """Calls that launch the project's kernels, at the sizes of a common model."""
    heads = {d: launches.make_attention((1, 4, 1024, d), causal=True, backward=True) for d in (64, 128)}
    found = {
        "attention": [Call(f"head_dim {d}", work.run) for d, work in heads.items()],
        "norm": [Call(f"{'rms' if rms else 'layer'} 4096", launches.make_norm((64, 4096), backward=True, rms=rms).run)
                 for rms in (False, True)],
        "decode": [Call("head_dim 128", launches.make_decode((4, 8, 512, 128)).run)],
    }  # fmt: skip
    return [call for name in names for call in found[name]]


def compile_all(calls: list[Call], architectures: list[str], console: Console) -> list[CompiledKernel]:
    kernels = []
    with console.status("compiling") as status:
        for architecture in architectures:
            status.update(f"compiling for {architecture}")
            for call in calls:
                with compile_for(architecture) as found, flashattn.use_backend("triton"):
                    call.run()
                kernels += [CompiledKernel(kernel, call.text) for kernel in found]
    return sorted(dict.fromkeys(kernels), key=lambda c: (c.kernel.name, c.text))  # architectures stay in order


def find_loops(kernel: Kernel) -> list[Loop]:
    return find_tensor_loops(kernel.code) if kernel.architecture.startswith("sm_") else []


def print_kernels(console: Console, kernels: list[CompiledKernel]) -> bool:
    """The table; False if a kernel does not fit its architecture."""
    numbers = ["warps", "registers", "spills", "stack", "shared", "occupancy", "tensor"]
    console.print(make_table(["kernel", "call", "arch"], numbers, format_kernels(kernels)))
    console.print(
        "registers: per thread; spills: instructions that access local memory; stack, shared: bytes per thread, per"
    )
    console.print("block; occupancy: resident warps / the most that a multiprocessor holds; tensor: instructions")
    return all(is_launchable(kernel) for kernel, _ in kernels)


def is_launchable(kernel: Kernel) -> bool:
    return kernel.shared_bytes <= SHARED_MEMORY[kernel.architecture]


def format_kernels(kernels: list[CompiledKernel]) -> Iterator[list[str] | None]:
    """A section for each kernel and call, a row for each architecture."""
    before = None
    for kernel, text in kernels:
        is_new = before != (kernel.name, text)
        if is_new and before is not None:
            yield None
        before = kernel.name, text
        yield [
            kernel.name if is_new else "", text if is_new else "", kernel.architecture, str(kernel.warps),
            str(kernel.registers), str(kernel.spills or "."), str(kernel.stack_bytes or "."),
            f"{kernel.shared_bytes:,}" + ("" if is_launchable(kernel) else " TOO MUCH"), f"{kernel.occupancy:.0%}",
            str(kernel.tensor_instructions or "."),
        ]  # fmt: skip


KINDS = ["tensor", "fma", "special", "float", "integer", "shared", "global", "local", "control", "other"]


def print_loops(console: Console, kernels: list[CompiledKernel]) -> None:
    """The innermost loops of machine code with tensor instructions."""
    rows = list(format_loops(kernels))
    if rows:
        console.print(make_table(["loop in", "", "arch"], ["at", "length", *KINDS, "slots/KFLOP"], rows))
        console.print(
            "slots/KFLOP: issue slots of other instructions per 1,024 tensor FLOPs of a warp, less is better; '.':"
        )
        console.print("sm_100's code does not give the shape of a product. Length and mix: instructions per iteration")


def format_loops(kernels: list[CompiledKernel]) -> Iterator[list[str]]:
    for kernel, text in kernels:
        for loop in find_loops(kernel):
            mix = [str(loop.mix.get(kind) or ".") for kind in KINDS]
            slots = "." if loop.overhead is None else f"{loop.overhead:.2f}"
            yield [kernel.name, text, kernel.architecture, f"{loop.start:#x}", str(loop.instructions), *mix, slots]


def write_json(kernels: Iterable[CompiledKernel], file: Path) -> None:
    with file.open("w", encoding="utf-8") as out:
        for kernel, text in kernels:
            figures = dataclasses.asdict(kernel)
            del figures["code"]
            loops = [loop._asdict() | {"slots_per_kflop": loop.overhead} for loop in find_loops(kernel)]
            out.write(json.dumps({**figures, "call": text, "occupancy": kernel.occupancy, "loops": loops}) + "\n")


def run(what: list[str], architectures: list[str], json_file: Path | None) -> int:
    """0: all fit; 1: one does not."""
    console = make_console(160)
    named = [word for word in what if ".py" in word]
    if named:
        calls = [Call("", named_kernel.make_launch(named[0], [word for word in what if word != named[0]]))]
    else:
        unknown = [word for word in what if word not in ("attention", "norm", "decode")]
        if unknown:
            raise UsageError(
                f"takes attention, norm, decode or file.py:function with its arguments, got {unknown[0]!r}"
            )
        calls = make_calls(what or ["attention", "norm", "decode"])
    kernels = compile_all(calls, architectures, console)
    console.print(f"compiled by Triton {triton.__version__} for {', '.join(architectures)}; nothing was run")
    fits = print_kernels(console, kernels)
    print_loops(console, kernels)
    if json_file:
        write_json(kernels, json_file)
    return 0 if fits else 1
