"""The card, its state, and the versions of the software."""

from __future__ import annotations

import os
import subprocess
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch
import triton

import flashattn

ROOT = Path(__file__).parents[2]


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Card(NamedTuple):
    name: str
    architecture: str  # "sm_90", "gfx942"
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    uuid: str | None


# The card of a rehearsal. Without an L2 one copy of the inputs is enough.
REHEARSAL = Card("rehearsal", "sm_90", 132, 0, 0, None)


def find_card() -> Card | None:
    """The current GPU; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is None:
        architecture = f"sm_{properties.major}{properties.minor}"
    else:
        architecture = properties.gcnArchName.split(":")[0]
    uuid = getattr(properties, "uuid", None)
    return Card(
        properties.name, architecture, properties.multi_processor_count, properties.L2_cache_size,
        properties.total_memory, None if uuid is None else f"GPU-{uuid}",
    )  # fmt: skip


def describe_run(card: Card) -> dict:
    """Versions, commit and state: what the figures depend on. Unknown values are None."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "pid": os.getpid(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "flashattn": flashattn.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "commit": run_git("rev-parse", "--short=12", "HEAD"),
        "dirty": None
        if (changes := run_git("status", "--porcelain", "--untracked-files=no")) is None
        else changes != "",
        **card._asdict(),
        **read_state(card),
    }


def run_git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# Our name -> nvidia-smi's.
FIELDS = {
    "driver": "driver_version", "sm_clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit", "power_draw_w": "power.draw.instant", "temperature_c": "temperature.gpu",
    "throttle": "clocks_throttle_reasons.active", "memory_mib": "memory.total",
}  # fmt: skip
# Bits of the throttle reason (NVML, nvmlClocksThrottleReasons).
THROTTLE = {
    0x1: "idle", 0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


def read_state(card: Card) -> dict[str, float | str | None]:
    """Clocks, power and temperature by nvidia-smi. A field that its version does not know fails the whole query, so the
    fields are then queried one by one."""
    if card == REHEARSAL or torch.version.cuda is None:
        return dict.fromkeys(FIELDS)
    try:
        found = query(list(FIELDS.values()), card) or [(query([field], card) or [None])[0] for field in FIELDS.values()]
    except (OSError, subprocess.TimeoutExpired):  # not installed, or it hangs
        return dict.fromkeys(FIELDS)
    values = {name: parse_number(text) for name, text in zip(FIELDS, found, strict=True)}
    return values | {"throttle": decode_throttle(values["throttle"])}


def query(fields: list[str], card: Card) -> list[str] | None:
    chosen = ["-i", card.uuid] if card.uuid else []
    command = ["nvidia-smi", *chosen, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    values = done.stdout.strip().splitlines()[0].split(", ") if done.returncode == 0 and done.stdout.strip() else []
    return values if len(values) == len(fields) else None


def parse_number(text: str | None) -> float | str | None:
    """nvidia-smi prints [N/A] and the like for values that a card does not report."""
    if text is None or text.startswith("["):
        return None
    try:
        return float(text)
    except ValueError:
        return text


def decode_throttle(value: float | str | None) -> str | None:
    """0x0000000000000004 as "power cap"."""
    if not isinstance(value, str) or not value.startswith("0x"):
        return None
    bits = int(value, 16)
    return ", ".join(name for bit, name in THROTTLE.items() if bits & bit) or "none"
