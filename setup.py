"""Builds csrc/ into flashattn._C, where there is a compiler. Everything else about the package is in pyproject.toml."""

import glob
import os
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from build_backend import find_torch

# The kernels are compiled once per instruction set, each into a namespace of its own, and chosen at load time.
KERNELS = [
    f"csrc/{name}.cpp"
    for name in ("forward", "decode", "backward", "jvp", "hvp", "norm", "linear", "rotary", "peaks", "engine")
]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"portable": []}
if X86:
    AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
    ISAS |= {"avx2": ["-march=x86-64-v3"], "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12 has both wrong about its own intrinsics
SANITIZE = os.environ.get("FLASHATTN_SANITIZE", "")  # for instance "address,undefined": see `make sanitize`
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-O1", "-g1"]
LINK_FLAGS = [f"-fsanitize={SANITIZE}"] * bool(SANITIZE)


class BuildEngine(build_ext):
    def build_extension(self, ext):
        torch = find_torch()
        ext.include_dirs = [str(torch / "include"), str(torch / "include/torch/csrc/api/include")]
        ext.library_dirs = [str(torch / "lib")]
        ext.libraries = ["torch_cpu"]
        ext.extra_compile_args = [*FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        ext.extra_compile_args += ["-DFLASHATTN_X86"] * X86
        ext.extra_objects = [o for isa, flags in ISAS.items() for o in self.compile_kernels(isa, flags)]
        ext.extra_link_args = LINK_FLAGS
        super().build_extension(ext)

    def compile_kernels(self, isa, flags):
        return self.compiler.compile(
            KERNELS,
            output_dir=f"{self.build_temp}/{isa}",
            macros=[("FLASHATTN_ISA", isa)],
            extra_preargs=[*FLAGS, "-Wno-psabi", *flags],
            depends=sources(),
        )


class BuildPackage(build_py):
    """Without the engine: with a note of the reason in the package, which flashattn/backends/cpu.py shows."""

    def run(self):
        super().run()
        note = Path("." if self.editable_mode else self.build_lib, "flashattn", "no_engine.txt")
        note.unlink(missing_ok=True)
        if NO_ENGINE:
            note.write_text(NO_ENGINE, encoding="utf-8")
            print(
                f"flashattn: built without the CPU engine, the slower reference backend will serve: {NO_ENGINE}",
                file=sys.stderr,
            )


def find_build_problem() -> str | None:
    """Why this machine cannot build the smallest of extensions with the engine's flags; None where it can. Past that,
    an engine that does not compile is an error."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"Python's headers were not found (no {sysconfig.get_path('include')}/Python.h; see python3-dev)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "smallest.cpp")
        source.write_text("#include <Python.h>\n#include <optional>\n", encoding="utf-8")
        flags = [*FLAGS, *(flag for flags in ISAS.values() for flag in flags)]
        smallest = Extension("smallest", [str(source)], extra_compile_args=flags, extra_link_args=LINK_FLAGS)
        command = build_ext(Distribution({"ext_modules": [smallest]}))
        command.build_lib = command.build_temp = folder
        try:
            command.ensure_finalized()
            command.run()
        except Exception as error:
            return f"no C++ compiler that works was found (GCC 11, Clang 12 or later): {error}"
    return None


def sources():
    return [*glob.glob("csrc/*"), "setup.py"]


ENGINE = Extension(
    "flashattn._C",
    ["csrc/bindings.cpp", "csrc/bindings_attention.cpp", "csrc/bindings_norm.cpp"],
    define_macros=[("Py_LIMITED_API", "0x030a0000")],
    py_limited_api=True,
    language="c++",
    depends=sources(),
)
NO_ENGINE = find_build_problem()

setup(
    ext_modules=[] if NO_ENGINE else [ENGINE],  # none: a wheel for any platform
    cmdclass={"build_ext": BuildEngine, "build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
