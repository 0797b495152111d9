"""The compiled report: what the compiler made of each kernel, on each architecture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import triton
from rich import box
from rich.console import Console
from rich.table import Table

import flashattn
from flashattn.kernels.configs import SHARED_MEMORY

from . import launches, named_kernel
from .compiled import Kernel, compile_for
from .report import make_console
from .sass import Loop, tensor_loops

ARCHITECTURES = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1100", "gfx1201"]


class Call(NamedTuple):
    """What launches kernels, and what tells its kernels from another call's."""

    text: str
    run: Callable[[], object]


class Compiled(NamedTuple):
    kernel: Kernel
    text: str


def project_launches(names: list[str]) -> list[Call]:
    """Calls whose launches are the project's kernels, at the sizes of a usual model."""
    heads = {d: launches.attention((1, 4, 1024, d), causal=True, backward=True) for d in (64, 128)}
    found = {
        "attention": [Call(f"head_dim {d}", work.run) for d, work in heads.items()],
        "norm": [Call(f"{'rms' if rms else 'layer'} 4096", launches.norm((64, 4096), backward=True, rms=rms).run)
                 for rms in (False, True)],
        "decode": [Call("head_dim 128", launches.decode((4, 8, 512, 128)).run)],
    }  # fmt: skip
    return [call for name in names for call in found[name]]


def compile_all(calls: list[Call], architectures: list[str], console: Console) -> list[Compiled]:
    kernels = []
    with console.status("compiling") as status:
        for architecture in architectures:
            status.update(f"compiling for {architecture}")
            for call in calls:
                with compile_for(architecture) as found, flashattn.use_backend("triton"):
                    call.run()
                kernels += [Compiled(kernel, call.text) for kernel in found]
    return sorted(dict.fromkeys(kernels), key=lambda c: (c.kernel.name, c.text))  # architectures stay in order


def loops_of(kernel: Kernel) -> list[Loop]:
    return tensor_loops(kernel.code) if kernel.architecture.startswith("sm_") else []


def print_kernels(console: Console, kernels: Iterable[Compiled]) -> bool:
    """The table; False if a kernel does not fit its architecture."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("kernel", "of", "arch"):
        table.add_column(name, no_wrap=True)
    for name in ("warps", "registers", "spills", "stack", "shared", "occupancy", "tensor"):
        table.add_column(name, justify="right", no_wrap=True)
    fits, before = True, None
    for kernel, text in kernels:
        over = kernel.shared_bytes > SHARED_MEMORY[kernel.architecture]
        fits &= not over
        if before is not None and before != (kernel.name, text):
            table.add_section()
        same = before == (kernel.name, text)
        table.add_row(
            "" if same else kernel.name, "" if same else text, kernel.architecture, str(kernel.warps),
            str(kernel.registers), str(kernel.spills or "."), str(kernel.stack_bytes or "."),
            f"{kernel.shared_bytes:,}" + (" TOO MUCH" if over else ""), f"{kernel.occupancy:.0%}",
            str(kernel.tensor_instructions or "."),
        )  # fmt: skip
        before = kernel.name, text
    console.print(table)
    console.print(
        "registers: of a thread; spills: instructions that store or load what did not fit them; stack, shared:"
    )
    console.print(
        "bytes of a thread, of a block; occupancy: share of a multiprocessor's warps that fit; tensor: instructions"
    )
    return fits


def print_loops(console: Console, kernels: Iterable[Compiled]) -> None:
    """The innermost loops of machine code that hold tensor instructions."""
    kinds = ["tensor", "fma", "special", "float", "integer", "shared", "global", "local", "control", "other"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("loop of", "", "arch"):
        table.add_column(name, no_wrap=True)
    for name in ("at", "length", *kinds, "slots/KFLOP"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = 0
    for kernel, text in kernels:
        for loop in loops_of(kernel):
            each = [str(loop.mix.get(kind) or ".") for kind in kinds]
            slots = "." if loop.overhead is None else f"{loop.overhead:.2f}"
            table.add_row(
                kernel.name, text, kernel.architecture, f"{loop.start:#x}", str(loop.instructions), *each, slots
            )
            rows += 1
    if rows:
        console.print(table)
        console.print(
            "slots/KFLOP: issue slots of other instructions for 1,024 tensor FLOPs of a warp, less is better; '.':"
        )
        console.print("sm_100's code does not tell the shape of a product. Length and mix: instructions of one turn")


def write_json(kernels: Iterable[Compiled], file: Path) -> None:
    with file.open("w", encoding="utf-8") as out:
        for kernel, text in kernels:
            figures = dataclasses.asdict(kernel)
            del figures["code"]
            loops = [loop._asdict() | {"slots_per_kflop": loop.overhead} for loop in loops_of(kernel)]
            out.write(json.dumps({**figures, "of": text, "occupancy": kernel.occupancy, "loops": loops}) + "\n")


def run(what: list[str], architectures: list[str], json_file: Path | None) -> int:
    """0: all fit; 1: one does not."""
    console = make_console(160)
    named = [word for word in what if ".py" in word]
    if named:
        calls = [Call("", named_kernel.launch(named[0], [word for word in what if word != named[0]]))]
    else:
        unknown = [word for word in what if word not in ("attention", "norm", "decode")]
        if unknown:
            raise named_kernel.UsageError(
                f"takes attention, norm, decode or file.py:function with its arguments, got {unknown[0]!r}"
            )
        calls = project_launches(what or ["attention", "norm", "decode"])
    kernels = compile_all(calls, architectures, console)
    console.print(f"compiled by Triton {triton.__version__} for {', '.join(architectures)}; nothing was run")
    fits = print_kernels(console, kernels)
    print_loops(console, kernels)
    if json_file:
        write_json(kernels, json_file)
    return 0 if fits else 1
