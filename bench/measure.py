"""Timing for a noisy machine: ours and theirs alternate in one process, and the ratio is taken pair by pair."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


def keep_memory_warm() -> None:
    """Make glibc keep freed memory, so that results are allocated in pages that were used before: page faults cost as
    much as a bandwidth-bound kernel, and hit calls at random. Does nothing without glibc."""
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


def time_call(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_pair(
    ours: Callable[[], object], theirs: Callable[[], object], device: torch.device, seconds: float, min_runs: int = 5
) -> Pair:
    """Alternate the two for about `seconds`, at least `min_runs` times each, after one warm-up."""
    ours(), theirs()
    times: list[tuple[float, float]] = []
    stop = time.perf_counter() + seconds
    while len(times) < min_runs or time.perf_counter() < stop:
        times.append((time_call(ours, device), time_call(theirs, device)))
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


def compute_max_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference; 0 for an empty tensor."""
    return (x.double() - truth.double()).abs().max().item() if x.numel() else 0.0
