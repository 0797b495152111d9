"""The ways to install: each ends with the engine, says truly why there is none, or fails with the line to use. Nothing
here compiles the engine or reaches for a network; CONTRIBUTING.md, "Check a release", lists what does."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import setuptools
import torch

from flashattn.backends import cpu

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(
    ".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so", "no_engine.txt", "shared"
)
NO_COMPILER = {"CC": "/no/compiler", "CXX": "/no/compiler"}
CALL = "import torch, flashattn; print(flashattn.__file__, flashattn.attention(*torch.randn(3, 1, 2, 5, 8)).shape)"


def run(*command, cwd, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


def call_hook(hook: str, cwd: Path, python=sys.executable, **environment) -> subprocess.CompletedProcess:
    """Call a hook of the build backend as a frontend does, on the project in `cwd`; its result is in ../built."""
    arguments = "" if hook.startswith("get_requires") else "'../built'"
    return run(python, "-c", f"import build_backend; build_backend.{hook}({arguments})", cwd=cwd, **environment)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clean copy of this checkout, in a folder named as a clone of it is."""
    folder = tmp_path_factory.mktemp("install") / "flashattn"
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    (folder.parent / "built").mkdir()
    return folder


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> dict:
    """A Python that has setuptools, and no PyTorch: arguments of `call_hook`."""
    folder = tmp_path_factory.mktemp("without_torch")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    packages = Path(setuptools.__file__).parent.parent
    (folder / "path").mkdir()
    for path in (*packages.glob("setuptools*"), packages / "_distutils_hack"):
        (folder / "path" / path.name).symlink_to(path)
    return {"python": folder / "env/bin/python", "PYTHONPATH": str(folder / "path")}


@pytest.fixture(scope="module")
def unpacked(clone, without_torch) -> Path:
    """The source distribution, which needs no PyTorch, unpacked."""
    done = call_hook("build_sdist", clone, **without_torch)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(clone.parent.glob("built/*.tar.gz"))) as archive:
        archive.extractall(clone.parent, filter="data")
    return next(clone.parent.glob("flashattn-*"))


