"""results.jsonl of a run: one JSON object a line, each written to disk at once.

kind: "head" (once a part: versions, card, clocks), "plan" (how many cases a part has), "row" (a measurement),
"tail" (misses of the kernel cache, clocks), "error", "end" (how a part ended: done, stopped or failed).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

NAME = "results.jsonl"


def append(out: Path, kind: str, part: str, values: dict) -> None:
    """One write for one line: a process that is killed leaves whole lines."""
    line = json.dumps({"kind": kind, "part": part, **clean(values)}, default=str) + "\n"
    file = os.open(out / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def clean(value):
    """NaN and infinity as text, since JSON lacks them."""
    if isinstance(value, dict):
        return {name: clean(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(out: Path, kind: str | None = None, part: str | None = None) -> list[dict]:
    file = out / NAME
    found = read_file(file) if file.exists() else []
    return [x for x in found if kind in (None, x["kind"]) and part in (None, x["part"])]


def read_file(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
