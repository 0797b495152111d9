"""Part "profile": one training step of a small Llama (forward, backward, optimizer) under torch.profiler. It writes a
trace for chrome://tracing or Perfetto next to the results, and reports the kernels' shares of the step's device time.

In a rehearsal, without a device, the shares are of CPU time.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity

from model.config import Config
from model.training.batches import Batch
from model.training.train import Processes, Training, make_optimizer, train_step
from model.transformer import Transformer

from .context import Context, summarise_samples

FILE = "training-step.json.gz"
LARGEST = 16 * 2**20  # bytes; a larger trace is deleted
STEPS = 6  # without the profiler; the first is a warm-up
# Groups of kernels and substrings of their names, the first match counts; in a rehearsal, PyTorch's operators.
GROUPS = {
    "attention backward": ("attention_backward", "flashattentionbackward"),
    "attention forward": ("attention_forward", "flashattention"),
    "decode": ("attention_decode", "attention_merge"),
    "norms": ("norm_forward", "norm_backward", "fusednorm"),
    "rotary": ("rotate_and_store",),
    "matmul": ("gemm", "nvjet", "xmma", "cutlass", "cublas", "splitk", "aten::mm", "aten::addmm", "aten::bmm",
               "aten::_scaled_mm"),
    "optimizer": ("multi_tensor_apply", "fused_adam", "_foreach_", "_fused_adamw"),
    "copies": ("memcpy", "memset", "aten::copy_"),
}  # fmt: skip


class Event(NamedTuple):
    """Work of the device (in a rehearsal, of the CPU)."""

    name: str
    seconds: float


def run(context: Context) -> Iterator[dict]:
    """A row for the step and one for its kernels."""
    context.plan(2)
    config, tokens = choose_sizes(context.rehearse)
    step = make_step(config, tokens, context.device)
    seconds = [time_step(step, context.device) for _ in range(2 if context.rehearse else STEPS)][1:]
    activities = [ProfilerActivity.CPU] if context.rehearse else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        time_step(step, context.device)
    trace = context.out / FILE
    profiler.export_chrome_trace(str(trace))
    events = read_cpu_events(profiler) if context.rehearse else read_device_events(trace)
    cpu_seconds = sum(event.self_cpu_time_total for event in profiler.events()) / 1e6
    size = trace.stat().st_size
    if size > LARGEST:
        trace.unlink()
    times = summarise_samples(seconds, "host")
    yield {
        "case": "step", "layers": config.layers, "width": config.width, "batch": tokens[0], "seq": tokens[1],
        "ms": times.median * 1e3, "ms_low": times.low * 1e3, "ms_high": times.high * 1e3, "launches": len(events),
        "device_ms": sum(event.seconds for event in events) * 1e3, "cpu_ms": cpu_seconds * 1e3,
        "trace": FILE if size <= LARGEST else f"left out: {size:,} bytes", "of": "cpu" if context.rehearse else "gpu",
    }  # fmt: skip
    yield {"case": "kernels", "groups": compute_shares(events)}


def compute_shares(events: list[Event]) -> dict[str, dict]:
    """By group of kernels, the largest first."""
    groups: dict[str, list[float]] = {}
    for event in events:
        groups.setdefault(find_group(event.name), []).append(event.seconds)
    total = sum(event.seconds for event in events)
    return {
        name: {"ms": sum(x) * 1e3, "share": sum(x) / total if total else 0.0, "launches": len(x)}
        for name, x in sorted(groups.items(), key=lambda group: -sum(group[1]))
    }


def find_group(name: str) -> str:
    lowered = name.lower()
    return next((group for group, parts in GROUPS.items() if any(part in lowered for part in parts)), "other")


def summarise(results: list[dict]) -> list[str]:
    """A line for the step, one for its groups of kernels."""
    return [format_line(result) for result in results]


def format_line(r: dict) -> str:
    if r["case"] == "kernels":
        groups = (f"{name} {of['share']:.1%} ({of['launches']})" for name, of in r["groups"].items())
        return "shares (launches): " + ", ".join(groups)
    return (
        f"a training step of {r['layers']} layers of {r['width']}, {r['batch']} x {r['seq']} tokens: {r['ms']:.1f} ms "
        f"({r['ms_low']:.1f} to {r['ms_high']:.1f}); {r['of']} busy {r['device_ms']:.1f} ms, {r['launches']:,} "
        f"launches, {r['cpu_ms']:.1f} ms of the CPU; trace: {r['trace']}"
    )


# --------------------------------------------------------------------------------------------- the step


def choose_sizes(rehearse: bool) -> tuple[Config, tuple[int, int]]:
    """(the model, (batch, seq))."""
    llama = dict(
        family="llama", causal=True, norm="rms", norm_eps=1e-5, norm_first=True, activation="silu", gated=True,
        positions="rope", bias=False, tie_word_embeddings=False,
    )  # fmt: skip
    if rehearse:
        small = dict(vocab_size=50, width=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn_width=32, context=64)
        return Config(**small, **llama), (1, 20)
    usual = dict(
        vocab_size=16384, width=1024, layers=8, heads=16, kv_heads=4, head_dim=64, ffn_width=2816, context=2048
    )
    return Config(**usual, **llama), (8, 2048)


def make_step(config: Config, tokens: tuple[int, int], device: torch.device) -> Callable[[], float]:
    torch.manual_seed(0)
    model = Transformer(config).to(device).train()
    settings = Training(steps=1, bfloat16=True)
    optimizer = make_optimizer(model, settings)
    numbers = torch.randint(config.vocab_size, (tokens[0], tokens[1] + 1), device=device)
    batch = Batch({"tokens": numbers[:, :-1]}, numbers[:, 1:])
    return lambda: train_step(model, [batch], settings, optimizer, Processes())


def time_step(step: Callable[[], float], device: torch.device) -> float:
    """Seconds of a step, until the device has finished."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------- events


def read_device_events(trace: Path) -> list[Event]:
    """The kernels, memcpys and memsets of a Chrome trace."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return [Event(e["name"], e["dur"] / 1e6) for e in events if e.get("cat") in kinds and e.get("ph") == "X"]


def read_cpu_events(profiler: torch.profiler.profile) -> list[Event]:
    """Operators, excluding the operators that they call."""
    return [Event(event.name, event.self_cpu_time_total / 1e6) for event in profiler.events()]
