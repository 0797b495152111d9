"""Memory that nothing has written: what torch.empty and its like give while a device is active.

They are filled with a pattern that no program writes. Where it still stands at a launch the host has written nothing,
be it by PyTorch, NumPy or C++. Sixteen bytes count together: a part of them that the host wrote makes all of them
written. What kernels write is known to the byte. What was made in other ways, or before, counts as
written; so does a copy.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .segments import Segment
from .tensors import raw_bytes

# NaN in every format of 16 bits and more.
PATTERN = np.array([0x7FF7, 0xFFF9, 0x7FFB, 0xFFF3, 0x7FF5, 0x7FFE, 0xFFF2, 0x7FFD], np.uint16).view(np.uint8)
LEAST = 4  # bytes of a pattern that count as one
EMPTY = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch, "empty_permuted"),
         (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided")]  # fmt: skip


class Area:
    """The memory of one tensor that was made empty."""

    def __init__(self, storage: torch.UntypedStorage):
        self.owner = StorageWeakRef(storage)
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.unwritten = np.ones(self.size, bool)
        self.pattern = np.resize(PATTERN, self.size)
        raw_bytes(self.start, self.size)[:] = self.pattern

    def look(self) -> np.ndarray:
        """Which bytes nothing has written up to now: of sixteen those that no kernel wrote, if the host left all of
        them alone and there are enough of them to tell."""
        changed = (raw_bytes(self.start, self.size) != self.pattern) & self.unwritten
        rest = -self.size % len(PATTERN)
        changed, left = (np.pad(x, (0, rest)).reshape(-1, len(PATTERN)) for x in (changed, self.unwritten))
        written = changed.any(1) | (left.sum(1) < LEAST)
        self.unwritten &= ~np.repeat(written, len(PATTERN))[: self.size]
        return self.unwritten


class Unwritten:
    """All such memory of a device."""

    def __init__(self):
        self.areas: dict[int, Area] = {}  # by address

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Within the block tensors that are made empty are remembered."""
        before = [(where, name, getattr(where, name)) for where, name in EMPTY]
        for where, name, make in before:
            setattr(where, name, self.watched(make))
        try:
            yield
        finally:
            for where, name, make in before:
                setattr(where, name, make)

    def watched(self, make: Callable) -> Callable:
        @functools.wraps(make)
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if not torch.compiler.is_compiling() and type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                self.add(tensor)
            return tensor

        return made

    def add(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):  # no memory of its own: a transform's
            return
        if size:
            self.areas[address] = Area(storage)

    def parts(self, segments: list[Segment]) -> Iterator[tuple[Area, Segment, int, int]]:
        """Each area that is alive with a segment that it meets, and the addresses where they do."""
        self.areas = {address: area for address, area in self.areas.items() if not area.owner.expired()}
        for area in self.areas.values():
            for segment in segments:
                low, high = max(area.start, segment.start), min(area.start + area.size, segment.end)
                if low < high:
                    yield area, segment, low, high

    def mark(self, segments: list[Segment]) -> None:
        """Before a launch: tells the segments which of their grains nothing has written."""
        for area, segment, low, high in self.parts(segments):
            bytes_there = area.look()[low - area.start : high - area.start]
            if bytes_there.any():
                segment.leave_unwritten(low, bytes_there)

    def learn(self, segments: list[Segment]) -> None:
        """After it: what it wrote."""
        for area, segment, low, high in self.parts(segments):
            if segment.unwritten is not None:
                area.unwritten[low - area.start : high - area.start] &= segment.unwritten_bytes(low, high)
