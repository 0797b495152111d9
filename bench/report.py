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


def make_console(width: int = 120) -> Console:
    """As wide as the terminal; `width` where there is none."""
    return Console(width=None if Console().is_terminal else width, highlight=False)


def row(result: Result) -> list[str]:
    case, times = result.case, result.times
    call = ("bwd" if case.backward else "fwd") + (" causal" if case.causal else " full")
    return [
        f"{case.batch},{case.heads},{case.seq},{case.head_dim}", case.dtype, call, result.backend,
        f"{result.error:.1e}" + ("" if result.correct else " WRONG"), f"{result.their_error:.1e}",
        f"{times.ours * 1e3:.2f}", f"{times.theirs * 1e3:.2f}", f"{times.ratio:.2f}x",
        f"{times.low:.2f}-{times.high:.2f}", f"{case.flops / times.ours / 1e9:.0f}",
    ]  # fmt: skip


def print_table(results: Iterable[Result]) -> list[Result]:
    """Print the results as one table, with progress while they are measured, and return them."""
    console = make_console()
    console.print(f"attention on {machine()}")
    console.print("shape: batch, heads, seq, head_dim; error: largest difference to float64; ms: median;")
    console.print("ratio: torch's time / ours, median of interleaved pairs; torch's: scaled_dot_product_attention")
    done = []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
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


COLORS = {"float32": "tab:blue", "bfloat16": "tab:orange", "float16": "tab:green"}


def write_plot(results: list[Result], path: Path) -> None:
    """Ratio to PyTorch against sequence length: a panel for each pass, a colour for each dtype, causal dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter

    passes = sorted({r.case.backward for r in results})
    figure, panels = pyplot.subplots(
        1, len(passes), figsize=(6 * len(passes), 4.5), layout="constrained", sharey=True, squeeze=False
    )
    for axes, backward in zip(panels[0], passes, strict=True):
        lines: dict[tuple, list[tuple[int, float]]] = {}
        for r in results:
            if r.case.backward == backward:
                lines.setdefault((r.case.dtype, r.case.causal, r.case.head_dim), []).append((r.case.seq, r.times.ratio))
        for (dtype, causal, head_dim), points in lines.items():
            axes.plot(
                *zip(*sorted(points), strict=True), color=COLORS[dtype], linestyle="--" if causal else "-",
                marker="o" if head_dim == 64 else "s",
                label=f"{dtype} {'causal' if causal else 'full'}, head_dim {head_dim}",
            )  # fmt: skip
        axes.axhline(1, color="grey", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FormatStrFormatter("%g"))
        axes.set(xlabel="sequence length", title="backward" if backward else "forward")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("PyTorch's time / ours (above 1: ours is faster)")
    every = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(every.values(), every.keys(), loc="outside right center", fontsize="small")
    figure.suptitle(f"attention on {machine()}", fontsize="small")
    figure.savefig(path, dpi=120)
