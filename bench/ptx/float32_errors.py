"""python -m bench ptx precision: errors of float32 against float64 for each precision of its matrix products."""

from __future__ import annotations

import torch
from rich.console import Console

import flashattn

from .. import launches
from ..table import make_table
from .driver import device

SETTINGS = ("highest", "high", "medium")  # of torch.set_float32_matmul_precision


def measure_errors(shape: tuple[int, ...], architecture: str, setting: str) -> dict[str, float]:
    """The largest error of each result: attention, its gradients, and one decode step on a cache of that length."""
    found = {}
    calls = {"": launches.make_attention(shape, torch.float32, backward=True)}
    calls["decode"] = launches.make_decode(shape, torch.float32)
    for call, work in calls.items():
        with flashattn.use_backend("reference"):
            truth = work.truth()
        with device(architecture), flashattn.use_backend("triton"):
            results = run_with_precision(setting, work.run)
        found |= {call or name: (x.double() - truth[name]).abs().max().item() for name, x in results.items()}
    return found


def run_with_precision(setting: str, call):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        return call()
    finally:
        torch.set_float32_matmul_precision(before)


def run(shape: tuple[int, ...], architecture: str, console: Console) -> int:
    errors = {}
    for setting in SETTINGS:
        with console.status(f"running {setting} on {architecture}"):
            errors[setting] = measure_errors(shape, architecture, setting)
    rows = ([setting, *(f"{error:.1e}" for error in found.values())] for setting, found in errors.items())
    console.print(f"float32, ({', '.join(map(str, shape))}), {architecture}: largest errors against float64")
    console.print(make_table(["precision"], list(errors[SETTINGS[0]]), rows))
    return 0
