"""Part "precompile": compiles on all cores what the chosen parts launch, into Triton's cache on disk.

Each case of a part runs on empty CPU tensors of its true shapes, twice: once to list its kernels, and then, in as many
processes as there are cores, to compile one that no other has compiled. What decides on a kernel (its source, the
types, alignment and divisibility of its arguments, its options, the architecture) is the same as on the GPU, so the
launches there find it in the cache; how many did not is in the "tail" line of each part. Peers that torch.compile
has to compile are called once, on the GPU, for the sake of PyTorch's cache.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

import flashattn

from .. import compiled
from .card import cores
from .context import Context, Settings, first_line, ready
from .parts import PARTS, PRECOMPILED


class Job(NamedTuple):
    """A kernel that a case launches, or a peer of it."""

    part: str
    case: int  # its place among the part's
    kernel: str
    key: str | None  # Triton's name for it; None: a peer


def rows(context: Context) -> Iterator[dict]:
    torch.set_num_threads(1)  # before any operation: a pool of threads would not survive the forks below
    with forked(1) as pool:  # not here: autograd refuses to run in the fork of a process where it has run
        jobs = pool.submit(list_jobs, context.settings).result()
    context.plan(len(jobs))
    with forked(min(cores(), max(1, len(jobs)))) as pool:
        running = {pool.submit(run_job, context.settings, job): number for number, job in enumerate(jobs)}
        for future in as_completed(running):
            number = running[future]
            yield {"case": number} | row_of(jobs[number], future)


def forked(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))


def summary(rows: list[dict]) -> list[str]:
    kernels = [row for row in rows if not row["peer"]]
    seconds = sum(row.get("cpu_seconds", 0) for row in kernels)
    failed = sum("failed" in row for row in rows)
    return [f"{len(kernels)} kernels, {seconds:.0f} s of one core; {len(rows) - len(kernels)} peers; {failed} failed"]


def row_of(job: Job, future) -> dict:
    is_peer = job.key is None
    row = {"for": job.part, "of_case": job.case, "kernel": job.kernel, "peer": is_peer}
    try:
        seconds, of_processor = future.result()
        return row | {"seconds": seconds, "cpu_seconds": of_processor}
    except Exception as error:
        return row | {"failed": first_line(error)}  # the part that launches it says so again


def list_jobs(settings: Settings) -> list[Job]:
    """Peers first: they take longest."""
    kernels: dict[str, Job] = {}
    peers = []
    for part in PRECOMPILED:
        if part not in settings.chosen:
            continue
        module = importlib.import_module(PARTS[part].path)
        for number, case in enumerate(module.cases(settings.rehearse)):

            def note(kernel: str, key: str, part=part, number=number) -> bool:
                kernels.setdefault(key, Job(part, number, kernel, key))
                return False

            try:
                names = run_case(settings, module, case, note)
            except Exception:  # the part itself will say so
                traceback.print_exc()
                continue
            peers += [Job(part, number, name, None) for name in names]
    return peers + list(kernels.values())


def run_case(settings: Settings, module, case, wanted: Callable[[str, str], bool]) -> tuple[str, ...]:
    """Run a case's own calls without launching; compiles those kernels whose (name, key) are wanted. Returns the names
    of its peers that have to be compiled."""
    with compiling(settings, wanted):
        comparison = module.comparison(Context(settings, compiling=True), case)
        for name in comparison.ours:
            comparison.variants[name]()()
    return comparison.compiled


@contextlib.contextmanager
def compiling(settings: Settings, wanted: Callable[[str, str], bool]) -> Iterator[None]:
    """Within the block nothing is launched, and of what would be compiled only what is wanted is."""
    report = ignore if settings.rehearse else build_launcher  # a launcher needs the driver's library to be linked
    compile_it = JITFunction._do_compile

    def compile_if_wanted(self, key, *args):
        return compile_it(self, key, *args) if wanted(self.__name__, f"{self.__name__} {key}") else None

    assembling = compiled.skip_assembler() if settings.rehearse else contextlib.nullcontext()
    with assembling, compiled.compile_only(settings.card.architecture, report), flashattn.use_backend("triton"):
        JITFunction._do_compile = compile_if_wanted
        try:
            yield
        finally:
            JITFunction._do_compile = compile_it


def ignore(kernel) -> None:
    pass


def build_launcher(kernel) -> None:
    """Triton before 3.7 has the C compiler make a launcher for each signature when a kernel is first launched."""
    if kernel is not None and hasattr(nvidia, "make_launcher") and torch.version.cuda is not None:
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def run_job(settings: Settings, job: Job) -> tuple[float, float]:
    """(seconds it took, seconds of the processor: this process and the assembler it starts)."""
    module = importlib.import_module(PARTS[job.part].path)
    case = module.cases(settings.rehearse)[job.case]
    start, processor = time.perf_counter(), sum(os.times()[:4])
    if job.key is not None:
        run_case(settings, module, case, lambda _, key: key == job.key)
    else:
        context = Context(settings)
        with ready(context):
            module.comparison(context, case).variants[job.kernel]()()
            context.clock.wait()
    return time.perf_counter() - start, sum(os.times()[:4]) - processor
