"""Compiler options that all kernels share, and workarounds for three compiler bugs.

The first: Triton puts no `fence.proxy.async` between a pipelined loop's `cp.async` and the tensor-core instruction
(`wgmma`, `tcgen05.mma`) that reads the copy, before 3.7.1 never (pytorch/pytorch#181248, triton-lang/triton#9610,
#10537) and since then not where a loop waits for its second copy after its first product, as with a bias of 16-byte
pieces. On Hopper and datacenter Blackwell the tensor cores may then read shared memory before the copy arrives: wrong
results that change between runs. Here a fence follows each wait that has none before the next product; the loops stay
pipelined. `tests/kernels/every_triton.py` proves on the PTX machine that the bug is present without the fences and
absent with them.

The second is in the assembler: ptxas before 12.9, which Triton bundles before 3.8, loses the address in the descriptor
by which `wgmma` reads a tile of v, where that is narrower than a tile of k, has fewer than 64 columns and reuses the
memory of k: wrong results, or an illegal access. An H100 showed it and the machine code explains it: the address is
that of k's descriptor, since the copy of its register is missing. There `configs.choose_cols` widens v.
`bench/descriptors.py` finds such a descriptor in machine code; `tests/kernels/test_compiled.py` checks every kernel
with it, and shows the bug where nothing is widened.

The third: before 3.8 Triton lays an operand of `mma` out for elements of half the width that a tensor load in its
computation has, if a `tl.join` is there too (triton-lang/triton#10645): a byte's kWidth is then 8. A product along 16
elements has too few for four threads of 8, so it sums some twice and leaves others out. Dropout joins its random
numbers, and masks are bytes: with both, all tiles along 16 keys or queries gave wrong results, which is every call on
GPUs of the small tiles. `dropout.hide_join` keeps the join from that search. Without it the PTX machine shows the bug
(`tests/kernels/every_triton.py`), as an H200 did with the kernels of sm_89.
"""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import triton
from triton import knobs
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import JITFunction

# By triton.__version__, which is 3.7.0+git... in a nightly build of 3.7.0.
LACKS_FENCES = re.match(r"3\.6\.|3\.7\.0", triton.__version__) is not None  # all of them
ADDS_FENCES = True
IS_BEFORE_3_8 = re.match(r"3\.[67]\.", triton.__version__) is not None
WIDENS_JOINS = IS_BEFORE_3_8
# Each product of "tf32x3" has tensor memory of its own: 640 columns at head_dim 64, where sm_100 has 512.
WASTES_TENSOR_MEMORY = IS_BEFORE_3_8
ASYNC_WAIT = re.compile(r"^( *)(?:%\S+ = )?ttg\.async_wait\b.*$")
FENCE = "ttng.fence_async_shared"
# A fence after a wait must come before the next product, which may read the copy, or the end of the block.
PRODUCT = re.compile(r"ttng\.(warp_group_dot|tc_gen5_mma)\b|\bscf\.yield\b|^ *}")
_compiling = threading.Lock()  # Triton has one hook for the process


@functools.cache
def has_descriptor_bug() -> bool:
    """Whether the ptxas that Triton calls has the second bug."""
    try:
        version = knobs.nvidia.ptxas.version
    except RuntimeError:  # there is none, as in a Triton for AMD GPUs only
        return False
    return tuple(int(number) for number in version.split(".")) < (12, 9)


def list_bugs() -> list[str]:
    """The bugs of this compiler that are worked around, in a sentence each."""
    found = []
    if LACKS_FENCES:
        found.append(
            f"Triton {triton.__version__} leaves out memory fences on sm_90 and sm_100 (pytorch/pytorch#181248): "
            "flashattn's kernels add their own, other Triton kernels may give wrong results there. triton>=3.7.1 has "
            "them."
        )
    if has_descriptor_bug():
        found.append(
            f"Triton {triton.__version__} calls ptxas {knobs.nvidia.ptxas.version}, which loses addresses on sm_90 "
            "where head_dim_v is below 64 and below head_dim: flashattn's kernels avoid it. triton>=3.8 brings a newer "
            "one."
        )
    if WIDENS_JOINS:
        found.append(
            f"Triton {triton.__version__} gives wrong results on NVIDIA GPUs before Hopper and on Blackwell's consumer "
            "GPUs for a tl.dot along 16 elements whose operand depends on a tl.join and on bytes "
            "(triton-lang/triton#10645): flashattn's kernels avoid it. triton>=3.8 is right."
        )
    return found


class VersionIndependent(JITFunction):
    """A kernel that is launched the same way by every version of Triton."""

    def run(self, *args, **options):
        # From 3.10 on Triton fuses multiply-adds only if asked to: the bits must not depend on the version.
        return super().run(*args, enable_fp_fusion=True, **options)


class Kernel(VersionIndependent):
    compile: Callable

    def create_binder(self):
        binder = super().create_binder()
        if ADDS_FENCES:
            self.compile = wrap_compile(self.compile)
        return binder


class GluonKernel(VersionIndependent, GluonJITFunction):
    """A Gluon kernel, which contains its own fences."""


def kernel(do_not_specialize: list[str], launched: type[JITFunction] = Kernel) -> Callable:
    """A decorator for functions that are launched: triton.jit with the options that all of them share."""

    def decorate(function):
        if knobs.runtime.interpret:
            return triton.jit(function, do_not_specialize=do_not_specialize)
        return launched(function, do_not_specialize=do_not_specialize)

    return decorate


def gluon_kernel(do_not_specialize: list[str]) -> Callable:
    """The same for functions in Gluon, which Triton's interpreter does not run."""
    return kernel(do_not_specialize, GluonKernel)


def wrap_compile(compile: Callable) -> Callable:
    """Triton's compile with a fence after every wait. The environment is part of the cache key, so that no kernel
    without fences is found in Triton's cache."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    def compile_with_fences(source, target, options, _env_vars=None):
        env_vars = get_cache_invalidating_env_vars() if _env_vars is None else _env_vars
        with _compiling, stage_hook(fence_hook):
            return compile(source, target=target, options=options, _env_vars=env_vars | {"FLASHATTN_FENCES": "2"})

    return compile_with_fences


@contextlib.contextmanager
def stage_hook(hook: Callable) -> Iterator[None]:
    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


def fence_hook(backend=None, stages: dict | None = None, *_) -> tuple[str, str] | None:
    """Triton's hook: changes the stages of a compilation or, called without any, returns its part of the cache key."""
    if backend is None or stages is None:
        return "flashattn-fences-2", "flashattn-fences-2"
    make_ttgir = stages["ttgir"]
    if backend.target.backend == "cuda" and backend.target.arch in range(90, 120):
        stages["ttgir"] = lambda module, metadata: fence_module(make_ttgir(module, metadata))
    return None


def fence_module(module):
    """A module of Triton's GPU dialect with a proxy fence after every wait for copies."""
    from triton._C.libtriton import ir

    before, context = str(module), module.context
    text = add_fences(before)
    if text == before:
        return module
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fenced.ttgir"
        file.write_text(text)
        module = ir.parse_mlir_module(str(file), context)
    module.context = context
    return module


def add_fences(text: str) -> str:
    """The text of a module with a fence after each wait that has none before the next product."""
    lines = text.split("\n")
    fenced = []
    for number, line in enumerate(lines):
        fenced.append(line)
        if wait := ASYNC_WAIT.match(line):
            following = next((x for x in lines[number + 1 :] if FENCE in x or PRODUCT.search(x)), "")
            if FENCE not in following:
                fenced.append(f"{wait.group(1)}{FENCE} {{bCluster = false}}")
    return "\n".join(fenced)
