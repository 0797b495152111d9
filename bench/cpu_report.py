"""The tables of `python -m bench cpu`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path

from .cpu import Result
from .cpu_figures import Figure
from .environment import describe_environment
from .table import collect, make_console, make_table

NUMBERS = ["ms", "torch's", "ratio", "quartiles", "target", "roofline", "speed", "% of peak", "error"]


def print_results(results: Iterable[Result], ceilings: dict[str, float]) -> list[Result]:
    console = make_console(140)
    console.print(f"{describe_environment()}; {date.today()}")
    console.print(
        f"ceilings in this run: {ceilings['float32']:.0f} GFLOP/s float32, {ceilings['bfloat16']:.0f} bfloat16 "
        f"(register-only FMA loop), {ceilings['GB/s']:.0f} GB/s (reads)"
    )
    console.print("ms: median; ratio: torch's time / ours, median of interleaved pairs; target: the minimum ratio;")
    console.print("roofline: the ratio of a call at the ceiling; % of peak: speed / ceiling; error: largest difference")
    console.print("to float64, ours / torch's. Memory that calls allocate is warm")
    done = collect(console, results, lambda result: f"{result.case.name}, {result.case.dtype}")
    console.print(make_table(["case", "dtype"], NUMBERS, map(format_result, done)))
    return done


def format_result(r: Result) -> list[str]:
    case, t = r.case, r.times
    wrong = "" if r.correct else " WRONG"
    return [
        case.name, case.dtype, f"{t.ours * 1e3:.2f}", f"{t.theirs * 1e3:.2f}", f"{t.ratio:.2f}x",
        f"{t.low:.2f}-{t.high:.2f}", f"{case.target:g}x", f"{r.roofline:.1f}x", f"{r.rate:.0f} {case.unit}",
        f"{r.rate / r.ceiling:.0%}", f"{r.error:.0e}/{r.their_error:.0e}{wrong}",
    ]  # fmt: skip


def print_figures(figures: Iterable[Figure]) -> list[Figure]:
    console = make_console(140)
    done = collect(console, figures, lambda figure: figure.name)
    console.print(make_table(["figure"], ["measured", "target"], map(format_figure, done)))
    return done


def format_figure(f: Figure) -> list[str]:
    target = f"{'at most' if f.is_limit else 'at least'} {f.target:g} {f.unit}"
    return [f.name, f"{f.value:.3g} {f.unit}", target]


def write_json(results: list[Result], figures: list[Figure], path: Path) -> None:
    """One JSON object a line, each row with the command that reproduces it."""
    machine = describe_environment()
    lines = [
        {
            "name": r.case.name, "dtype": r.case.dtype, **r.times._asdict(), "target": r.case.target,
            "roofline": r.roofline, "rate": r.rate, "unit": r.case.unit, "ceiling": r.ceiling, "error": r.error,
            "torch_error": r.their_error, "correct": r.correct, "machine": machine,
            "command": f"python -m bench cpu {r.case.name!r} {r.case.dtype}",
        }
        for r in results
    ]  # fmt: skip
    lines += [
        {"figure": f.name, "value": f.value, "unit": f.unit, "target": f.target, "machine": machine} for f in figures
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
