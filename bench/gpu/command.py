"""python -m bench gpu: its options, and a run from the first part to the summary."""

from __future__ import annotations

import argparse
import re
from datetime import datetime
from pathlib import Path

from ..usage import UsageError
from . import rules
from .parts import PARTS, choose
from .results import read, read_file

BUDGET, REHEARSAL_BUDGET = 240.0, 1800.0
DESCRIPTION = """\
Measures and checks everything on the GPU of this machine, in parts, within a time budget. Each part runs in its own
process: if it fails, hangs or runs out of time, the others still run. Each row is written to results.jsonl at once, so
an interrupted run keeps its measurements; summary.txt is the table printed at the end, log.txt the parts' output.
Without a GPU, --rehearse runs the same code on a CPU at the smallest sizes, with its kernels on the PTX machine.

  python -m bench gpu                          everything, four minutes
  python -m bench gpu --only attention --only norms --budget 90
  python -m bench gpu --rehearse               on any machine
  python -m bench gpu --summary FILE           the tables of a results.jsonl, as in bench/results/
"""


def add_parser(commands) -> None:
    parts = "\n".join(f"  {part.name:<11} {part.help}" for part in PARTS.values())
    command = commands.add_parser(
        "gpu", help="all measurements on a GPU, in one command with a time budget",
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"parts, in the order they run:\n{parts}\n\nrules:\n{rules.TEXT}\n\nexit codes: 0 all correct, 1 a row "
        "is WRONG or a part failed, 2 no GPU or wrong usage",
    )  # fmt: skip
    budgets = f"default {BUDGET:.0f}; {REHEARSAL_BUDGET:.0f} with --rehearse"
    command.add_argument("--budget", type=float, metavar="SECONDS", help=budgets)
    command.add_argument("--only", action="extend", nargs="+", choices=PARTS, metavar="PART", help="only these parts")
    command.add_argument("--out", type=Path, metavar="DIRECTORY", help="default bench/out/gpu-CARD-DATE-TIME")
    command.add_argument("--summary", type=Path, metavar="FILE", help="only print the tables of an earlier run")
    command.add_argument("--rehearse", action="store_true", help="without a GPU: every part, at the smallest sizes")
    command.set_defaults(run=run)


def run(args) -> int:
    """0: all correct; 1: a row is wrong or a part failed."""
    from .card import REHEARSAL, find_card
    from .summary import is_correct, show, summarise, write_summary
    from .supervisor import Run, run_all

    if args.summary is not None:
        if args.only or args.out or args.budget or args.rehearse:
            raise UsageError("--summary runs nothing and takes no other options")
        lines = read_results(args.summary)
        show(summarise(lines))
        return 0 if is_correct(lines) else 1
    budget = args.budget if args.budget is not None else REHEARSAL_BUDGET if args.rehearse else BUDGET
    if budget <= 0:
        raise UsageError(f"--budget takes seconds above 0, got {budget}")
    card = REHEARSAL if args.rehearse else find_card()
    if card is None:
        raise UsageError("bench gpu needs a GPU, and PyTorch finds none; --rehearse runs it on the CPU")
    out = (args.out or name_directory(card.name)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if (out / "results.jsonl").exists():
        raise UsageError(f"--out takes a directory without results, and {out} has some")
    print(f"{card.name}: results go to {out}")
    settings = Run(choose(args.only), budget, out, card, args.rehearse)
    try:
        run_all(settings)
    finally:
        write_summary(out)
    return 0 if is_correct(read(out)) else 1


def read_results(file: Path) -> list[dict]:
    try:
        lines = read_file(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--summary takes a results.jsonl, and {file} cannot be read as one: {error}") from None
    if not all(isinstance(line, dict) and line.keys() >= {"kind", "part"} for line in lines):
        raise UsageError(f"--summary takes a results.jsonl, and {file} has lines without kind and part")
    return lines


def name_directory(card: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return Path("bench/out") / f"gpu-{name}-{datetime.now():%Y-%m-%d-%H%M%S}"
