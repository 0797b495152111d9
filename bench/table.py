"""Tables of the command line, in one style."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

Item = TypeVar("Item")


def make_console(width: int = 120) -> Console:
    """As wide as the terminal; `width` where there is none."""
    return Console(width=None if Console().is_terminal else width, highlight=False)


def make_table(texts: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str] | None]) -> Table:
    """Columns of text, then columns of numbers, aligned right. A row that is None begins a new section."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    return table


def collect(console: Console, items: Iterable[Item], describe: Callable[[Item], str]) -> list[Item]:
    """Exhaust a generator that measures; a status line names the latest item."""
    done: list[Item] = []
    with console.status("measuring") as status:
        for item in items:
            done.append(item)
            status.update(f"measured {len(done)}: {describe(item)}")
    return done
