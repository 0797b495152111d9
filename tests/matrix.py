"""python tests/matrix.py [--executed] 3.6.0=FOLDER 3.9.0=FOLDER …: `every_triton.py` on each version of Triton, and a
table of what passed; --executed leaves out what is only compiled, but for kernels in which versions differ. A folder is
what `pip install --target FOLDER --no-deps triton==VERSION` filled. Exit code 1 if a test fails."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
COLUMNS = {"sm_80": "sm_80", "sm_89": "sm_89", "sm_90": "sm_90", "gfx942": "gfx942, compiled"}


class Outcome(NamedTuple):
    version: str
    passed: Counter  # by column
    total: Counter
    fenced: bool  # whether the version leaves out fences and the kernels add them
    failures: list[str]
    seconds: float


def run(version: str, folder: str, executed: bool) -> Outcome:
    """Runs the tests in processes that find this version's folder before what is installed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        search = os.pathsep.join(filter(None, [str(Path(folder).resolve()), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", "tests/kernels/every_triton.py"]
        command += ["-k", "not compile or for_sm_90 or for_sm_100"] if executed else []
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": search}, cwd=ROOT, capture_output=True, text=True
        )
        if not report.exists():
            return Outcome(version, Counter(), Counter(), False, [done.stdout + done.stderr], 0.0)
        cases = list(ElementTree.parse(report).iter("testcase"))
    return outcome(version, cases, time.monotonic() - start)


def outcome(version: str, cases: list[ElementTree.Element], seconds: float) -> Outcome:
    passed, total, failures, fenced = Counter(), Counter(), [], False
    for case in cases:
        name = case.get("name")
        bad = next((x for kind in ("failure", "error") for x in case.iter(kind)), None)
        if bad is not None:
            failures.append(f"{name}: {bad.get('message')}")
        elif name == "test_the_fault_is_there_without_fences":
            fenced = not list(case.iter("skipped"))
        column = next((c for c in COLUMNS if c in name), None)
        if column:
            total[column] += 1
            passed[column] += bad is None
    return Outcome(version, passed, total, fenced, failures, seconds)


def print_table(outcomes: list[Outcome]) -> None:
    table = Table(title="Triton: tests passed", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("version")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    table.add_column("fences on sm_90")
    table.add_column("seconds", justify="right")
    for o in outcomes:
        counts = [f"{o.passed[c]} of {o.total[c]}" if o.total[c] else "" for c in COLUMNS]
        table.add_row(
            o.version, *counts, "added by flashattn" if o.fenced else "Triton's, few added", f"{o.seconds:.0f}"
        )
    console = Console(width=110, highlight=False)
    console.print(table)
    for o in outcomes:
        for failure in o.failures:
            console.print(f"{o.version}: {failure}", markup=False)


def main(arguments: list[str]) -> int:
    executed = "--executed" in arguments
    versions = [argument.partition("=")[::2] for argument in arguments if argument != "--executed"]
    if not versions or not all(folder for _, folder in versions):
        print("usage: python tests/matrix.py [--executed] VERSION=FOLDER …", file=sys.stderr)
        return 2
    outcomes = []
    for version, folder in versions:
        compiled = "" if executed else ", compiled for a fourth"
        print(f"Triton {version}: every kernel on the PTX machine for three architectures{compiled} …", flush=True)
        outcomes.append(run(version, folder, executed))
    print_table(outcomes)
    return 1 if any(o.failures or not o.total for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
