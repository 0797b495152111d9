"""Reports of launches: a table of counts, lower bounds, and the Python source with the counts of each line."""

from __future__ import annotations

import html
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..table import make_table
from .frontend.syntax import Location
from .machine.counts import PIPES, Counts, Launch, find_pipe
from .rates import compute_bounds, find_gpu

TRITON = "/triton/language/"  # Triton's own functions, in any environment
CONTEXT_LINES = 2  # lines shown around a counted one
LINE_FIELDS = ("issued", *PIPES, "global_sectors", "shared_wavefronts")


def find_user_line(location: Location | None) -> Location | None:
    """The innermost line outside of Triton's own library."""
    while location is not None and location.caller is not None and TRITON in location.file:
        location = location.caller
    return location


def sum_by_line(counts: Counts) -> dict[tuple[str, int], dict[str, int]]:
    """{(file, line): counts}: every field of Counts, and warp instructions by pipe. ("", 0): unknown line."""
    found: dict[tuple[str, int], dict[str, int]] = {}
    for instruction, row in counts.rows():
        line = find_user_line(instruction.location)
        sums = found.setdefault((line.file, line.line) if line else ("", 0), dict.fromkeys([*Counts.FIELDS, *PIPES], 0))
        for name, value in row.items():
            sums[name] += value
        sums[find_pipe(instruction)] += row["issued"]
    return found


def make_record(launch: Launch) -> dict[str, object]:
    """A launch as a JSON object."""
    counts, blocks = launch.counts, launch.blocks
    limits = compute_bounds(counts, launch.architecture, blocks)
    return {
        "kernel": launch.kernel, "architecture": launch.architecture, "grid": list(launch.grid),
        "threads": launch.threads, "shared_bytes": launch.shared_bytes,
        **{field: counts.total(field) for field in Counts.FIELDS}, "barriers": count_barriers(counts),
        "read_bytes": counts.read_bytes, "written_bytes": counts.written_bytes,
        "tensors": [tensor._asdict() for tensor in counts.tensors],
        "pipes": counts.sum_by_pipe(), "opcodes": counts.sum_by_opcode(),
        "bounds_us": {b.name: b.microseconds for b in limits}, "bound": limits[0].name,
        "lines": {f"{Path(file).name}:{line}": sums for (file, line), sums in sum_by_line(counts).items()},
    }  # fmt: skip


def count_barriers(counts: Counts) -> int:
    """Arrivals of warps at barriers of the block."""
    issued = counts.sum_by_opcode()
    return sum(n for op, n in issued.items() if op.startswith(("bar.sync", "barrier.sync", "barrier.cta.sync")))


# ------------------------------------------------------------------------------------------------ terminal


def format_count(x: int) -> str:
    return f"{x:,}" if x else "."


