"""Formats the rows of a part as lines of the summary."""

from __future__ import annotations

from collections.abc import Callable

from .compare import OURS, PLAIN

COMPARED = "% of peak, fastest peer's time / ours"


def make_grid(rows: list[dict], label: Callable[[dict], str], column: str) -> list[str]:
    """A line for each label, with a cell for each value of a column."""
    lines: dict[str, dict[object, list[dict]]] = {}
    for row in rows:
        if column in row:
            lines.setdefault(label(row), {}).setdefault(row[column], []).append(row)
    cells = {
        name: "  ".join(f"{value}: {format_cell(of)}" for value, of in sorted(of.items())) for name, of in lines.items()
    }
    return [f"{name:<30} {text}" for name, text in cells.items()] + list_failures(rows, column)


def list_failures(rows: list[dict], column: str) -> list[str]:
    """Cases that failed or did not fit before they were timed."""
    return [f"{row['case']}: {row.get('skipped') or row.get('failed')}" for row in rows if column not in row]


def format_cell(rows: list[dict]) -> str:
    """Our figure, its share of the ceiling, the ratios of the fastest peer and of our plain kernels where they are not
    the default: "612 78% cudnn 1.02x plain 1.40x"."""
    ours = next((row for row in rows if row.get("variant") == OURS), None)
    if ours is None or ours.get("failed"):
        return "FAILED"
    if ours.get("skipped"):
        return "skipped"
    share = f" {ours['share']:.0%}" if isinstance(ours.get("share"), float) else ""
    wrong = "" if ours.get("correct", True) else " WRONG"
    others = [row for row in rows if "ratio" in row and row["variant"] != PLAIN]
    fastest = f" {format_ratio(min(others, key=lambda row: row['ratio']))}" if others else ""
    fastest += "".join(f" {format_ratio(row)}" for row in rows if "ratio" in row and row["variant"] == PLAIN)
    return f"{ours.get('tflops') or ours.get('gbps', 0):,.0f}{share}{wrong}{fastest}"


SHORT = {"efficient": "eff"}


def format_ratio(row: dict) -> str:
    """ "flash 1.25x", ~1.02x where the spread is larger than the difference from 1."""
    return f"{SHORT.get(row['variant'], row['variant'])} {'~' if row['unsure'] else ''}{row['ratio']:.2f}x"


def group_by_case(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def describe_pass(row: dict) -> str:
    return f"{row['pass']} {'causal' if row['causal'] else 'full'}"
