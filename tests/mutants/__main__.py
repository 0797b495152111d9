"""python -m tests.mutants [-k WORD …]: plants each fault of `table.py` in a copy of this checkout and runs its tests,
of which one has to fail. Exit code 1 if a mutant escapes. Faults in csrc/ are built for portable instructions only."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from .table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
MINUTES = 10  # for the tests of one mutant
# On a processor of no name the engine has its portable kernels alone. Only what is older than its sources is compiled.
BUILD = """
import glob, os, platform, runpy, sys
from setuptools._distutils.unixccompiler import UnixCCompiler
platform.machine, compile_one = lambda: "", UnixCCompiler._compile
def compile_changed(self, obj, src, *rest):
    newest = max(map(os.path.getmtime, [src, *glob.glob("csrc/*.h")]))
    if not (os.path.exists(obj) and os.path.getmtime(obj) > newest):
        compile_one(self, obj, src, *rest)
UnixCCompiler._compile = compile_changed
sys.argv = ["setup.py", "-q", "build_ext", "--inplace", "--force", "--build-temp", "build/mutants"]
runpy.run_path("setup.py", run_name="__main__")
"""


class Outcome(NamedTuple):
    word: str  # "killed", or what happened in its place
    seconds: float
    output: str

    @property
    def is_killed(self) -> bool:
        return self.word == "killed"


def copy_checkout(target: Path) -> None:
    """Tracked and new files, as they are now, and the engine; times too, by which it is known what to build."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    engines = [path.relative_to(ROOT) for path in ROOT.glob("flashattn/_C*")]
    for name in [*filter(None, listed.stdout.decode().split("\0")), *engines]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Without files of bytecode: one of the same second and size as a mutant would pass for it."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | variables
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=MINUTES * 60
    )


def build(folder: Path) -> str:
    """The compiler's complaint; empty if there is none."""
    done = python(folder, "-c", BUILD)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@contextlib.contextmanager
def planted(folder: Path, mutant: Mutant) -> Iterator[None]:
    path = folder / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {source.count(mutant.old)} times in {mutant.file}: {mutant.old}")
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        yield
    finally:
        path.write_text(source)


def run_tests(folder: Path, tests: list[str], interpreted: bool, *options: str) -> tuple[int, int, str]:
    """(exit code, failed tests, output)."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    marked = ["-m", "interpreter"] if interpreted else []
    command = ["-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *marked, *options, *tests]
    done = python(folder, *command, TRITON_INTERPRET="1" if interpreted else "0")
    failed = len(list(ElementTree.parse(report).iter("failure"))) if report.exists() else 0
    return done.returncode, failed, done.stdout + done.stderr


def judge(folder: Path, mutant: Mutant) -> Outcome:
    """A test has to fail. That one cannot be collected, or that the process ends, does not count."""
    start = time.monotonic()
    with planted(folder, mutant):
        try:
            complaint = build(folder) if mutant.is_engine else ""
            if complaint:
                word, output = "NOT BUILT", complaint
            else:
                code, failed, output = run_tests(folder, list(mutant.tests), mutant.interpreted, "-x")
                word = "killed" if code == 1 and failed else "ESCAPED" if code == 0 else f"EXIT CODE {code}"
        except subprocess.TimeoutExpired:
            word, output = "ENDLESS", ""
    return Outcome(word, time.monotonic() - start, output)


def kind(mutant: Mutant) -> tuple[bool, bool]:
    return mutant.is_engine, mutant.interpreted


def run(folder: Path, mutants: list[Mutant]) -> list[tuple[Mutant, Outcome]]:
    outcomes = []
    for (is_engine, interpreted), group in groupby(sorted(mutants, key=kind), kind):
        group = list(group)
        if is_engine and (complaint := build(folder)):
            raise SystemExit(complaint)
        tests = sorted({test for m in group for test in m.tests})
        code, _, output = run_tests(folder, tests, interpreted, "-n", "2", "--dist", "worksteal")
        if code:
            raise SystemExit(f"{output}\nwithout a fault their tests have to pass")
        for mutant in group:
            outcomes.append((mutant, judge(folder, mutant)))
            print(f"{outcomes[-1][1].word}: {mutant.name}", flush=True)
    return outcomes


def print_table(outcomes: list[tuple[Mutant, Outcome]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("mutant", "file", "seconds", ""):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for mutant, outcome in outcomes:
        table.add_row(mutant.name, mutant.file, f"{outcome.seconds:.0f}", outcome.word)
    console = Console(width=140, highlight=False)
    console.print(table)
    for mutant, outcome in outcomes:
        if not outcome.is_killed:
            console.print(f"\n{mutant.name}\n{outcome.output[-3000:]}", markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "-k", nargs="+", default=[""], metavar="WORD", help="those with one of these words in name or file"
    )
    words = parser.parse_args().k
    chosen = [m for m in MUTANTS if any(word in f"{m.name} {m.file}" for word in words)]
    with tempfile.TemporaryDirectory() as scratch:
        copy_checkout(Path(scratch))
        outcomes = run(Path(scratch), chosen)
    print_table(outcomes)
    return 0 if chosen and all(outcome.is_killed for _, outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
