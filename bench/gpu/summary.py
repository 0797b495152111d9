"""The summary of a run in under 100 lines, from the rows on disk. results.jsonl has all rows."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

from . import results, rules
from .context import describe_error
from .parts import PARTS, Part
from .supervisor import describe

MAX_LINES, WIDTH = 95, 280  # six lengths, each with two peers
NAME = "summary.txt"


def is_correct(lines: list[dict]) -> bool:
    """True if no row is wrong and no part failed. Running out of time is no failure."""
    return all(line.get("correct", True) and line.get("outcome") != "failed" for line in lines)


def write_summary(out: Path) -> None:
    """Print it, and write it to a file next to the results."""
    lines = summarise(results.read(out))
    (out / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    show(lines)


def show(lines: list[str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        print("\n".join(lines))


def summarise(lines: list[dict]) -> list[str]:
    """At most MAX_LINES. Long tables lose their last lines: the first are the most valuable."""
    by_part = {name: [x for x in lines if x["kind"] == "row" and x["part"] == name] for name in PARTS}
    fixed = [*format_head(lines), "", *format_ends(lines), "", *format_errors(lines), *rules.TEXT.splitlines(), ""]
    shown = {name: summarise_part(PARTS[name], rows) for name, rows in by_part.items() if rows}
    tables = []
    for name, (title, *rest) in shorten(shown, MAX_LINES - len(fixed)).items():
        left = len(shown[name]) - 1 - len(rest)
        more = f" ({left} more lines in {results.NAME})" if left else ""
        tables += [f"{name}: {title}{more}"[:WIDTH], *(f"  {line}".rstrip()[:WIDTH] for line in rest)]
    return [*fixed, *tables]


def shorten(tables: dict[str, list[str]], room: int) -> dict[str, list[str]]:
    """Cut the longest tables until all fit."""
    lengths = {name: len(table) for name, table in tables.items()}
    while lengths and sum(lengths.values()) > room and max(lengths.values()) > 1:
        lengths[max(lengths, key=lengths.get)] -= 1
    return {name: table[: lengths[name]] for name, table in tables.items()}


def format_head(lines: list[dict]) -> list[str]:
    heads = [x for x in lines if x["kind"] == "head"]
    if not heads:
        return ["no part has started"]
    h = heads[0]
    tails = [x for x in lines if x["kind"] == "tail"]
    clocks = [f"{x['sm_clock_mhz']:.0f}" for x in tails if isinstance(x.get("sm_clock_mhz"), float)]
    reasons = sorted({x["throttle"] for x in tails if x.get("throttle")})
    return [
        f"{h['name']} ({h['architecture']}, {h['multiprocessors']} multiprocessors, L2 {h['l2_bytes'] / 1e6:.0f} MB), "
        f"driver {h['driver']}, power limit {h['power_limit_w']} W; {h['date']}",
        f"torch {h['torch']}, triton {h['triton']}, flashattn {h['flashattn']} {h['commit']}"
        f"{' with uncommitted changes' if h['dirty'] else ''}, CUDA {h['cuda']}; SM clock at the end of each part "
        f"{' '.join(clocks) or '-'} MHz, throttle {'; '.join(reasons) or '-'}",
    ]


def format_ends(lines: list[dict]) -> list[str]:
    late = {x["part"]: len(x["compiled"]) for x in lines if x["kind"] == "tail"}
    return [
        describe(x) + (f"; {late[x['part']]} kernels compiled late" if late.get(x["part"]) else "")
        for x in lines
        if x["kind"] == "end"
    ]


def format_errors(lines: list[dict]) -> list[str]:
    """Errors come before any figure."""
    by_reason: dict[tuple[str, str], list[dict]] = {}
    for x in lines:
        if x["kind"] == "row" and not x.get("correct", True):
            by_reason.setdefault((x["part"], explain(x)), []).append(x)
    found = []
    for (part, reason), rows in by_reason.items():
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        found.append(f"WRONG: {part}: {rows[0].get('case')}{more}, {reason}"[:160])
    return [*found[:12], *([f"and {len(found) - 12} more"] if len(found) > 12 else []), *([""] if found else [])]


def explain(row: dict) -> str:
    for name in ("failed", "message", "reason"):
        if row.get(name):
            return row[name]
    if row.get("same_bits") is False:
        return "other bits after timing, from the same inputs"
    if "error" in row:
        return f"error {row['error']}, allowed {row['allowed']}"
    return "wrong result"


def summarise_part(part: Part, rows: list[dict]) -> list[str]:
    """The part's own lines for its rows. Its module may be what failed."""
    try:
        return importlib.import_module(part.path).summarise(rows) or ["nothing"]
    except Exception as error:
        return [f"no table: {describe_error(error)}"]
