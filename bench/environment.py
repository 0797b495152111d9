"""The hardware and the versions, which are printed with all figures."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import flashattn


def describe_environment() -> str:
    """Hardware and versions, printed with all figures."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cpu = f"{find_cpu_name()} ({flashattn.backends.cpu.get_isa()}), {torch.get_num_threads()} threads"
    return f"{cpu}{gpu}; torch {torch.__version__}, flashattn {flashattn.__version__}"


def find_cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
