"""The backends, and the one table that chooses among them. `flashattn/protocol.py` defines their interface."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterator

import torch

from .. import reference
from ..protocol import Backend
from ..tracing import mark_constant
from . import cpu, triton
from .setting import Setting

# In order of preference: the first that takes a call serves it.
BACKENDS: dict[str, Backend] = {"triton": triton, "cpu": cpu, "reference": reference}


def check_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced = Setting(os.environ.get("FLASHATTN_BACKEND") or None)
if _forced.value is not None:
    check_name(_forced.value)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every call uses this backend, or raises if it cannot. FLASHATTN_BACKEND does the same for a
    whole process. The choice is the process's, not the thread's: where blocks of several threads overlap, the one that
    began last counts. Backward uses the backend that forward used.

    >>> import flashattn
    >>> with flashattn.use_backend("reference"):
    ...     pass
    """
    with _forced.override(check_name(name)):
        yield


def unavailable_reason(name: str, device: torch.device | str, *dtypes: torch.dtype, head_dim: int = 1) -> str | None:
    """Why this backend does not take a call on tensors like these; None if it does."""
    backend = BACKENDS[name]
    if (reason := backend.unavailable_reason(torch.device(device))) is not None:
        return reason
    for dtype in dtypes:
        if dtype in backend.CAPABILITIES.refused_dtypes:
            return backend.CAPABILITIES.refused_dtypes[dtype]
    limit = backend.CAPABILITIES.max_head_dim
    return None if limit is None or head_dim <= limit else f"it does not take a head_dim over {limit}"


HEAD_DIM_LIMITS = sorted({n for b in BACKENDS.values() if (n := b.CAPABILITIES.max_head_dim) is not None})


def choose(device: torch.device, *dtypes: torch.dtype, head_dim: int = 1) -> str:
    """The name of the backend that takes a call on tensors of these dtypes."""
    # Rounded up to a limit, so that a symbolic head_dim is decided by a guard and the cache has few entries.
    for limit in HEAD_DIM_LIMITS:
        if head_dim <= limit:
            return _choose(_forced.value, device, dtypes, limit)
    return _choose(_forced.value, device, dtypes, sys.maxsize)


def find(device: torch.device, dtype: torch.dtype) -> str | None:
    """`choose`, or None where a backend is forced that cannot take such tensors."""
    try:
        return _choose_once(_forced.value, device, (dtype,), 1)
    except RuntimeError:
        return None


@mark_constant  # a compiled graph holds the name; it is traced anew when _forced changes
def _choose(forced: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...], head_dim: int) -> str:
    return _choose_once(forced, device, dtypes, head_dim)


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Within the block the triton backend takes CPU tensors, for callers that give Triton a driver for them."""
    try:
        with triton.accepts_cpu_tensors.override(True):
            _forget_choices()
            yield
    finally:
        _forget_choices()


def _forget_choices() -> None:
    triton.unavailable_reason.cache_clear()
    _choose_once.cache_clear()


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache  # by device and not by its type: the GPUs of a machine may differ
def _choose_once(forced: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...], head_dim: int) -> str:
    reasons = {name: unavailable_reason(name, device, *dtypes, head_dim=head_dim) for name in BACKENDS}
    if forced is None:
        chosen = next(name for name in BACKENDS if reasons[name] is None)  # the reference takes every call
        if chosen == "reference" and device.type == "cpu" and cpu.missing_reason is not None:
            warn_once(f"flashattn: the native CPU engine is missing, the slower reference serves: {cpu.missing_reason}")
        return chosen
    if reasons[forced] is not None:
        raise RuntimeError(f"backend {forced!r} cannot take this call: {reasons[forced]}")
    return forced
