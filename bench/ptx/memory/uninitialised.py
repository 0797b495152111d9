"""Uninitialised memory: tensors that torch.empty and its like make while a device is active.

They are filled with a pattern that no program writes. Bytes that still hold it at a launch were not written by the
host, be it by PyTorch, NumPy or C++. The host's writes are tracked in units of sixteen bytes, the kernels' by the
byte. Tensors made in other ways, or earlier, count as written; so does a copy.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .extents import view_bytes
from .segments import Segment

# NaN in every format of 16 bits and more.
PATTERN = np.array([0x7FF7, 0xFFF9, 0x7FFB, 0xFFF3, 0x7FF5, 0x7FFE, 0xFFF2, 0x7FFD], np.uint16).view(np.uint8)
MIN_PATTERN_BYTES = 4  # fewer bytes of the pattern prove nothing
FACTORIES = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch, "empty_permuted"),
             (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided")]  # fmt: skip


class EmptyAllocation:
    """The storage of one uninitialised tensor."""

    def __init__(self, storage: torch.UntypedStorage):
        self.owner = StorageWeakRef(storage)
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.unwritten = np.ones(self.size, bool)
        self.pattern = np.resize(PATTERN, self.size)
        view_bytes(self.start, self.size)[:] = self.pattern

    def find_unwritten(self) -> np.ndarray:
        """Mask of the bytes never written so far: of each sixteen those that no kernel wrote, if all hold the pattern
        and are enough to tell."""
        changed = (view_bytes(self.start, self.size) != self.pattern) & self.unwritten
        rest = -self.size % len(PATTERN)
        changed, left = (np.pad(x, (0, rest)).reshape(-1, len(PATTERN)) for x in (changed, self.unwritten))
        written = changed.any(1) | (left.sum(1) < MIN_PATTERN_BYTES)
        self.unwritten &= ~np.repeat(written, len(PATTERN))[: self.size]
        return self.unwritten


class UninitialisedMemory:
    """All uninitialised memory of a device."""

    def __init__(self):
        self.allocations: dict[int, EmptyAllocation] = {}  # by address

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Within the context uninitialised tensors are recorded."""
        before = [(where, name, getattr(where, name)) for where, name in FACTORIES]
        for where, name, make in before:
            setattr(where, name, self.wrap(make))
        try:
            yield
        finally:
            for where, name, make in before:
                setattr(where, name, make)

    def wrap(self, make: Callable) -> Callable:
        @functools.wraps(make)
        def make_and_record(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if not torch.compiler.is_compiling() and type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                self.add(tensor)
            return tensor

        return make_and_record

    def add(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):  # without memory of its own: under a transform
            return
        if size:
            self.allocations[address] = EmptyAllocation(storage)

    def find_overlaps(self, segments: list[Segment]) -> Iterator[tuple[EmptyAllocation, Segment, int, int]]:
        """(allocation, segment, start, end) of each overlap of a living allocation with a segment."""
        self.allocations = {
            address: allocation for address, allocation in self.allocations.items() if not allocation.owner.expired()
        }
        for allocation in self.allocations.values():
            for segment in segments:
                low, high = max(allocation.start, segment.start), min(allocation.start + allocation.size, segment.end)
                if low < high:
                    yield allocation, segment, low, high

    def mark_segments(self, segments: list[Segment]) -> None:
        """Before a launch: marks the grains of the segments that were never written."""
        for allocation, segment, low, high in self.find_overlaps(segments):
            bytes_there = allocation.find_unwritten()[low - allocation.start : high - allocation.start]
            if bytes_there.any():
                segment.mark_unwritten(low, bytes_there)

    def update(self, segments: list[Segment]) -> None:
        """After a launch: removes the bytes that it wrote."""
        for allocation, segment, low, high in self.find_overlaps(segments):
            if segment.unwritten is not None:
                allocation.unwritten[low - allocation.start : high - allocation.start] &= segment.find_unwritten_bytes(
                    low, high
                )
