"""Argument checks that attention and the norms share. Each names the argument, what it got and what it takes."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def floating(name: str, x) -> None:
    if not isinstance(x, Tensor):
        tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {x.dtype}")
