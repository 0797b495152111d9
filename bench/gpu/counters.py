"""Part "counters": Nsight Compute's counters of three launches, compared with those of the PTX machine.

Each kernel runs under `ncu` in its own process (`python -m bench.gpu.counters KERNEL`), and here on the PTX machine, on
the same data. Where ncu is missing, not permitted or fails, the row says so and has the PTX machine's counts alone.
"""

from __future__ import annotations

import csv
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flashattn.backends import triton as backend
from flashattn.protocol import Saved
from flashattn.score import Norm, Score

from .. import ptx
from ..ptx.machine.counts import Counts
from ..ptx.memory.segments import SECTOR
from .context import Context, describe_error

MARGIN = 2.0  # seconds before the part's end: the timeout of ncu
SHAPE = (1, 2, 256, 64)  # batch, heads, seq, head_dim
ROWS, COLS = 64, 1024  # of the norm


class Quantity(NamedTuple):
    """A counter of both, and how they compare."""

    name: str
    metrics: tuple[str, ...]  # of Nsight Compute, summed; those that a card lacks are left out
    counted: Callable[[Counts], int]
    comparison: str


QUANTITIES = [
    Quantity(
        "warp instructions", ("smsp__inst_executed.sum",),
        lambda c: c.total("issued") - c.sum_by_pipe()["move"],
        "not comparable: SASS against PTX without its moves",
    ),
    Quantity(
        "tensor instructions", ("sm__inst_executed_pipe_tensor_op_hmma.sum",),
        lambda c: c.sum_by_pipe()["tensor"],
        "comparable: an mma is one HMMA, a wgmma of a warp one HGMMA, which ncu counts there too",
    ),
    Quantity(
        "global sectors, L1",
        (
            "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum", "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",
            "l1tex__t_sectors_pipe_lsu_mem_global_op_ldgsts_cache_access.sum",
            "l1tex__t_sectors_pipe_lsu_mem_global_op_ldgsts_cache_bypass.sum",
        ),
        lambda c: c.total("global_sectors"),
        "comparable, but for copies by TMA, which do not pass there",
    ),
    Quantity(
        "sectors read, L2", ("lts__t_sectors_srcunit_tex_op_read.sum",),
        lambda c: c.read_bytes // SECTOR,
        "the PTX machine counts each sector once: at least so many",
    ),
    Quantity(
        "sectors written, L2", ("lts__t_sectors_srcunit_tex_op_write.sum",),
        lambda c: c.written_bytes // SECTOR,
        "the PTX machine counts each sector once: at least so many",
    ),
    Quantity(
        "shared wavefronts", ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",),
        lambda c: c.total("shared_wavefronts"),
        "comparable, but for what wgmma reads itself",
    ),
    Quantity(
        "bank conflicts",
        (
            "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
            "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
        ),
        lambda c: c.total("shared_wavefronts") - c.total("shared_ideal"),
        "comparable: wavefronts beyond one for each group of lanes",
    ),
]  # fmt: skip


def run(context: Context) -> Iterator[dict]:
    """A row for each kernel and quantity, or one for a kernel that cannot be compared."""
    context.plan(len(LAUNCHES))
    with ThreadPoolExecutor(len(LAUNCHES)) as pool:  # ncu profiles one at a time, but mostly starts up
        counting = {kernel: pool.submit(run_under_ncu, kernel, context.seconds_left() - MARGIN) for kernel in LAUNCHES}
        for kernel in LAUNCHES:
            yield from compare_kernel(context, kernel, counting[kernel])


def compare_kernel(context: Context, kernel: str, counting: Future) -> Iterator[dict]:
    try:
        launch = run_on_ptx(kernel, context.card.architecture)
        values = counting.result()
    except NcuError as error:
        counted = {q.name: int(q.counted(launch.counts)) for q in QUANTITIES}
        yield {"case": kernel, "skipped": str(error), "ptx": counted}
    except Exception as error:  # a fault of the kernel, or an instruction that the machine lacks
        yield {"case": kernel, "failed": f"PTX machine: {describe_error(error)}"}
    else:
        yield from (compare(kernel, q, values, launch) for q in QUANTITIES)


def compare(kernel: str, quantity: Quantity, values: dict[str, float], launch: ptx.Launch) -> dict:
    found = [values[metric] for metric in quantity.metrics if metric in values]
    ncu, machine = (int(sum(found)) if found else None), int(quantity.counted(launch.counts))
    ratio = ncu / machine if ncu is not None and machine else None
    return {
        "case": kernel, "quantity": quantity.name, "ncu": ncu, "ptx": machine,
        "ratio": ratio, "comparison": quantity.comparison, "architecture": launch.architecture,
        "grid": list(launch.grid), "metrics": {metric: values.get(metric) for metric in quantity.metrics},
    }  # fmt: skip


