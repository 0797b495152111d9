"""The last screen: what was found, in under 100 lines."""

from __future__ import annotations

from pathlib import Path


def is_right(out: Path) -> bool:
    from . import results

    rows = results.read(out, "row")
    ends = results.read(out, "end")
    return all(row.get("correct", True) for row in rows) and all(end["outcome"] != "failed" for end in ends)


def print_summary(out: Path) -> None:
    pass
