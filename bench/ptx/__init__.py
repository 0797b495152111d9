"""A machine for compiled PTX, in NumPy: runs what Triton makes of a kernel where there is no GPU, checks and counts it."""

from .driver import Device, Launch, device, run_text
from .faults import Fault

__all__ = ["Device", "Fault", "Launch", "device", "run_text"]
