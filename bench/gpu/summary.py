"""The last screen: what was found, in under 100 lines, from the rows on disk. All rows are in results.jsonl."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

from . import results, rules
from .context import first_line
from .parts import PARTS, Part
from .supervisor import describe

MAX_LINES, WIDTH = 95, 210
NAME = "summary.txt"


def is_right(lines: list[dict]) -> bool:
    """Whether no row is wrong and no part failed. One that ran out of time is neither."""
    return all(line.get("correct", True) and line.get("outcome") != "failed" for line in lines)


def write_summary(out: Path) -> None:
    """To the screen and to a file beside the results."""
    lines = summarise(results.read(out))
    (out / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    show(lines)


def show(lines: list[str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        print("\n".join(lines))


def summarise(lines: list[dict]) -> list[str]:
    """At most MAX_LINES. Of a table that is too long the last lines are left out: the first are worth most."""
    by_part = {name: [x for x in lines if x["kind"] == "row" and x["part"] == name] for name in PARTS}
    fixed = [*head_lines(lines), "", *end_lines(lines), "", *wrong_lines(lines), *rules.TEXT.splitlines(), ""]
    shown = {name: table(PARTS[name], rows) for name, rows in by_part.items() if rows}
    tables = []
    for name, (title, *rest) in shorten(shown, MAX_LINES - len(fixed)).items():
        left = len(shown[name]) - 1 - len(rest)
        more = f" ({left} more lines in {results.NAME})" if left else ""
        tables += [f"{name}: {title}{more}"[:WIDTH], *(f"  {line}".rstrip()[:WIDTH] for line in rest)]
    return [*fixed, *tables]


def shorten(tables: dict[str, list[str]], room: int) -> dict[str, list[str]]:
    """The lines of each table that fit: the longest give way first."""
    lengths = {name: len(table) for name, table in tables.items()}
    while lengths and sum(lengths.values()) > room and max(lengths.values()) > 1:
        lengths[max(lengths, key=lengths.get)] -= 1
    return {name: table[: lengths[name]] for name, table in tables.items()}


def head_lines(lines: list[dict]) -> list[str]:
    heads = [x for x in lines if x["kind"] == "head"]
    if not heads:
        return ["no part has begun"]
    h = heads[0]
    tails = [x for x in lines if x["kind"] == "tail"]
    clocks = [f"{x['sm_clock_mhz']:.0f}" for x in tails if isinstance(x.get("sm_clock_mhz"), float)]
    reasons = sorted({x["throttle"] for x in tails if x.get("throttle")})
    return [
        f"{h['name']} ({h['architecture']}, {h['multiprocessors']} multiprocessors, L2 {h['l2_bytes'] / 1e6:.0f} MB), "
        f"driver {h['driver']}, power limit {h['power_limit_w']} W; {h['date']}",
        f"torch {h['torch']}, triton {h['triton']}, flashattn {h['flashattn']} {h['commit']}"
        f"{' with changes' if h['dirty'] else ''}, CUDA {h['cuda']}; SM clock at the end of each part "
        f"{' '.join(clocks) or '-'} MHz, throttle {'; '.join(reasons) or '-'}",
    ]


def end_lines(lines: list[dict]) -> list[str]:
    late = {x["part"]: len(x["compiled"]) for x in lines if x["kind"] == "tail"}
    return [
        describe(x) + (f"; {late[x['part']]} kernels compiled meanwhile" if late.get(x["part"]) else "")
        for x in lines
        if x["kind"] == "end"
    ]


def wrong_lines(lines: list[dict]) -> list[str]:
    """What is wrong comes before any figure."""
    alike: dict[tuple[str, str], list[dict]] = {}
    for x in lines:
        if x["kind"] == "row" and not x.get("correct", True):
            alike.setdefault((x["part"], why(x)), []).append(x)
    found = []
    for (part, reason), rows in alike.items():
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        found.append(f"WRONG: {part}: {rows[0].get('case')}{more}, {reason}"[:160])
    return [*found[:12], *([f"and {len(found) - 12} more"] if len(found) > 12 else []), *([""] if found else [])]


def why(row: dict) -> str:
    for name in ("failed", "message", "reason"):
        if row.get(name):
            return row[name]
    if row.get("same_bits") is False:
        return "the same inputs gave other bits after timing"
    if "error" in row:
        return f"error {row['error']}, allowed {row['allowed']}"
    return "wrong result"


def table(part: Part, rows: list[dict]) -> list[str]:
    """The lines that the part's module makes of its rows. It may be the one that failed."""
    try:
        return importlib.import_module(part.path).summary(rows) or ["nothing"]
    except Exception as error:
        return [f"no table: {first_line(error)}"]
