"""Attention against PyTorch's scaled_dot_product_attention: error, time, ratio."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

import flashattn

from .environment import describe_environment
from .measure import Pair, compute_max_error, measure_pair
from .table import collect, make_console, make_table


class Case(NamedTuple):
    batch: int
    heads: int
    seq: int
    head_dim: int
    dtype: str
    causal: bool
    backward: bool

    @property
    def command(self) -> str:
        flags = " --causal" * self.causal + " --backward" * self.backward
        shape = f"{self.batch},{self.heads},{self.seq},{self.head_dim}"
        return f"python -m bench attention --shape {shape} --dtype {self.dtype}{flags}"

    @property
    def flops(self) -> float:
        """FLOPs of the matrix products; 2.5 times as many backward, where S is recomputed."""
        forward = 4 * self.batch * self.heads * self.seq**2 * self.head_dim * (0.5 if self.causal else 1)
        return forward * (2.5 if self.backward else 1)


class Result(NamedTuple):
    case: Case
    backend: str
    error: float  # against float64
    their_error: float
    last_place: float  # one unit in the last place of the largest value
    times: Pair

    @property
    def correct(self) -> bool:
        """The error rule: at most twice PyTorch's own error in the same dtype, plus one unit in the last place."""
        return self.error <= 2 * self.their_error + self.last_place


QUICK = [
    Case(1, 8, seq, 64, dtype, causal, False)
    for dtype in ("float32", "bfloat16")
    for seq, causal in ((64, False), (512, True), (1024, False), (1024, True))
] + [Case(1, 8, 512, 64, dtype, True, True) for dtype in ("float32", "bfloat16")]

FULL = [
    Case(1, 8, seq, head_dim, dtype, causal, backward)
    for backward in (False, True)
    for dtype in ("float32", "bfloat16", "float16")
    for seq, head_dim in ((64, 64), (512, 64), (2048, 64), (2048, 128))
    for causal in (False, True)
]


def run(case: Case, device: torch.device, seconds: float) -> Result:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    shape = (case.batch, case.heads, case.seq, case.head_dim)
    q, k, v, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    if not case.backward:
        with torch.no_grad():
            return measure_forward(case, q, k, v, device, seconds)
    return measure_backward(case, q, k, v, grad, device, seconds)


def choose_backend(q: torch.Tensor) -> str:
    return flashattn.backends.choose(q.device, q.dtype, head_dim=q.shape[-1])


def make_result(case: Case, q, ours, theirs, truth, times: Pair) -> Result:
    """Of several results the largest error counts."""
    error, their_error = (max(map(compute_max_error, results, truth)) for results in (ours, theirs))
    last_place = torch.finfo(q.dtype).eps * max(t.abs().max().item() for t in truth)
    return Result(case, choose_backend(q), error, their_error, last_place, times)


def measure_forward(case: Case, q, k, v, device, seconds: float) -> Result:
    def ours():
        return flashattn.attention(q, k, v, causal=case.causal)

    def theirs():
        return scaled_dot_product_attention(q, k, v, is_causal=case.causal)

    with flashattn.use_backend("reference"):
        truth = flashattn.attention(q.double(), k.double(), v.double(), causal=case.causal)
    return make_result(case, q, [ours()], [theirs()], [truth], measure_pair(ours, theirs, device, seconds))


def measure_backward(case: Case, q, k, v, grad, device, seconds: float) -> Result:
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = flashattn.attention(*inputs, causal=case.causal)
    their_out = scaled_dot_product_attention(*inputs, is_causal=case.causal)

    def ours():
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    def theirs():
        return torch.autograd.grad(their_out, inputs, grad, retain_graph=True)

    with flashattn.use_backend("reference"):
        exact = [x.detach().double().requires_grad_() for x in inputs]
        truth = torch.autograd.grad(flashattn.attention(*exact, causal=case.causal), exact, grad.double())
    return make_result(case, q, ours(), theirs(), truth, measure_pair(ours, theirs, device, seconds))


TEXTS = ["shape", "dtype", "call", "backend"]
NUMBERS = ["error", "torch's", "ms", "torch's", "ratio", "quartiles", "GFLOP/s"]


def format_row(result: Result) -> list[str]:
    case, times = result.case, result.times
    call = ("bwd" if case.backward else "fwd") + (" causal" if case.causal else " full")
    return [
        f"{case.batch},{case.heads},{case.seq},{case.head_dim}", case.dtype, call, result.backend,
        f"{result.error:.1e}" + ("" if result.correct else " WRONG"), f"{result.their_error:.1e}",
        f"{times.ours * 1e3:.2f}", f"{times.theirs * 1e3:.2f}", f"{times.ratio:.2f}x",
        f"{times.low:.2f}-{times.high:.2f}", f"{case.flops / times.ours / 1e9:.0f}",
    ]  # fmt: skip


def print_results(results: Iterable[Result]) -> list[Result]:
    """Print a generator's results as one table, with progress while they are measured, and return them."""
    console = make_console()
    console.print(f"attention on {describe_environment()}")
    console.print("shape: batch, heads, seq, head_dim; error: largest difference to float64; ms: median;")
    console.print("ratio: torch's time / ours, median of interleaved pairs; torch's: scaled_dot_product_attention")
    done = collect(console, results, lambda result: result.case.command)
    console.print(make_table(TEXTS, NUMBERS, map(format_row, done)))
    console.print(f"to repeat one row, here the last: {done[-1].case.command}")
    return done


def write_json(results: list[Result], path: Path) -> None:
    """One JSON object a line, each with the command that reproduces it."""
    lines = [
        json.dumps(
            {
                **r.case._asdict(), "backend": r.backend, "error": r.error, "torch_error": r.their_error,
                **r.times._asdict(), "machine": describe_environment(), "command": r.case.command,
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
        plot_lines(axes, [r for r in results if r.case.backward == backward])
        axes.set(xlabel="sequence length", title="backward" if backward else "forward")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FormatStrFormatter("%g"))
    panels[0][0].set_ylabel("PyTorch's time / ours (above 1: ours is faster)")
    every = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(every.values(), every.keys(), loc="outside right center", fontsize="small")
    figure.suptitle(f"attention on {describe_environment()}", fontsize="small")
    figure.savefig(path, dpi=120)


def plot_lines(axes, results: list[Result]) -> None:
    lines: dict[tuple, list[tuple[int, float]]] = {}
    for r in results:
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
    axes.grid(alpha=0.3)
