"""The tensors of a launch: their addresses, element by element, and their names."""

from __future__ import annotations

import ctypes
import gc
from typing import NamedTuple

import numpy as np
import torch


class TensorExtent(NamedTuple):
    """The addresses of a tensor, from its first to its last element."""

    name: str
    start: int
    end: int
    text: str  # "float32[4, 64]"
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()  # elements
    itemsize: int = 1
    view_elements: np.ndarray | None = None  # which places are elements of the view, None: all
    parameter: str | None = None  # of the kernel, which holds its address

    def contains(self, address: np.ndarray, nbytes: int, used_bytes: int | None) -> np.ndarray:
        """Which accesses stay within the elements of this tensor, in the used bytes."""
        good = (address >= np.uint64(self.start)) & (address + np.uint64(nbytes) <= np.uint64(self.end))
        if self.view_elements is None or not good.any():
            return good
        offset = address[good].astype(np.int64) - self.start
        steps = [
            i
            for i in range(0, nbytes, self.itemsize)
            if used_bytes is None or used_bytes >> i & (1 << self.itemsize) - 1
        ]
        good[good] = self.view_elements[(offset[:, None] + np.array(steps, np.int64)) // self.itemsize].all(1)
        return good

    def find_element_index(self, address: int) -> tuple[int, ...] | None:
        """The index of the element at an address; None if there is none or if there are several."""
        left = (address - self.start) // self.itemsize
        index = dict.fromkeys(range(len(self.shape)), 0)
        for d in sorted(index, key=lambda d: -self.strides[d]):
            if self.shape[d] > 1 and self.strides[d] > 0:
                index[d], left = divmod(left, self.strides[d])
        whole = left == 0 and all(i < n for i, n in zip(index.values(), self.shape, strict=True))
        return tuple(index.values()) if whole else None

    def describe(self, address: int, nbytes: int) -> str:
        """The place of an access: "at element [3, 5] of x, float32[4, 64]", "12 bytes past the end of …"."""
        return f"{self.describe_place(address, nbytes)} {self.name}, {self.text}"

    def describe_place(self, address: int, nbytes: int) -> str:
        if address == self.end:
            return "right past the end of"
        if address > self.end:
            return f"{address - self.end} bytes past the end of"
        if address < self.start:
            return f"{self.start - address} bytes before the start of"
        over = f", {address + nbytes - self.end} bytes of it past its end," if address + nbytes > self.end else ""
        if not self.shape:
            return f"at byte {address - self.start}{over} of"
        index = self.find_element_index(address)
        if index is None:
            return f"at byte {address - self.start}{over} between the elements of"
        into = (address - self.start) % self.itemsize
        return f"at {f'byte {into} of ' if into else ''}element {list(index)}{over} of"


def view_bytes(start: int, count: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * count).from_address(start), np.uint8)


def unwrap_tensor(value) -> torch.Tensor | None:
    """The tensor of an argument: itself, or the base of a triton.reinterpret."""
    value = getattr(value, "base", value) if not isinstance(value, torch.Tensor) else value
    return value if isinstance(value, torch.Tensor) else None


def make_extent(name: str, tensor: torch.Tensor, parameter: str | None = None) -> TensorExtent | None:
    """Of a CPU tensor; None if it is empty."""
    if tensor.numel() == 0:
        return None
    shape, strides, itemsize = tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    text = f"{str(tensor.dtype).removeprefix('torch.')}{list(shape)}"
    view_elements = find_view_elements(shape, strides, span)
    if view_elements is not None:
        text += f" with strides {list(strides)}"
    start = tensor.data_ptr()
    return TensorExtent(name, start, start + span * itemsize, text, shape, strides, itemsize, view_elements, parameter)


def find_view_elements(shape: tuple[int, ...], strides: tuple[int, ...], span: int) -> np.ndarray | None:
    """Which of the `span` places from its first to its last element are elements of a view; None: all, judged by their
    number."""
    moving = [(n, s) for n, s in zip(shape, strides, strict=True) if n > 1 and s > 0]
    if np.prod([n for n, _ in moving], dtype=np.int64) >= span:
        return None
    found = np.zeros(span, bool)
    np.lib.stride_tricks.as_strided(found, [n for n, _ in moving], [s for _, s in moving])[...] = True
    return found


def find_live_tensors() -> list[TensorExtent]:
    """Every CPU tensor that Python refers to."""
    found = []
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            try:
                if thing.device.type == "cpu" and (extent := make_extent("a tensor of this process", thing)):
                    found.append(extent)
            except RuntimeError:  # without memory of its own: sparse, or under a transform
                continue
    return found
