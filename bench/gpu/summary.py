"""The last screen: what was found, in under 100 lines, from the rows on disk. All rows are in results.jsonl."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from . import results, rules
from .compare import OURS
from .parts import PARTS
from .supervisor import describe

MAX_LINES = 95
NAME = "summary.txt"


def is_right(out: Path) -> bool:
    """Whether no row is wrong and no part failed. One that ran out of time is neither."""
    rows, ends = results.read(out, "row"), results.read(out, "end")
    return all(row.get("correct", True) for row in rows) and all(end["outcome"] != "failed" for end in ends)


def print_summary(out: Path) -> None:
    text = "\n".join(summarise(results.read(out)))
    (out / NAME).write_text(text + "\n", encoding="utf-8")
    with contextlib.suppress(BrokenPipeError):
        print(text)


def summarise(lines: list[dict]) -> list[str]:
    """At most MAX_LINES. A part shows its first cases, which are the most worth."""
    by_part = {name: [x for x in lines if x["kind"] == "row" and x["part"] == name] for name in PARTS}
    fixed = [*head_lines(lines), "", *end_lines(lines), "", *wrong_lines(lines), *rules.TEXT.splitlines()]
    shown = {name: TABLES[name](rows) for name, rows in by_part.items() if rows and name in TABLES}
    room = MAX_LINES - len(fixed)
    tables = []
    for name, table in shorten(shown, room).items():
        left = len(shown[name]) - len(table)
        tables += ["", f"{name}" + (f" ({left} more in {results.NAME})" if left else ""), *table]
    return [*fixed, *tables]


def shorten(tables: dict[str, list[str]], room: int) -> dict[str, list[str]]:
    """The lines of each table that fit: the longest give way first."""
    lengths = {name: len(table) for name, table in tables.items()}
    while lengths and sum(lengths.values()) + 2 * len(lengths) > room and max(lengths.values()) > 1:
        lengths[max(lengths, key=lengths.get)] -= 1
    return {name: table[: lengths[name]] for name, table in tables.items()}


def head_lines(lines: list[dict]) -> list[str]:
    heads = [x for x in lines if x["kind"] == "head"]
    if not heads:
        return ["no part has begun"]
    h = heads[0]
    clocks = [f"{x['sm_clock_mhz']:.0f}" for x in heads if isinstance(x.get("sm_clock_mhz"), float)]
    reasons = sorted({x["throttle"] for x in heads if x.get("throttle")})
    return [
        f"{h['name']} ({h['architecture']}, {h['multiprocessors']} multiprocessors, L2 {h['l2_bytes'] / 1e6:.0f} MB), "
        f"driver {h['driver']}, power limit {h['power_limit_w']} W; {h['date']}",
        f"torch {h['torch']}, triton {h['triton']}, flashattn {h['flashattn']} {h['commit']}"
        f"{' with changes' if h['dirty'] else ''}, CUDA {h['cuda']}; SM clock at the start of each part "
        f"{' '.join(clocks) or '-'} MHz, throttle {'; '.join(reasons) or '-'}",
    ]


def end_lines(lines: list[dict]) -> list[str]:
    late = {x["part"]: len(x["kernels"]) for x in lines if x["kind"] == "compiled"}
    return [
        describe(x) + (f"; {late[x['part']]} kernels compiled meanwhile" if late.get(x["part"]) else "")
        for x in lines
        if x["kind"] == "end"
    ]


def wrong_lines(lines: list[dict]) -> list[str]:
    """What is wrong comes before any figure."""
    wrong = [x for x in lines if x["kind"] == "row" and not x.get("correct", True)]
    found = [f"WRONG: {x['part']}: {x.get('case')}, {why(x)}"[:160] for x in wrong]
    return [*found[:12], *([f"and {len(found) - 12} more"] if len(found) > 12 else []), *([""] if found else [])]


def why(row: dict) -> str:
    if row.get("failed") or row.get("message"):
        return row.get("failed") or row["message"]
    if row.get("same_bits") is False:
        return "the same inputs gave other bits after timing"
    if "error" in row:
        return f"error {row['error']}, allowed {row['allowed']}"
    return "wrong result"


# ------------------------------------------------------------------------------------------------ tables


def ceilings(rows: list[dict]) -> list[str]:
    return [f"  {row['case']:<28} {figure(row)}" for row in rows]


def figure(row: dict) -> str:
    for unit, name in (("tflops", "TFLOP/s"), ("gbps", "GB/s")):
        if row.get(unit):
            return f"{row[unit]:,.0f} {name}"
    eager = f", {row['eager_us']:.1f} us to launch" if row.get("eager_us") else ""
    return f"{row['us']:.1f} us{eager}"


def precompile(rows: list[dict]) -> list[str]:
    kernels = [row for row in rows if not row["peer"]]
    seconds = sum(row.get("cpu_seconds", 0) for row in kernels)
    failed = sum("failed" in row for row in rows)
    return [f"  {len(kernels)} kernels, {seconds:.0f} s of one core; {len(rows) - len(kernels)} peers; {failed} failed"]


def check(rows: list[dict]) -> list[str]:
    outcomes = Counter(row["outcome"] for row in rows)
    return ["  " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())]


def compared(rows: list[dict]) -> list[str]:
    """A line for each case: ours, its share of the ceiling, then the others' times / ours."""
    return [case_line(case, of) for case, of in by_case(rows).items()]