def summarise(results: list[dict]) -> list[str]:
    return ["Nsight Compute / PTX machine, the same launch", *(format_line(result) for result in results)]


def format_line(r: dict) -> str:
    if "quantity" not in r:
        return f"{r['case']}: {r.get('skipped') or r.get('failed')}"
    ncu, ratio = "-" if r["ncu"] is None else f"{r['ncu']:,}", "" if r["ratio"] is None else f"{r['ratio']:.3f}"
    return f"{r['case']:<22} {r['quantity']:<20} {ncu:>10} / {r['ptx']:>10,} {ratio:>7}  {r['comparison']}"


# --------------------------------------------------------------------------------------------- launches


def make_tensors(device: torch.device, *shape: int) -> Iterator[Tensor]:
    """Random tensors, equal on every device."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(shape, generator=generator).to(device, torch.bfloat16)


def launch_attention_forward(device: torch.device) -> None:
    q, k, v = itertools.islice(make_tensors(device, *SHAPE), 3)
    backend.forward(q, k, v, Score(SHAPE[3] ** -0.5, right=0))


def launch_attention_backward_kv(device: torch.device) -> None:
    q, k, v, grad = itertools.islice(make_tensors(device, *SHAPE), 4)
    score = Score(SHAPE[3] ** -0.5, right=0)
    out, lse, rest = backend.forward(q, k, v, score)
    backend.backward(grad, None, Saved(q, k, v, out, lse, rest), score, False, [])


def launch_norm_forward(device: torch.device) -> None:
    x = next(make_tensors(device, ROWS, COLS))
    backend.norm_forward(x, None, next(make_tensors(device, COLS)), None, x.dtype, False, Norm(True, 1e-5))


LAUNCHES = {
    "attention_forward": launch_attention_forward,
    "attention_backward_kv": launch_attention_backward_kv,
    "norm_forward": launch_norm_forward,
}


def run_on_ptx(kernel: str, architecture: str) -> ptx.Launch:
    if architecture not in ptx.driver.ARCHITECTURES:
        raise ValueError(f"it does not run {architecture}")
    with ptx.device(architecture) as gpu:
        LAUNCHES[kernel](torch.device("cpu"))
    return next(launch for launch in gpu.launches if launch.kernel in (kernel, f"{kernel}_hopper"))


# --------------------------------------------------------------------------------------------- Nsight Compute


class NcuError(RuntimeError):
    """Why ncu gave no counters."""


def run_under_ncu(kernel: str, seconds: float) -> dict[str, float]:
    """Values by metric, of the first launch of this kernel."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise NcuError("ncu is not installed, or not on PATH")
    metrics = ",".join(metric for quantity in QUANTITIES for metric in quantity.metrics)
    command = [
        ncu, "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base", "--launch-count", "1",
        "--kernel-name", f"regex:^{kernel}", "--metrics", metrics, sys.executable, "-m", __name__, kernel,
    ]  # fmt: skip
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(seconds, 0), env=os.environ | {"PYTHONPATH": paths}
        )
    except subprocess.TimeoutExpired:
        raise NcuError(f"ncu did not end in {seconds:.0f} s") from None
    values = parse(done.stdout)
    if not values:
        raise NcuError(
            find_error(done.stdout + done.stderr) or f"ncu printed no counts and ended with {done.returncode}"
        )
    return values


def find_error(output: str) -> str | None:
    """The error that ncu printed."""
    if "ERR_NVGPUCTRPERM" in output:
        return "this user may not read the GPU's counters (ERR_NVGPUCTRPERM)"
    return next((line for line in output.splitlines() if line.startswith("==ERROR==")), None)


def parse(output: str) -> dict[str, float]:
    """Values by metric, of the first kernel in the output of `ncu --csv`.

    The table begins at the line with the column "ID", after other output. With --page raw each metric is a column, and
    a line of units follows the header; other pages have a line for each metric. Metrics that a card lacks are "n/a".
    Numbers may have commas.
    """
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        return {}
    table = [row for row in csv.DictReader(lines[start:]) if (row["ID"] or "").isdigit()]
    if not table:
        return {}
    if "Metric Name" in table[0]:
        pairs = [(row["Metric Name"], row["Metric Value"]) for row in table if row["ID"] == table[0]["ID"]]
    else:
        pairs = [(name, value) for name, value in table[0].items() if name and "__" in name]
    return {name: value for name, text in pairs if (value := parse_number(text)) is not None}


def parse_number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def main(kernel: str) -> None:
    """The process under ncu: the launch on the GPU or, without one, on the PTX machine."""
    if torch.cuda.is_available():
        LAUNCHES[kernel](torch.device("cuda"))
        torch.cuda.synchronize()
        return
    with ptx.device("sm_90"):
        LAUNCHES[kernel](torch.device("cpu"))


if __name__ == "__main__":
    main(sys.argv[1])
