"""The process of a part: writes its head, then its rows, each before the next is measured."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback

import torch

from . import card, results
from .context import Context, Settings, describe_error, prepare_device
from .kernel_hashes import fix_hashes

GPU_FREE = ("precompile", "check")  # the processes that they start use the GPU; a context here would only cost time


def work(path: str, settings: Settings) -> None:
    """Runs in its own process: if it dies, the rows that it has written stay."""
    os.setsid()  # the parent kills the whole group
    log = os.open(settings.out / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        write_rows(path, settings)
    except BaseException as error:
        traceback.print_exc()
        results.append(settings.out, "error", settings.part, {"error": describe_error(error)})
        sys.exit(1)


def write_rows(path: str, settings: Settings) -> None:
    results.append(settings.out, "head", settings.part, card.describe_run(settings.card))
    module = importlib.import_module(path)
    fix_hashes()
    context = Context(settings)
    torch.manual_seed(0)
    if settings.part in GPU_FREE:
        write_all(module, context)
        return
    misses = watch_compilations()
    with prepare_device(context):
        write_all(module, context)
    results.append(settings.out, "tail", settings.part, {"compiled": misses, **card.read_state(settings.card)})


def write_all(module, context: Context) -> None:
    for row in module.run(context):
        at = round(time.monotonic() - context.settings.begin, 2)  # seconds since the part began
        results.append(context.out, "row", context.settings.part, row | {"at": at})


def watch_compilations() -> list[tuple[str, float]]:
    """A list that gets (name, seconds) of each later miss of Triton's cache on disk."""
    import triton

    misses: list[tuple[str, float]] = []

    def note(*, metadata, times, cache_hit, **_) -> None:
        if not cache_hit:
            misses.append((metadata["name"], times.total / 1e6))

    triton.knobs.compilation.listener = note
    return misses
