"""Part "precompile": compiles the kernels of the chosen parts on all cores, into Triton's cache on disk.

Each case of a part runs on empty CPU tensors of its true shapes, twice: once to list its kernels, and then, in one
process per core, to compile those that no other case has compiled. The cache key (source, types, alignment and
divisibility of the arguments, options, architecture) is the same as on the GPU, so the launches there find the kernels
in the cache; the "tail" line of each part lists the misses. Peers that torch.compile has to compile are called once on
the GPU, which fills PyTorch's cache.
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
from .card import count_cores
from .context import Context, Settings, describe_error, prepare_device
from .parts import PARTS, PRECOMPILED


class Job(NamedTuple):
    """A kernel that a case launches, or one of its peers."""

    part: str
    case: int  # its index in the part
    kernel: str
    key: str | None  # Triton's name for it; None: a peer


def run(context: Context) -> Iterator[dict]:
    torch.set_num_threads(1)  # before any operation: a thread pool would not survive the forks below
    with fork_pool(1) as pool:  # not here: autograd refuses to run in the fork of a process that used it
        jobs = pool.submit(list_jobs, context.settings).result()
    context.plan(len(jobs))
    with fork_pool(min(count_cores(), max(1, len(jobs)))) as pool:
        running = {pool.submit(run_job, context.settings, job): number for number, job in enumerate(jobs)}
        for future in as_completed(running):
            number = running[future]
            yield {"case": number} | make_row(jobs[number], future)


def fork_pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))


def summarise(rows: list[dict]) -> list[str]:
    kernels = [row for row in rows if not row["peer"]]
    seconds = sum(row.get("cpu_seconds", 0) for row in kernels)
    failed = sum("failed" in row for row in rows)
    return [f"{len(kernels)} kernels, {seconds:.0f} s of one core; {len(rows) - len(kernels)} peers; {failed} failed"]


def make_row(job: Job, future) -> dict:
    is_peer = job.key is None
    row = {"for": job.part, "of_case": job.case, "kernel": job.kernel, "peer": is_peer}
    try:
        seconds, of_processor = future.result()
        return row | {"seconds": seconds, "cpu_seconds": of_processor}
    except Exception as error:
        return row | {"failed": describe_error(error)}  # the part that launches it will fail too


def list_jobs(settings: Settings) -> list[Job]:
    """Peers first: they take longest."""
    kernels: dict[str, Job] = {}
    peers = []
    for part in PRECOMPILED:
        if part not in settings.chosen:
            continue
        module = importlib.import_module(PARTS[part].path)
        for number, case in enumerate(module.list_cases(settings.rehearse)):

            def note(kernel: str, key: str, part=part, number=number) -> bool:
                kernels.setdefault(key, Job(part, number, kernel, key))
                return False

            try:
                names = run_case(settings, module, case, note)
            except Exception:  # the part itself will fail too
                traceback.print_exc()
                continue
            peers += [Job(part, number, name, None) for name in names]
    return peers + list(kernels.values())


def run_case(settings: Settings, module, case, wanted: Callable[[str, str], bool]) -> tuple[str, ...]:
    """Run our calls of a case without launching, and compile the kernels whose (name, key) are wanted. Returns the
    names of the peers that have to be compiled."""
    with compile_only(settings, wanted):
        comparison = module.make_comparison(Context(settings, compiling=True), case)
        for name in comparison.ours:
            comparison.variants[name]()()
    return comparison.compiled


@contextlib.contextmanager
def compile_only(settings: Settings, wanted: Callable[[str, str], bool]) -> Iterator[None]:
    """Within the block nothing is launched, and only the wanted kernels are compiled."""
    report = ignore if settings.rehearse else build_launcher  # a launcher needs the driver's library to be linked
    do_compile = JITFunction._do_compile

    def compile_if_wanted(self, key, *args):
        return do_compile(self, key, *args) if wanted(self.__name__, f"{self.__name__} {key}") else None

    assembling = compiled.skip_assembler() if settings.rehearse else contextlib.nullcontext()
    with assembling, compiled.compile_only(settings.card.architecture, report), flashattn.use_backend("triton"):
        JITFunction._do_compile = compile_if_wanted
        try:
            yield
        finally:
            JITFunction._do_compile = do_compile


def ignore(kernel) -> None:
    pass


def build_launcher(kernel) -> None:
    """Triton before 3.7 compiles a launcher for each signature with the C compiler, at the first launch."""
    if kernel is not None and hasattr(nvidia, "make_launcher") and torch.version.cuda is not None:
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def run_job(settings: Settings, job: Job) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process and the assembler it starts)."""
    module = importlib.import_module(PARTS[job.part].path)
    case = module.list_cases(settings.rehearse)[job.case]
    start, processor = time.perf_counter(), sum(os.times()[:4])
    if job.key is not None:
        run_case(settings, module, case, lambda _, key: key == job.key)
    else:
        context = Context(settings)
        with prepare_device(context):
            module.make_comparison(context, case).variants[job.kernel]()()
            context.clock.wait()
    return time.perf_counter() - start, sum(os.times()[:4]) - processor
