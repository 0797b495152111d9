"""What the project's kernels ask of Triton's compiler, and the two faults of it that they work around.

The first: Triton puts no `fence.proxy.async` between a pipelined loop's `cp.async` and the tensor-core instruction
(`wgmma`, `tcgen05.mma`) that reads what it copied, before 3.7.1 never (pytorch/pytorch#181248, triton-lang/triton#9610,
#10537) and since then not where a loop waits for its second copy behind its first product, as with a bias of 16-byte
pieces. On Hopper and datacenter Blackwell the tensor cores may then read shared memory before the copy is there: wrong
results that change between runs. Here a fence follows each wait that has none before the next product: the loops stay
pipelined. `tests/kernels/every_triton.py` proves on the PTX machine that the fault is there without the fences and gone
with them.

The second is the assembler's: ptxas before 12.9, which Triton brings before 3.8, loses the address in the descriptor by
which `wgmma` reads a tile of v, where that is narrower than a tile of k, has fewer than 64 columns and lies where k has
lain before: wrong results, or an illegal access. An H100 showed it and the machine code explains it: the address is
that of k's descriptor, and the copy of its register is left out. So there `configs.attention_cols` widens v.
`bench/descriptors.py` finds such a descriptor in machine code; `tests/kernels/test_compiled.py` checks every kernel
with it, and shows the fault where nothing is widened.
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

# As triton.__version__ tells it; a nightly build of 3.7.0 says 3.7.0+git...
LACKS_FENCES = re.match(r"3\.6\.|3\.7\.0", triton.__version__) is not None  # all of them
ADDS_FENCES = True
ASYNC_WAIT = re.compile(r"^( *)(?:%\S+ = )?ttg\.async_wait\b.*$")
FENCE = "ttng.fence_async_shared"
# What ends the code in which a fence behind a wait is looked for: a product, which may read the copy, or a block's end.
PRODUCT = re.compile(r"ttng\.(warp_group_dot|tc_gen5_mma)\b|\bscf\.yield\b|^ *}")
_compiling = threading.Lock()  # Triton's hook is one for the process


@functools.cache
def loses_descriptors() -> bool:
    """Whether the ptxas that Triton calls has the second fault."""
    try:
        version = knobs.nvidia.ptxas.version
    except RuntimeError:  # there is none, as in a Triton for AMD's GPUs alone
        return False
    return tuple(int(number) for number in version.split(".")) < (12, 9)


def faults() -> list[str]:
    """What is wrong with this compiler and is worked around, in a sentence each."""
    found = []
    if LACKS_FENCES:
        found.append(
            f"Triton {triton.__version__} leaves out memory fences on sm_90 and sm_100 (pytorch/pytorch#181248): "
            "flashattn's kernels add their own, other Triton kernels may give wrong results there. triton>=3.7.1 has "
            "them."
        )
    if loses_descriptors():
        found.append(
            f"Triton {triton.__version__} calls ptxas {knobs.nvidia.ptxas.version}, which loses addresses on sm_90 "
            "where head_dim_v is below 64 and below head_dim: flashattn's kernels avoid it. triton>=3.8 brings a newer "
            "one."
        )
    return found


class SameEverywhere:
    """A kernel that is launched the same way by every version of Triton."""

    def run(self, *args, **options):
        # Triton 3.10 contracts no multiply-adds unless it is asked to: the bits shall not depend on the version.
        return super().run(*args, enable_fp_fusion=True, **options)


class Kernel(SameEverywhere, JITFunction):
    def create_binder(self):
        binder = super().create_binder()
        if ADDS_FENCES:
            self.compile = with_fences(self.compile)
        return binder


class GluonKernel(SameEverywhere, GluonJITFunction):
    """One in Gluon, whose author sets the fences."""


def kernel(do_not_specialize: list[str], launched: type[JITFunction] = Kernel) -> Callable:
    """A decorator for the functions that are launched: triton.jit with the options all of them share."""

    def decorate(function):
        if knobs.runtime.interpret:
            return triton.jit(function, do_not_specialize=do_not_specialize)
        return launched(function, do_not_specialize=do_not_specialize)

    return decorate


def gluon_kernel(do_not_specialize: list[str]) -> Callable:
    """The same for functions in Gluon, which Triton's interpreter does not run."""
    return kernel(do_not_specialize, GluonKernel)


def with_fences(compile: Callable) -> Callable:
    """Triton's compile with a fence behind every wait. The environment is part of the key that compiled kernels are
    kept under, so that none without fences is found there."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    def compile_with_fences(source, target, options, _env_vars=None):
        env_vars = get_cache_invalidating_env_vars() if _env_vars is None else _env_vars
        with _compiling, stage_hook(fence_waits):
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


def fence_waits(backend=None, stages: dict | None = None, *_) -> tuple[str, str] | None:
    """Triton's hook: changes the stages of a compilation or, called without any, says what is to tell them apart."""
    if backend is None:
        return "flashattn-fences-2", "flashattn-fences-2"
    make_ttgir = stages["ttgir"]
    if backend.target.backend == "cuda" and backend.target.arch in range(90, 120):
        stages["ttgir"] = lambda module, metadata: fenced(make_ttgir(module, metadata))
    return None


def fenced(module):
    """A module of Triton's GPU dialect with a proxy fence behind every wait for copies."""
    from triton._C.libtriton import ir

    before, context = str(module), module.context
    text = with_fence_behind_waits(before)
    if text == before:
        return module
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fenced.ttgir"
        file.write_text(text)
        module = ir.parse_mlir_module(str(file), context)
    module.context = context
    return module


def with_fence_behind_waits(text: str) -> str:
    """The text of a module with a fence behind each wait that has none before what may be the next product."""
    lines = text.split("\n")
    fenced = []
    for number, line in enumerate(lines):
        fenced.append(line)
        if wait := ASYNC_WAIT.match(line):
            behind = next((x for x in lines[number + 1 :] if FENCE in x or PRODUCT.search(x)), "")
            if FENCE not in behind:
                fenced.append(f"{wait.group(1)}{FENCE} {{bCluster = false}}")
    return "\n".join(fenced)
