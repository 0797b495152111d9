"""The build backend: setuptools' own, after a look at what the build needs. What it lacks it says in one line, before
pip downloads anything."""

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import setuptools

if (
    int(setuptools.__version__.split(".")[0]) < 77
):  # which does not know `license` and `license-files` of pyproject.toml
    sys.exit(f"flashattn: the build needs setuptools 77, found {setuptools.__version__}: pip install 'setuptools>=77'")

from setuptools import build_meta


def find_torch() -> Path:
    """The folder of the PyTorch that the engine is built with, or the end of the build.

    pip's build isolation hides PyTorch, which would be gigabytes to download a second time; but it runs the build with
    the environment's own Python, and that finds it when pip's PYTHONPATH is ignored.
    """
    code = "import importlib.util as u; spec = u.find_spec('torch'); print(spec and spec.origin or '')"
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else subprocess.check_output([sys.executable, "-E", "-c", code], text=True).strip()
    if not origin:
        sys.exit(
            "flashattn: the build needs the PyTorch that flashattn will run with and finds none: "
            "pip install torch, then pip install --no-build-isolation . (or python -m build --no-isolation)"
        )
    torch = Path(origin).parent
    text = torch.joinpath("version.py").read_text(encoding="utf-8")
    version, major, minor = re.search(r"__version__ = '((\d+)\.(\d+).*)'", text).groups()
    if (int(major), int(minor)) < (2, 10):
        sys.exit(f"flashattn: the build needs PyTorch 2.10, found {version}: pip install 'torch>=2.10'")
    return torch


def after_finding_torch(hook):
    @functools.wraps(hook)
    def checked(*args, **kwargs):
        find_torch()
        return hook(*args, **kwargs)

    return checked


# A frontend calls the first of these that it has a use for; a source distribution needs no PyTorch.
get_requires_for_build_wheel = after_finding_torch(build_meta.get_requires_for_build_wheel)
get_requires_for_build_editable = after_finding_torch(build_meta.get_requires_for_build_editable)
prepare_metadata_for_build_wheel = after_finding_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = after_finding_torch(build_meta.prepare_metadata_for_build_editable)
build_wheel = after_finding_torch(build_meta.build_wheel)
build_editable = after_finding_torch(build_meta.build_editable)
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist
