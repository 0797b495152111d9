"""Makes Triton's cache on disk work across processes.

The hash of a jit function includes the constants of the functions it calls only if those were hashed before it, so that
the same kernel has another hash in a process that launched others first, and is compiled again. If all kernels are
hashed in a fixed order before any launch, the hashes of all processes agree.
"""

from __future__ import annotations

import importlib
import pkgutil

from triton.runtime.jit import JITCallable

import flashattn.kernels


def fix_hashes() -> None:
    """Hash every kernel of this project, in alphabetical order of modules and names."""
    for name in sorted(module.name for module in pkgutil.iter_modules(flashattn.kernels.__path__)):
        members = vars(importlib.import_module(f"flashattn.kernels.{name}"))
        for _, function in sorted(members.items()):
            if isinstance(function, JITCallable):
                _ = function.cache_key
