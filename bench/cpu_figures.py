"""Figures of the CPU engine that are not the ratio of two calls in this process."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

import flashattn
from model.io.packages import locate


class Figure(NamedTuple):
    name: str
    value: float
    unit: str
    target: float
    is_limit: bool = False  # the target is a maximum; else a minimum


def measure_figures(seconds: float) -> Iterator[Figure]:
    yield from measure_call_costs()
    yield measure_memory()
    yield from measure_lower_isa("avx2", ["forward", "2048"], 1.5, seconds)
    yield from measure_generation()


def measure_call_costs() -> list[Figure]:
    """The whole Python call on one number: its cost apart from the work."""
    q = torch.randn(1, 1, 1, 1)
    leaf = q.clone().requires_grad_()
    plain, tracked = (time_call_us(lambda x=x: flashattn.attention(x, x, x)) for x in (q, leaf))
    return [
        Figure("call of attention on one number", plain, "us", 12, is_limit=True),
        Figure("the same where a gradient is needed", tracked, "us", 20, is_limit=True),
    ]


def time_call_us(call: Callable[[], object]) -> float:
    """Microseconds: the best of several runs of many calls, which excludes interruptions."""
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(1000):
            call()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def measure_memory() -> Figure:
    """In a new process: the peak of this one may be higher already."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        mebibytes = pool.submit(measure_peak_mib, 32768, run_backward).result()
    return Figure("memory, 32,768 tokens, forward + backward", mebibytes, "MiB", 64, is_limit=True)


def run_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    flashattn.attention(q, k, v).sum().backward()


def measure_peak_mib(seq: int, call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]) -> float:
    """How far a call on q, k and v, which require gradients, raises the resident memory of this process."""

    def read_kib(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    def run(seq: int) -> float:
        q, k, v = (torch.randn(1, 1, seq, 64).requires_grad_() for _ in range(3))
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM, the peak
        before = read_kib("VmRSS")
        call(q, k, v)
        return (read_kib("VmHWM") - before) / 1024

    run(64)  # a warm-up
    return run(seq)


def measure_lower_isa(name: str, words: list[str], target: float, seconds: float) -> list[Figure]:
    """The same cases in a process whose engine, PyTorch and libraries of PyTorch use this instruction set at most."""
    limits = {"FLASHATTN_CPU_ISA": name, "ATEN_CPU_CAPABILITY": name}
    limits |= {"MKL_ENABLE_INSTRUCTIONS": name.upper(), "ONEDNN_MAX_CPU_ISA": name.upper()}
    rows = run_bench("cpu", *words, "--seconds", str(seconds), environment=limits)
    return [Figure(f"{r['name']}, {r['dtype']}, {name} only", r["ratio"], "x", target) for r in rows if "ratio" in r]


def measure_generation() -> list[Figure]:
    """SmolLM2-135M against `transformers`, by `python -m bench models`; none where its weights are not installed."""
    try:
        locate("smollm2")
    except Exception:
        return []
    rows = run_bench("models", "SmolLM2")
    return [Figure(f"SmolLM2-135M at {r['speed']}, to transformers", r["times"]["ratio"], "x", 1.3) for r in rows]


def run_bench(*arguments: str, environment: dict[str, str] | None = None) -> list[dict]:
    """The rows of another `python -m bench`."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        subprocess.run(
            [sys.executable, "-m", "bench", *arguments, "--json", file.name],
            env=os.environ | (environment or {}), stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        return [json.loads(line) for line in Path(file.name).read_text(encoding="utf-8").splitlines()]
