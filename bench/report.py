"""Tables, JSON lines and plots of results."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import flashattn

from .attention import Result

LEFT = ["shape", "dtype", "call", "backend"]
RIGHT = ["error", "torch's", "ms", "torch's", "ratio", "quartiles", "GFLOP/s"]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """Hardware and versions, for under every figure."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cpu = f"{cpu_name()} ({flashattn.backends.cpu.isa()}), {torch.get_num_threads()} threads"
    return f"{cpu}{gpu}; torch {torch.__version__}, flashattn {flashattn.__version__}"


def row(result: Result) -> list[str]:
    case, times = result.case, result.times
    call = ("causal " if case.causal else "full ") + ("backward" if case.backward else "forward")
    return [
        f"{case.batch},{case.heads},{case.seq},{case.head_dim}", case.dtype, call, result.backend,
        f"{result.error:.1e}" + ("" if result.correct else " WRONG"), f"{result.their_error:.1e}",
        f"{times.ours * 1e3:.2f}", f"{times.theirs * 1e3:.2f}", f"{times.ratio:.2f}x",
        f"{times.low:.2f}-{times.high:.2f}", f"{case.flops / times.ours / 1e9:.0f}",
    ]  # fmt: skip


def print_table(results: Iterable[Result]) -> list[Result]:
    """Print the results as one table, with progress while they are measured, and return them."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(f"attention on {machine()}")
    console.print("shape: batch, heads, seq, head_dim; error: largest difference to float64; ms: median;")
    console.print("ratio: torch's time / ours, median of interleaved pairs; torch's: scaled_dot_product_attention")
    done = []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in LEFT:
        table.add_column(name, no_wrap=True)
    for name in RIGHT:
        table.add_column(name, justify="right", no_wrap=True)
    with console.status("measuring") as status:
        for result in results:
            done.append(result)
            table.add_row(*row(result))
            status.update(f"measured {len(done)}: {result.case.command}")
    console.print(table)
    console.print(f"one row alone, for instance the last: {done[-1].case.command}")
    return done


def write_json(results: list[Result], path: Path) -> None:
    """One JSON object a line, each with the command that reproduces it."""
    lines = [
        json.dumps(
            {
                **r.case._asdict(), "backend": r.backend, "error": r.error, "torch_error": r.their_error,
                **r.times._asdict(), "machine": machine(), "command": r.case.command,
            }
        )
        for r in results
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_plot(results: list[Result], path: Path) -> None:
    """Ratio to PyTorch against sequence length, a line for each dtype, mask and pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in results:
        label = f"{r.case.dtype} {'causal' if r.case.causal else 'full'} {'backward' if r.case.backward else 'forward'}"
        lines.setdefault(f"{label}, head_dim {r.case.head_dim}", []).append((r.case.seq, r.times.ratio))
    for label, points in lines.items():
        points.sort()
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=1, linestyle="--")
    axes.set(xscale="log", xlabel="sequence length", ylabel="times faster than PyTorch's SDPA", title="attention")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
