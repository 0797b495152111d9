"""Bytes that norms and a decode step move / those they need, counted by the PTX machine, against their limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

import flashattn
from flashattn.backends import triton as backend
from flashattn.cache import CacheView
from flashattn.score import Score

from . import launches, ptx
from .ptx import Launch
from .ptx.norm_bytes import count_norm_bytes

AT_MOST, TARGET = 1.02, 1.00
WIDTHS = (4096, 8192, 16384, 32768, 65536)  # columns of a norm
KEYS = (4096, 16384)  # of a decode step


class BytesMoved(NamedTuple):
    what: str
    size: str
    ratio: float


def measure() -> Iterator[BytesMoved]:
    for rms in (True, False):
        name = "rms_norm" if rms else "layer_norm"
        for width in WIDTHS:
            for direction, ratio in measure_norm(width, rms).items():
                yield BytesMoved(f"{name} {direction}", f"{width:,} columns", ratio)
    for keys in KEYS:
        yield BytesMoved("decode", f"{keys:,} keys", measure_decode(keys))


def measure_norm(width: int, rms: bool) -> dict[str, float]:
    """Ratio by pass, of rows only: they exceed any cache."""
    torch.use_deterministic_algorithms(False)
    with ptx.device("sm_90") as gpu, flashattn.use_backend("triton"):
        launches.make_norm((max(1, 2**15 // width), width), backward=True, rms=rms).run()
    return {direction: moved.moved for direction, moved in count_norm_bytes(gpu.launches).items()}


def measure_decode(keys: int) -> float:
    steps, needed = run_decode(keys)
    return sum(launch.counts.read_bytes + launch.counts.written_bytes for launch in steps) / needed


def run_decode(keys: int, page_size: int | None = None, capacity: int | None = None) -> tuple[list[Launch], int]:
    """(launches, bytes needed) of a decode step of 4 query heads on one key head of 128."""
    torch.manual_seed(0)
    pages = 1 if page_size is None else keys // page_size
    q, k, v = (
        torch.randn(pages if x else 1, 1 if x else 4, keys // pages if x else 1, 128).bfloat16() for x in (0, 1, 1)
    )
    table = None if page_size is None else torch.randperm(pages).int()[None]
    length = torch.tensor([keys], dtype=torch.int32)
    with ptx.device("sm_90") as gpu:
        backend.decode(
            q, CacheView(k, v, table, length - 1, length, capacity or keys), Score(0.1, right=0, kv_lengths=length)
        )
    return gpu.launches, 2 * (2 * q.numel() + k.numel() + v.numel())