@pytest.fixture(scope="module")
def wheel(unpacked) -> Path:
    """The wheel that a machine without a compiler builds of the source distribution."""
    done = call_hook("build_wheel", unpacked, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert "built without the CPU engine, the slower reference backend will serve: no C++ compiler" in done.stderr
    return next(unpacked.parent.glob("built/*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_source_distribution_is_the_whole_checkout(clone, unpacked):
    def files(folder):
        made = {"PKG-INFO", "setup.cfg"}
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return {name for name in names if name not in made and "egg-info" not in name and "__pycache__" not in name}

    assert files(unpacked) == files(clone)


def test_a_wheel_without_the_engine_is_for_any_platform(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "flashattn/no_engine.txt" in names
    assert not [name for name in names if name.endswith(".so") or not name.startswith("flashattn")]


def test_metadata(site):
    metadata = HeaderParser().parsestr(next(site.glob("*.dist-info/METADATA")).read_text(encoding="utf-8"))
    assert metadata["Author"] == "the flashattn developers"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert "Programming Language :: Python :: 3" in metadata.get_all("Classifier")
    requirements = metadata.get_all("Requires-Dist")
    needed = [requirement for requirement in requirements if "extra" not in requirement]
    assert needed == ["torch>=2.10", "numpy"]  # a second Triton beside PyTorch's would be 286 MB
    assert any(r.startswith("triton>=3.6") and r.endswith('extra == "triton"') for r in requirements)


def test_without_the_engine_the_first_call_says_why(clone, site):
    """Run from a script beside a clone: it finds the library that is installed, and not the clone itself, which is a
    folder of the library's name without an __init__.py."""
    script = clone.parent / "with_wheel.py"
    script.write_text(CALL + "\nflashattn.layer_norm(torch.randn(2, 8))\nimport flashattn.__main__ as m; m.main()\n")
    done = run(sys.executable, script, cwd=clone.parent, PYTHONPATH=site)
    assert done.stdout.startswith(f"{site}/flashattn/__init__.py torch.Size([1, 2, 5, 8])\n"), done.stderr
    assert done.stderr.count("UserWarning: flashattn: the native CPU engine is missing") == 1
    for text in (done.stderr, done.stdout):
        assert "flashattn was built without it: no C++ compiler that works was found" in text
        assert "/no/compiler" in text


def test_a_script_beside_a_clone_finds_its_editable_install(clone, tmp_path):
    built = call_hook("build_editable", clone, **NO_COMPILER)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(clone.parent.glob("built/*editable*.whl"))) as archive:
        archive.extractall(tmp_path)
    script = clone.parent / "with_editable.py"
    script.write_text(f"""
import site, sys
before = len(sys.path)
site.addsitedir({str(tmp_path)!r})
sys.path[1:] = sys.path[before:] + sys.path[1:before]  # ahead of another install
{CALL}""")
    done = run(sys.executable, script, cwd=clone.parent)
    assert done.stdout.startswith(f"{clone}/flashattn/__init__.py "), done.stderr


def test_a_clone_that_was_never_built_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "flashattn/backends/cpu.py"))
    reason = cpu.find_missing_reason(ImportError("cannot import name '_C' from 'flashattn'"))
    assert reason.startswith(f"the extension flashattn._C is not in {tmp_path}/flashattn: it was never built there")
    assert cpu.find_missing_reason(ImportError("undefined symbol")).endswith("_C does not load: undefined symbol")


@pytest.mark.parametrize("kind", ["wheel", "editable"])
@pytest.mark.parametrize("hook", ["get_requires_for_build", "prepare_metadata_for_build", "build"])
def test_without_pytorch_the_build_ends_with_one_line(kind, hook, clone, without_torch):
    done = call_hook(f"{hook}_{kind}", clone, **without_torch)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("flashattn: the build needs the PyTorch that flashattn will run with and finds none: ")
    assert "pip install --no-build-isolation ." in line


def test_the_environments_pytorch_is_found_in_the_isolation_of_pip():
    code = "import sys; sys.modules['torch'] = None; import build_backend; print(build_backend.find_torch())"
    assert run(sys.executable, "-c", code, cwd=ROOT).stdout == f"{Path(torch.__file__).parent}\n"


@pytest.mark.parametrize("package, version", [("setuptools", "65.5.0"), ("torch", "2.9.1+cpu")])
def test_what_is_too_old_is_named(package, version, clone, tmp_path):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"__version__ = '{version}'\n")
    (tmp_path / package / "version.py").write_text(f"__version__ = '{version}'\n")
    done = call_hook("get_requires_for_build_wheel", clone, PYTHONPATH=tmp_path)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("flashattn: the build needs ")
    assert f"found {version}: pip install '{package}>=" in line


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_an_engine_that_does_not_compile_is_an_error(clone, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *csrc/*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    done = call_hook("build_wheel", clone, CC=str(compiler), CXX=str(compiler))
    assert done.returncode != 0
    assert "csrc/" in done.stderr + done.stdout


def test_importing_needs_no_triton():
    code = """
import sys; sys.modules["triton"] = None
import importlib, pkgutil, torch, flashattn
for module in pkgutil.walk_packages(flashattn.__path__, "flashattn."):
    if not module.name.startswith(("flashattn.kernels.", "flashattn.backends.triton_", "flashattn.__main__")):
        importlib.import_module(module.name)
print(flashattn.attention(*[torch.randn(1, 1, 3, 4)] * 3).shape)
import flashattn.__main__; flashattn.__main__.main()
import tests.conftest  # most tests run without it, too
"""
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert ", triton not installed" in done.stdout
    assert "the triton package is not installed (a PyTorch for GPUs brings it)" in done.stdout
