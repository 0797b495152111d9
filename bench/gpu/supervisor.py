"""Runs the parts one after another, each in its own process, and kills those whose time is up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import results
from .card import Card
from .context import Settings
from .parts import Part

# Imported once, in the process that those of the parts are forked from. None of these may query the GPU, as
# torch._inductor does: CUDA does not work in the fork of a process that did.
PRELOADED = ["bench.gpu.worker", "torch._dynamo"]


class Run(NamedTuple):
    """The settings of a run."""

    parts: list[Part]
    budget: float
    out: Path
    card: Card
    rehearse: bool


def run_all(run: Run, say: Callable[[str], None] = print) -> None:
    """A part gets its share of the time left, relative to the parts to come: unused time goes to the next ones."""
    start = time.perf_counter()
    # PyTorch would start a compile worker per core in each process, which takes longer than the compilation.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED[: 1 if run.rehearse else None])
    start_forkserver(processes)
    for place, part in enumerate(run.parts):
        left = run.budget - (time.perf_counter() - start)
        seconds = left * part.share / sum(p.share for p in run.parts[place:])
        if left <= 0:
            finish(run, part, 0.0, "stopped", "no time left for it")
        else:
            run_part(processes, run, part, seconds)
        say(describe(results.read(run.out, "end", part.name)[-1]))


def start_forkserver(processes) -> None:
    """Start the process that the parts are forked from, and wait until it has imported their modules."""
    first = processes.Process(target=int)
    first.start()
    first.join()


def run_part(processes, run: Run, part: Part, seconds: float) -> None:
    from .worker import work

    start = time.monotonic()
    names = tuple(p.name for p in run.parts)
    settings = Settings(part.name, names, run.out, run.card, run.rehearse, start, start + seconds)
    process = processes.Process(target=work, args=(part.path, settings))
    process.start()
    try:
        process.join(max(0.0, settings.deadline - time.monotonic()))
        stopped = process.exitcode is None
    except KeyboardInterrupt:
        finish(run, part, time.monotonic() - start, "stopped", "interrupted")
        raise
    finally:
        kill_group(process)
    outcome = "stopped" if stopped else "done" if process.exitcode == 0 else "failed"
    finish(
        run, part, time.monotonic() - start, outcome, None if outcome != "failed" else find_reason(run, part, process)
    )


def kill_group(process) -> None:
    """Kill the process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # not yet a group leader, or gone
    process.join()


def find_reason(run: Run, part: Part, process) -> str:
    errors = results.read(run.out, "error", part.name)
    if errors:
        return errors[-1]["error"]
    if process.exitcode < 0:
        return f"killed by {signal.Signals(-process.exitcode).name}"
    return f"ended with code {process.exitcode}"


def finish(run: Run, part: Part, seconds: float, outcome: str, error: str | None) -> None:
    rows = results.read(run.out, "row", part.name)
    plans = results.read(run.out, "plan", part.name)
    values = {
        "outcome": outcome, "seconds": round(seconds, 2), "rows": len(rows),
        "cases": len({row.get("case") for row in rows}), "of_cases": plans[-1]["cases"] if plans else None,
        "error": error,
    }  # fmt: skip
    results.append(run.out, "end", part.name, values)


def describe(end: dict) -> str:
    """One line: "attention: stopped after 40 of 72 cases, 50 s"."""
    of = f" of {end['of_cases']}" if end["of_cases"] is not None else ""
    done = f"{end['cases']}{of} cases"
    what = {"done": done, "stopped": f"stopped after {done}", "failed": f"FAILED after {done}"}[end["outcome"]]
    error = f": {end['error']}" if end["error"] else ""
    return f"{end['part']}: {what}, {end['seconds']:.0f} s{error}"
