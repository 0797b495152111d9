"""What the process of a part does: its head, then its rows, each written before the next is measured."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback

import torch

from . import card, results
from .context import Context, Settings, first_line, ready
from .kernel_hashes import fix_hashes

GPU_FREE = ("precompile", "check")  # their own processes use the GPU; a context here would only cost time


def work(path: str, settings: Settings) -> None:
    """Runs in a process of its own: whatever happens to it, the rows it has written stay."""
    os.setsid()  # the parent ends the whole group
    log = os.open(settings.out / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        write_rows(path, settings)
    except BaseException as error:
        traceback.print_exc()
        results.append(settings.out, "error", settings.part, {"error": first_line(error)})
        sys.exit(1)


def write_rows(path: str, settings: Settings) -> None:
    results.append(settings.out, "head", settings.part, card.head(settings.card))
    module = importlib.import_module(path)
    fix_hashes()
    context = Context(settings)
    torch.manual_seed(0)
    if settings.part in GPU_FREE:
        write_all(module, context)
        return
    misses = watch_compilations()
    with ready(context):
        write_all(module, context)
    results.append(settings.out, "tail", settings.part, {"compiled": misses, **card.state(settings.card)})


def write_all(module, context: Context) -> None:
    for row in module.rows(context):
        at = round(time.monotonic() - context.settings.begin, 2)  # seconds since the part began
        results.append(context.out, "row", context.settings.part, row | {"at": at})


def watch_compilations() -> list[tuple[str, float]]:
    """(name, seconds) of each Triton kernel that is compiled from here on because the cache on disk lacks it."""
    import triton

    misses: list[tuple[str, float]] = []

    def note(*, metadata, times, cache_hit, **_) -> None:
        if not cache_hit:
            misses.append((metadata["name"], times.total / 1e6))

    triton.knobs.compilation.listener = note
    return misses
