"""The backends, and the one table that chooses among them.

A backend is a module of the same few verbs: `forward`, which gives out, lse and, or None, the rest that rounding took
from lse (weights exp(s - lse - rest) sum to one however large the scores are), `backward`, `norm_forward`,
`norm_backward`, and two that say what it cannot do, each a reason or None: `unusable(device)`, which depends on the
machine, and `refuses(dtype, wide)`, which depends on the call.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator

import torch

from . import cpu, reference, triton
from .common import Setting

# In order of preference: the first that takes a call serves it.
BACKENDS = {"triton": triton, "cpu": cpu, "reference": reference}
MAX_HEAD_DIM = 256  # wider heads are left to the reference


def known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced = Setting(os.environ.get("FLASHATTN_BACKEND") or None)
if _forced.value is not None:
    known(_forced.value)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every call uses this backend, or raises if it cannot. FLASHATTN_BACKEND does the same for a
    whole process. The choice is the process's, not the thread's: where blocks of several threads overlap, the one that
    began last counts. Backward uses the backend that forward used.

    >>> import flashattn
    >>> with flashattn.use_backend("reference"):
    ...     pass
    """
    with _forced.during(known(name)):
        yield


def why_not(name: str, device: torch.device | str, *dtypes: torch.dtype, wide: bool = False) -> str | None:
    """Why this backend does not take a call, None if it does. `wide`: a head_dim over MAX_HEAD_DIM."""
    backend = BACKENDS[name]
    reasons = (backend.refuses(dtype, wide) for dtype in dtypes)
    return backend.unusable(torch.device(device)) or next((reason for reason in reasons if reason), None)


def choose(device: torch.device, *dtypes: torch.dtype, head_dim: int = 1) -> str:
    """The name of the backend that takes a call on tensors of these dtypes."""
    wide = True if head_dim > MAX_HEAD_DIM else False  # noqa: SIM210  (a symbolic head_dim is decided by a guard)
    return _choose(_forced.value, device, dtypes, wide)


def serves(name: str, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether a call on tensors like these goes to this backend. False where one is forced that cannot take it."""
    try:
        return _choose_once(_forced.value, torch.device(device), (dtype,), False) == name
    except RuntimeError:
        return False


@torch.compiler.assume_constant_result  # a compiled graph holds the name; it is traced anew when _forced changes
def _choose(forced: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...], wide: bool) -> str:
    return _choose_once(forced, device, dtypes, wide)


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Within the block the triton backend takes CPU tensors: for who gives Triton a driver that launches on them."""
    try:
        with triton.takes_cpu.during(True):
            _forget_choices()
            yield
    finally:
        _forget_choices()


def _forget_choices() -> None:
    triton.unusable.cache_clear()
    _choose_once.cache_clear()


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache  # by device and not by its type: the GPUs of a machine may differ
def _choose_once(forced: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...], wide: bool) -> str:
    reasons = {name: why_not(name, device, *dtypes, wide=wide) for name in BACKENDS}
    if forced is None:
        chosen = next(name for name in BACKENDS if reasons[name] is None)  # the reference refuses nothing
        if chosen == "reference" and device.type == "cpu" and cpu.missing is not None:
            warn_once(f"flashattn: the native CPU engine is not there, the slower reference serves: {cpu.missing}")
        return chosen
    if reasons[forced] is not None:
        raise RuntimeError(f"backend {forced!r} cannot take this call: {reasons[forced]}")
    return forced
