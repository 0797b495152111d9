"""The table of `python -m bench cpu`, and the figures that are no ratio of two calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table

import flashattn
from model.packages import locate

from .cpu import Result
from .report import machine, make_console


class Figure(NamedTuple):
    """One number beside what was asked for. `most`: at most that, else at least."""

    name: str
    value: float
    unit: str
    goal: float
    most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.goal if self.most else self.value >= self.goal


# ------------------------------------------------------------------------------------------------ the figures


def microseconds(call) -> float:
    """The best of some runs of many calls: what a call costs where nothing disturbs it."""
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(1000):
            call()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def call_costs() -> list[Figure]:
    """The whole Python call on one number: what a call costs apart from the work."""
    q = torch.randn(1, 1, 1, 1)
    leaf = q.clone().requires_grad_()
    plain, tracked = (microseconds(lambda x=x: flashattn.attention(x, x, x)) for x in (q, leaf))
    return [
        Figure("call of attention on one number", plain, "us", 12, most=True),
        Figure("the same where a gradient is needed", tracked, "us", 20, most=True),
    ]


MEMORY = """
import torch, flashattn
def kibibytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
def step(seq):
    q, k, v = (torch.randn(1, 1, seq, 64).requires_grad_() for _ in range(3))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = kibibytes("VmRSS")
    flashattn.attention(q, k, v).sum().backward()
    return (kibibytes("VmHWM") - before) / 1024
step(64)
print(step(32768))
"""


def memory() -> Figure:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    return Figure("memory, 32,768 tokens, forward + backward", float(done.stdout), "MiB", 64, most=True)


def lower_instruction_set(name: str, words: list[str], goal: float, seconds: float) -> list[Figure]:
    """The same cases in a process of its own, ours and torch's both held to AVX2, and torch's libraries with it."""
    held = {"FLASHATTN_CPU_ISA": name, "ATEN_CPU_CAPABILITY": name}
    held |= {"MKL_ENABLE_INSTRUCTIONS": name.upper(), "ONEDNN_MAX_CPU_ISA": name.upper()}
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        subprocess.run(
            [sys.executable, "-m", "bench", "cpu", *words, "--seconds", str(seconds), "--json", file.name],
            env={**os.environ, **held},
            stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        rows = [json.loads(line) for line in Path(file.name).read_text(encoding="utf-8").splitlines()]
    return [Figure(f"{r['name']}, {r['dtype']}, {name} only", r["ratio"], "x", goal) for r in rows if "ratio" in r]


GENERATE = """
import sys, time, statistics, torch, transformers, model
transformers.logging.set_verbosity_error()
ours, tokenizer = model.load(sys.argv[1])
theirs = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1].rpartition("/")[0], gguf_file=sys.argv[1].rpartition("/")[2], dtype=torch.float32).eval()
prompt, new = tokenizer.encode("The capital of France is"), 48
def one():
    return model.generate(ours, [prompt], max_new_tokens=new)[0]
def two():
    with torch.no_grad():
        return theirs.generate(torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
one(), two()
ratios, rates = [], []
for _ in range(4):
    a = time.perf_counter(); one(); b = time.perf_counter(); two(); c = time.perf_counter()
    ratios.append((c - b) / (b - a)); rates.append(new / (b - a))
print(statistics.median(ratios), statistics.median(rates))
"""


def generation() -> list[Figure]:
    """SmolLM2-135M, the same float32 weights in `transformers`."""
    try:
        path = locate("smollm2")
    except Exception:
        return []
    done = subprocess.run([sys.executable, "-c", GENERATE, str(path)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.splitlines()[-1], file=sys.stderr)
        return []
    ratio, rate = map(float, done.stdout.split())
    return [Figure(f"SmolLM2-135M at {rate:.0f} tokens/s, to transformers", ratio, "x", 1.3)]


def figures(seconds: float) -> Iterator[Figure]:
    yield from call_costs()
    yield memory()
    yield from lower_instruction_set("avx2", ["forward", "2048"], 1.5, seconds)
    yield from generation()


# ------------------------------------------------------------------------------------------------ the tables


def row(r: Result) -> list[str]:
    case, t = r.case, r.times
    wrong = "" if r.correct else " WRONG"
    return [
        case.name, case.dtype, f"{t.ours * 1e3:.2f}", f"{t.theirs * 1e3:.2f}", f"{t.ratio:.2f}x",
        f"{t.low:.2f}-{t.high:.2f}", f"{case.goal:g}x", f"{r.bound:.1f}x", f"{r.rate:.0f} {case.unit}",
        f"{r.rate / r.ceiling:.0%}", f"{r.error:.0e}/{r.their_error:.0e}{wrong}",
    ]  # fmt: skip


def print_results(results: Iterable[Result], ceiling: dict[str, float]) -> list[Result]:
    console = make_console(132)
    console.print(f"{machine()}; {date.today()}")
    console.print(
        f"ceilings in this run: {ceiling['float32']:.0f} GFLOP/s float32, {ceiling['bfloat16']:.0f} bfloat16 "
        f"(multiply-adds on registers), {ceiling['GB/s']:.0f} GB/s (reading)"
    )
    console.print(
        "ms: median; ratio: torch's time / ours, median of interleaved pairs; goal: the least ratio asked for;"
    )
    console.print(
        "bound: the ratio a call at the ceiling would have; of it: our share of the ceiling; memory that calls"
    )
    console.print("allocate is warm, used before; error: largest difference to float64, ours / torch's")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("case", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "torch's", "ratio", "quartiles", "goal", "bound", "speed", "of it", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    done = []
    with console.status("measuring") as status:
        for result in results:
            done.append(result)
            table.add_row(*row(result))
            status.update(f"measured {len(done)}: {result.case.name}, {result.case.dtype}")
    console.print(table)
    return done


def print_figures(figures: Iterable[Figure]) -> list[Figure]:
    console = make_console(132)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("figure", no_wrap=True)
    for name in ("measured", "asked"):
        table.add_column(name, justify="right", no_wrap=True)
    done = []
    with console.status("measuring") as status:
        for f in figures:
            done.append(f)
            table.add_row(
                f.name, f"{f.value:.3g} {f.unit}", f"{'at most' if f.most else 'at least'} {f.goal:g} {f.unit}"
            )
            status.update(f"measured {f.name}")
    console.print(table)
    return done


def write_json(results: list[Result], figures: list[Figure], path: Path) -> None:
    """One JSON object a line, each row with the command that reproduces it."""
    where = machine()
    lines = [
        {
            "name": r.case.name, "dtype": r.case.dtype, **r.times._asdict(), "goal": r.case.goal, "bound": r.bound,
            "rate": r.rate, "unit": r.case.unit, "ceiling": r.ceiling, "error": r.error, "torch_error": r.their_error,
            "correct": r.correct, "machine": where, "command": f"python -m bench cpu {r.case.name!r} {r.case.dtype}",
        }
        for r in results
    ]  # fmt: skip
    lines += [{"figure": f.name, "value": f.value, "unit": f.unit, "asked": f.goal, "machine": where} for f in figures]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