def print_launch(console: Console, launch: Launch) -> None:
    counts, blocks = launch.counts, launch.blocks
    console.print(
        f"[bold]{launch.kernel}[/bold]  {launch.architecture}, {blocks:,} blocks of {launch.threads} threads, "
        f"{launch.shared_bytes:,} bytes of shared memory"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value, note in summarise(counts):
        table.add_row(name, value, note)
    console.print(table)
    print_tensors(console, counts)
    limits = compute_bounds(counts, launch.architecture, blocks)
    gpu = find_gpu(launch.architecture)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.title = f"lower bounds on {gpu.name} (no latency, no caches)"
    for name, justify in (("limit", "left"), ("work", "right"), ("us", "right"), ("", "left")):
        table.add_column(name, justify=justify, no_wrap=True)
    for bound in limits:
        bar = "#" * round(30 * bound.microseconds / max(limits[0].microseconds, 1e-12))
        table.add_row(bound.name, bound.work, f"{bound.microseconds:.3f}", bar)
    console.print(table)


def print_tensors(console: Console, counts: Counts) -> None:
    """The traffic of each tensor: more than its size if it is read again or by several programs."""
    rows = (
        (t.name, f"{t.size:,}", f"{t.requested:,}", f"{t.unique:,}", f"{t.requested / t.size:.2f}")
        for t in counts.tensors
    )
    console.print(make_table(["tensor"], ["bytes", "requested", "unique", "requested / bytes"], rows))


def summarise(counts: Counts) -> list[tuple[str, str, str]]:
    """(name, value, explanation)."""
    issued, requests = counts.total("issued"), counts.total("global_requests")
    sectors, moved = counts.total("global_sectors"), counts.total("global_bytes")
    wavefronts, ideal = counts.total("shared_wavefronts"), counts.total("shared_ideal")
    rows = [("warp instructions", f"{issued:,}", "")]
    for name, n in counts.sum_by_pipe().items():
        rows.append((f"  {name}", f"{n:,}", f"{n / max(issued, 1):.1%}"))
    rows += [
        ("tensor FLOP", f"{counts.total('flops'):,}", ""),
        ("global requests", f"{requests:,}", f"{sectors / max(requests, 1):.1f} sectors each"),
        ("  sectors", f"{sectors:,}", f"{moved / max(32 * sectors, 1):.0%} of their bytes requested"),
        ("  bytes requested", f"{moved:,}", ""),
        ("  unique bytes", f"{counts.read_bytes + counts.written_bytes:,}",
         f"{counts.read_bytes:,} read, {counts.written_bytes:,} written"),
        ("shared requests", f"{counts.total('shared_requests'):,}", ""),
        ("  wavefronts", f"{wavefronts:,}", f"{wavefronts - ideal:,} of them for bank conflicts"),
        ("barriers", f"{count_barriers(counts):,}", "arrivals of warps"),
        ("divergent branches", f"{counts.total('divergent'):,}", ""),
    ]  # fmt: skip
    return rows


def annotate_source(launch: Launch) -> dict[str, list[tuple[int, str, dict[str, int] | None]]]:
    """{file: [(line number, text, counts)]}: lines with counts, and two around each. Number 0 is a gap."""
    lines, files = sum_by_line(launch.counts), {}
    for file in sorted({file for file, _ in lines if file}):
        there = sorted(line for name, line in lines if name == file)
        path = Path(file)
        text = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        shown = sorted(
            {
                n
                for line in there
                for n in range(line - CONTEXT_LINES, line + CONTEXT_LINES + 1)
                if 0 < n <= max(len(text), line)
            }
        )
        files[file] = []
        for before, n in zip([shown[0] - 1, *shown], shown, strict=False):
            if n != before + 1:
                files[file].append((0, "", None))
            files[file].append((n, text[n - 1] if n <= len(text) else "", lines.get((file, n))))
    return files


def print_lines(console: Console, launch: Launch) -> None:
    """Plain lines rather than a table: source lines are cropped, not wrapped."""
    total = max(launch.counts.total("issued"), 1)
    head = f"{'share':>6}" + "".join(f"{HEADS[name]:>9}" for name in LINE_FIELDS)
    for file, lines in annotate_source(launch).items():
        console.print(f"[bold]{file}[/bold]", overflow="ignore", crop=True, no_wrap=True)
        console.print(f"[dim]{head}  line  source[/dim]", no_wrap=True, crop=True)
        for n, text, sums in lines:
            counts = " " * len(head)
            if sums is not None:
                counts = f"{sums['issued'] / total:>6.1%}" + "".join(
                    f"{format_count(sums[name]):>9}" for name in LINE_FIELDS
                )
            line = Text(f"{counts} {n or '':>5}  {text if n else '...'}")
            if sums is not None and sums["issued"] > total / 20:
                line.stylize("bold")
            console.print(line, no_wrap=True, overflow="crop", crop=True)
        console.print()
    console.print(
        "share, instr: of warp instructions; tensor to control: by pipe; sectors: global; waves: shared wavefronts\n"
    )


HEADS = {name: name for name in PIPES} | {
    "issued": "instr", "global_sectors": "sectors", "shared_wavefronts": "waves", "special": "spec",
}  # fmt: skip

# ------------------------------------------------------------------------------------------------ page

STYLE = """
:root { color-scheme: light dark; --line: #8884; --heat: 214 120 60; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; } p, caption { color: GrayText; text-align: left; }
table { border-collapse: collapse; } td, th { padding: 1px .6em; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid var(--line); font-weight: 600; }
td.name, th.name { text-align: left; } .side { display: flex; flex-wrap: wrap; gap: 3rem; align-items: start; }
.source { font: 12.5px/1.5 ui-monospace, monospace; overflow-x: auto; display: block; }
.source th { position: sticky; top: 0; background: Canvas; }
.source td.code { text-align: left; white-space: pre; } .source td.n { color: GrayText; }
.bar { background: rgb(var(--heat)); height: .8em; display: inline-block; min-width: 1px; }
"""


def render_page(launches: list[Launch], command: str) -> str:
    """A self-contained HTML page of the launches."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(launches[0].kernel)} on {launches[0].architecture}</title><style>{STYLE}</style>",
        f"<h1>Compiled for {launches[0].architecture}, executed and counted</h1>",
        f"<p><code>{html.escape(command)}</code></p><p>Counts are exact for these inputs. The lower bounds ignore",
        "latencies and caches: a launch takes longer.</p>",
    ]
    for launch in launches:
        parts += render_launch(launch)
    return "\n".join(parts) + "</html>\n"


def render_launch(launch: Launch) -> list[str]:
    counts, blocks = launch.counts, launch.blocks
    limits = compute_bounds(counts, launch.architecture, blocks)
    gpu = find_gpu(launch.architecture)
    rows = "".join(
        f"<tr><td class='name'>{html.escape(a).replace('  ', '&emsp;')}<td>{b}<td class='name'>{html.escape(c)}"
        for a, b, c in summarise(counts)
    )
    bars = "".join(
        f"<tr><td class='name'>{b.name}<td>{b.work}<td>{b.microseconds:.3f}<td class='name'>"
        f"<span class='bar' style='width:{12 * b.microseconds / max(limits[0].microseconds, 1e-12):.2f}em'></span>"
        for b in limits
    )
    out = [
        f"<h2>{html.escape(launch.kernel)}: {blocks:,} blocks of {launch.threads} threads, "
        f"{launch.shared_bytes:,} bytes of shared memory</h2><div class='side'><table>{rows}</table>",
        f"<table><tr><th class='name'>lower bound on {gpu.name}<th>work<th>us<th>{bars}</table></div>",
    ]
    total = max(counts.total("issued"), 1)
    files = annotate_source(launch)
    most = max((sums["issued"] for lines in files.values() for _, _, sums in lines if sums), default=1)
    for file, lines in files.items():
        head = "".join(f"<th>{HEADS[name]}" for name in LINE_FIELDS)
        out.append(
            f"<h2>{html.escape(Path(file).name)}</h2><table class='source'>"
            f"<tr><th>share{head}<th><th class='name'>source"
        )
        for n, text, sums in lines:
            cells, heat = "<td>" * (1 + len(LINE_FIELDS)), 0.0
            if sums is not None:
                heat = sums["issued"] / max(most, 1)
                cells = f"<td>{sums['issued'] / total:.1%}" + "".join(
                    f"<td>{format_count(sums[name])}" for name in LINE_FIELDS
                )
            if not n:
                out.append(f"<tr><td colspan='{len(LINE_FIELDS) + 2}'>&#8942;")
                continue
            style = f"background:rgb(var(--heat)/{heat * 0.45:.3f})"
            out.append(f"<tr style='{style}'>{cells}<td class='n'>{n}<td class='code'>{html.escape(text)}")
        out.append("</table>")
    return out