def case_line(case: str, rows: list[dict]) -> str:
    ours = next((row for row in rows if row.get("variant") == OURS), {})
    skipped = [row["skipped"] for row in rows if row.get("skipped")]
    others = "  ".join(against(row) for row in rows if row.get("variant") not in (OURS, None))
    return f"  {case:<46} {speed(ours) if ours else skipped[0] if skipped else '-':<26} {others}"[:160]


def speed(row: dict) -> str:
    if row.get("failed"):
        return "FAILED"
    share = f" {row['share']:.0%}" if isinstance(row.get("share"), float) else ""
    wrong = "" if row.get("correct", True) else " WRONG"
    return f"{row['us']:,.0f} us {figure(row)}{share}{wrong}"


def against(row: dict) -> str:
    """ "flash 1.25x", ~1.02x where the spread is larger than the difference from 1."""
    if row.get("failed"):
        return f"{row['variant']} failed"
    if "ratio" not in row:
        return f"{row['variant']} {row['us']:.0f} us"
    return f"{row['variant']} {'~' if row['unsure'] else ''}{row['ratio']:.2f}x"


def features(rows: list[dict]) -> list[str]:
    """Forward and backward of a feature in one line: its time / the plain call's."""
    names = dict.fromkeys(row.get("feature", row["case"]) for row in rows)
    return [f"  {name:<34} " + "  ".join(costs(rows, name)) for name in names]


def costs(rows: list[dict], name: str) -> Iterable[str]:
    for row in rows:
        if row.get("feature", row["case"]) != name:
            continue
        if row.get("failed"):
            yield "FAILED"
        elif "ratio" in row:
            yield f"{row['pass']} {'~' if row['unsure'] else ''}{1 / row['ratio']:.2f}x"
        elif not row["correct"]:
            yield "WRONG"


def host(rows: list[dict]) -> list[str]:
    return [f"  {case:<34} " + "; ".join(host_figures(row) for row in of) for case, of in by_case(rows).items()]


def host_figures(row: dict) -> str:
    if row.get("failed"):
        return f"{row['variant']} failed"
    graph = f"{row['us']:.1f} us in a graph" if row["us"] is not None else row["by"][:40]
    return f"{row['variant']} {row['eager_us']:.1f} us, {graph}"


def by_case(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def texts(rows: list[dict]) -> list[str]:
    """Of parts that bring their own line with each row."""
    return [f"  {row.get('text') or row['case']}" for row in rows]


TABLES: dict[str, Callable[[list[dict]], list[str]]] = {
    "ceilings": ceilings, "precompile": precompile, "check": check, "attention": compared, "decode": compared,
    "varlen": compared, "norms": compared, "features": features, "host": host, "tune": texts, "counters": texts,
    "profile": texts,
}  # fmt: skip
