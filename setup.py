"""Builds csrc/ into flashattn._C. Everything else about the package is in pyproject.toml."""

import glob
import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The kernels are compiled once per instruction set, each into a namespace of its own, and chosen at load time.
KERNELS = [
    f"csrc/{name}.cpp" for name in ("forward", "decode", "backward", "norm", "linear", "rotary", "probes", "engine")
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


class BuildEngine(build_ext):
    def run(self):
        # Without a compiler the package is installed all the same: the reference backend serves.
        try:
            super().run()
        except Exception as error:
            print(
                f"flashattn: the CPU engine was not built, the reference backend will serve: {error}", file=sys.stderr
            )

    def build_extension(self, ext):
        from torch.utils.cpp_extension import include_paths, library_paths

        ext.include_dirs, ext.library_dirs = include_paths(), library_paths()
        ext.libraries = ["torch_cpu"]
        ext.extra_compile_args = [*FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        ext.extra_compile_args += ["-DFLASHATTN_X86"] * X86
        ext.extra_objects = [o for isa, flags in ISAS.items() for o in self.compile_kernels(isa, flags)]
        ext.extra_link_args = [f"-fsanitize={SANITIZE}"] * bool(SANITIZE)
        super().build_extension(ext)

    def compile_kernels(self, isa, flags):
        return self.compiler.compile(
            KERNELS,
            output_dir=f"{self.build_temp}/{isa}",
            macros=[("FLASHATTN_ISA", isa)],
            extra_preargs=[*FLAGS, "-Wno-psabi", *flags],
            depends=sources(),
        )


def sources():
    return [*glob.glob("csrc/*"), "setup.py"]


setup(
    ext_modules=[
        Extension(
            "flashattn._C",
            ["csrc/ops.cpp"],
            define_macros=[("Py_LIMITED_API", "0x030a0000")],
            py_limited_api=True,
            language="c++",
            depends=sources(),
        )
    ],
    cmdclass={"build_ext": BuildEngine},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
