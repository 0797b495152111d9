"""Part "ceilings": the card's peak FLOP/s and bandwidth in this run, of which the other parts' shares are."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

from .card import read_state
from .context import Call, Context


@triton.jit
def empty_kernel(x):
    pass


def run(context: Context) -> Iterator[dict]:
    context.plan(4)
    size, elements = (64, 1000) if context.rehearse else (8192, 2**30)
    yield measure_product(context, size)
    yield measure_copy(context, elements)
    x = context.randn(1)
    yield measure_launch(context, "empty Triton launch", lambda: empty_kernel[(1,)](x))
    yield measure_launch(context, "empty torch operation", lambda: x.add_(0))


def summarise(rows: list[dict]) -> list[str]:
    first = rows[0]
    load = f"{first['sm_clock_mhz']} MHz, {first['power_draw_w']} W, throttle {first['throttle']}"
    return [f"under load {load}", *(f"{row['case']:<28} {format_figure(row)}" for row in rows)]


def format_figure(row: dict) -> str:
    for unit, name in (("tflops", "TFLOP/s"), ("gbps", "GB/s")):
        if unit in row:
            return f"{row[unit]:,.0f} {name}"
    return f"{row['us']:.1f} us in a graph, {row['eager_us']:.1f} us to launch"


def measure_product(context: Context, size: int) -> dict:
    a, b = context.randn(size, size), context.randn(size, size)
    times = context.measure({"torch": lambda: a @ b}, 3 * 2 * size**2)["torch"]
    flops = 2.0 * size**3
    return {
        "case": f"product {size}^3 bfloat16", "us": times.median * 1e6, "tflops": flops / times.median / 1e12,
        "tflops_low": flops / times.high / 1e12, "tflops_high": flops / times.low / 1e12, "runs": times.runs,
        **read_state_under_load(context, lambda: a @ b),
    }  # fmt: skip


def read_state_under_load(context: Context, call: Call) -> dict:
    """Clocks, power and throttle reason while the GPU works."""
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(read_state, context.card)
        while not found.done():
            call()
            context.clock.wait()
    return found.result()


def measure_copy(context: Context, elements: int) -> dict:
    x = context.randn(elements)
    to = torch.empty_like(x)
    moved = 2 * 2 * elements
    times = context.measure({"torch": lambda: to.copy_(x)}, moved)["torch"]
    return {
        "case": f"copy of {moved / 2e9:.1f} GB", "us": times.median * 1e6, "gbps": moved / times.median / 1e9,
        "gbps_low": moved / times.high / 1e9, "gbps_high": moved / times.low / 1e9, "runs": times.runs,
        "correct": torch.equal(to, x),
    }  # fmt: skip


def measure_launch(context: Context, name: str, call) -> dict:
    """us: GPU time of one of many launches in a graph; eager_us: host time until the launch is queued."""
    times = context.measure({name: call}, warm=True)[name]
    eager = context.measure_host(call)
    return {"case": name, "us": times.median * 1e6, "eager_us": eager.median * 1e6, "by": times.by, "runs": times.runs}
