"""Part "check": `pytest -m gpu` in one process per core, a row for each test. The processes compile kernels when tests
need them, into one cache on disk; the slowest tests start first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

from .card import ROOT, count_cores
from .context import Context

TESTS = "tests/gpu"
REHEARSAL_STEP = 150  # a rehearsal runs every 150th test


def run(context: Context) -> Iterator[dict]:
    read, write = os.pipe()
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # saves their import in each process
    process = subprocess.Popen(
        make_command(context, write), cwd=ROOT, pass_fds=[write], stdin=subprocess.DEVNULL, env=environment
    )
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
    if code not in (0, 1):  # 1: tests failed, as their rows say
        raise RuntimeError(f"pytest ended with code {code}; its output is in log.txt")


def summarise(rows: list[dict]) -> list[str]:
    outcomes = Counter(row["outcome"] for row in rows)
    return [", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())]


def make_command(context: Context, file: int) -> list[str]:
    found = [
        sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-m", "gpu", "-n", str(count_cores()), "--dist", "load",
        "--maxschedchunk", "1", "-p", "bench.gpu.pytest_rows", "-p", "no:cacheprovider", "--rows", str(file), TESTS,
    ]  # fmt: skip
    if context.rehearse:
        found += ["--rehearse-gpu", context.card.architecture, "--every", str(REHEARSAL_STEP)]
    return found
