"""The GPU architectures that kernels are compiled for, and the limits that decide on occupancy."""

from __future__ import annotations

from typing import NamedTuple

ARCHITECTURES = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1100", "gfx1201"]
WAVE_64 = ("gfx90a", "gfx942", "gfx950")  # AMD architectures with 64 threads in a wavefront; the others have 32


class Multiprocessor(NamedTuple):
    registers: int
    warps: int
    blocks: int
    shared: int  # bytes


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MULTIPROCESSOR = {
    "sm_80": Multiprocessor(65536, 64, 32, 167936), "sm_86": Multiprocessor(65536, 48, 16, 102400),
    "sm_87": Multiprocessor(65536, 48, 16, 167936), "sm_89": Multiprocessor(65536, 48, 24, 102400),
    "sm_90": Multiprocessor(65536, 64, 32, 233472), "sm_100": Multiprocessor(65536, 64, 32, 233472),
    "sm_103": Multiprocessor(65536, 64, 32, 233472), "sm_110": Multiprocessor(65536, 48, 24, 233472),
    "sm_120": Multiprocessor(65536, 48, 24, 102400), "sm_121": Multiprocessor(65536, 48, 24, 102400),
}  # fmt: skip
