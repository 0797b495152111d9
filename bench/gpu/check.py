"""Part "check": what `pytest -m gpu` runs, in as many processes as there are cores, a row for each test. The
kernels are compiled as the tests come to them, by all processes side by side into one cache on disk; the tests that
take longest begin first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

from .card import ROOT, cores
from .context import Context

TESTS = "tests/gpu/test_gpu.py"
REHEARSED = 150  # a rehearsal runs each so-many-th test


def rows(context: Context) -> Iterator[dict]:
    read, write = os.pipe()
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # each would be imported by every process
    process = subprocess.Popen(command(context, write), cwd=ROOT, pass_fds=[write], stdin=subprocess.DEVNULL, env=alone)
    os.close(write)
    planned = False
    with os.fdopen(read, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if "collected" not in row:
                yield {"case": row["nodeid"], **row, "correct": row["outcome"] != "failed"}
            elif row["collected"] and not planned:
                context.plan(row["collected"])
                planned = True
    code = process.wait()
    if code not in (0, 1):  # 1: tests failed, which their rows say
        raise RuntimeError(f"pytest ended with code {code}; its output is in log.txt")


def summary(rows: list[dict]) -> list[str]:
    outcomes = Counter(row["outcome"] for row in rows)
    return [", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())]


def command(context: Context, file: int) -> list[str]:
    found = [
        sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-m", "gpu", "-n", str(cores()), "--dist", "load",
        "--maxschedchunk", "1", "-p", "bench.gpu.pytest_rows", "-p", "no:cacheprovider", "--rows", str(file), TESTS,
    ]  # fmt: skip
    if context.rehearse:
        found += ["--rehearse-gpu", context.card.architecture, "--every", str(REHEARSED)]
    return found
