"""Runs the parts one after the other, each in a process of its own, and ends those whose time is up."""

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

# Imported once, in the process that those of the parts are forked from. None may ask for the GPU there, as
# torch._inductor does: CUDA does not work in the fork of a process that has asked.
PRELOADED = ["bench.gpu.worker", "torch._dynamo"]


class Run(NamedTuple):
    """What all parts of a run have in common."""

    parts: list[Part]
    budget: float
    out: Path
    card: Card
    rehearse: bool


def run_all(run: Run, say: Callable[[str], None] = print) -> None:
    """A part gets its share of the time that is left, beside those to come: what one leaves over goes to the next."""
    start = time.perf_counter()
    # Processes of PyTorch's own, as many as cores in each that compiles, would take longer to start than to compile.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED[: 1 if run.rehearse else None])
    import_once(processes)
    for place, part in enumerate(run.parts):
        left = run.budget - (time.perf_counter() - start)
        seconds = left * part.share / sum(p.share for p in run.parts[place:])
        if left <= 0:
            finish(run, part, 0.0, "stopped", "no time was left for it")
        else:
            run_part(processes, run, part, seconds)
        say(describe(results.read(run.out, "end", part.name)[-1]))


def import_once(processes) -> None:
    """Start the process that those of the parts are forked from, and wait until it has imported what they share."""
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
        end_group(process)
    outcome = "stopped" if stopped else "done" if process.exitcode == 0 else "failed"
    finish(run, part, time.monotonic() - start, outcome, None if outcome != "failed" else reason(run, part, process))


def end_group(process) -> None:
    """The process and all it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # not yet the leader of a group, or gone
    process.join()


def reason(run: Run, part: Part, process) -> str:
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
