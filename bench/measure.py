"""Timing to trust on a noisy machine: ours and theirs in turn, in one process, and the ratio pair by pair."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


def keep_memory_warm() -> None:
    """Have glibc keep what is freed, so that a call's results lie in memory that was used before. Fresh pages cost as
    much as a kernel that streams, and which call meets them is chance. Elsewhere this does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 2**30)


class Pair(NamedTuple):
    ours: float  # median seconds
    theirs: float
    ratio: float  # median of theirs / ours, pair by pair
    low: float  # quartiles of that ratio
    high: float
    runs: int


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def pair(
    ours: Callable[[], object], theirs: Callable[[], object], device: torch.device, seconds: float, least: int = 5
) -> Pair:
    """Run both in turn for about `seconds`, at least `least` times each after one warm-up."""
    ours(), theirs()
    times: list[tuple[float, float]] = []
    stop = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < stop:
        times.append((seconds_of(ours, device), seconds_of(theirs, device)))
    ratios = sorted(b / a for a, b in times)
    quarter = len(ratios) // 4
    return Pair(
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(ratios),
        ratios[quarter],
        ratios[-1 - quarter],
        len(times),
    )


def max_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference; 0 for an empty tensor."""
    return (x.double() - truth.double()).abs().max().item() if x.numel() else 0.0
