"""Bytes that norms and a decoding step move over those they need, counted by the PTX machine, against their limit."""

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

AT_MOST, AIM = 1.02, 1.00
WIDTHS = (4096, 8192, 16384, 32768, 65536)  # columns of a norm
KEYS = (4096, 16384)  # of a decoding step


class Moved(NamedTuple):
    what: str
    size: str
    ratio: float


def measure() -> Iterator[Moved]:
    for rms in (True, False):
        name = "rms_norm" if rms else "layer_norm"
        for width in WIDTHS:
            for direction, ratio in norm_ratios(width, rms).items():
                yield Moved(f"{name} {direction}", f"{width:,} columns", ratio)
    for keys in KEYS:
        yield Moved("decode", f"{keys:,} keys", decode_ratio(keys))


def norm_ratios(width: int, rms: bool) -> dict[str, float]:
    """By pass: of rows, which are larger than a cache."""
    torch.use_deterministic_algorithms(False)
    with ptx.device("sm_90") as gpu, flashattn.use_backend("triton"):
        launches.norm((max(1, 2**15 // width), width), backward=True, rms=rms).run()
    return {direction: moved.moved for direction, moved in count_norm_bytes(gpu.launches).items()}


def decode_ratio(keys: int) -> float:
    steps, needed = decode(keys)
    return sum(launch.counts.read_bytes + launch.counts.written_bytes for launch in steps) / needed


def decode(keys: int, page_size: int | None = None, capacity: int | None = None) -> tuple[list[Launch], int]:
    """(launches of a step of one new query of 4 heads on one key head of 128, bytes it cannot do without)."""
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
