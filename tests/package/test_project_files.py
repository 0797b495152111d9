"""The files that forges and tools read: they parse, and name versions and `make` targets that this checkout has."""

import re
from pathlib import Path

import pytest
import yaml

from flashattn import __version__

ROOT = Path(__file__).parents[2]
MAKEFILE = ROOT.joinpath("Makefile").read_text(encoding="utf-8")
PYPROJECT = ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8")  # as text: tomllib came with Python 3.11
GITHUB = ROOT / ".github"
needs_github = pytest.mark.skipif(not GITHUB.exists(), reason="a source distribution has no .github")


def find(pattern: str, text: str) -> str:
    [found] = re.findall(pattern, text, re.MULTILINE)
    return found


def load(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def workflow(name: str) -> dict:
    return load(GITHUB / f"workflows/{name}.yml")


@needs_github
@pytest.mark.parametrize("name", ["test", "lint", "wheels"])
def test_workflows(name):
    jobs = workflow(name)["jobs"]
    targets = set(find(r"^\.PHONY: (.*)$", MAKEFILE).split())
    for job in jobs.values():
        assert set(job.get("needs", [])) <= set(jobs)
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert set(re.findall(r"\bmake (\S+)", step.get("run", ""))) <= targets


@needs_github
def test_workflows_run_what_the_readme_says():
    jobs = workflow("test")["jobs"] | workflow("lint")["jobs"]
    runs = [step.get("run") for job in jobs.values() for step in job["steps"]]
    assert {"make test", "make lint", "make torch-versions PYTHON=python"} <= set(runs)


@needs_github
def test_issue_templates():
    for file in GITHUB.glob("ISSUE_TEMPLATE/*.yml"):
        form = load(file)
        assert {"name", "description", "body"} <= set(form), file
        fields = [field["id"] for field in form["body"]]
        assert len(fields) == len(set(fields)), file


@needs_github
def test_python_versions():
    tested = workflow("test")["jobs"]["versions"]["strategy"]["matrix"]["python"]
    assert tested == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert tested[0] == find(r'^requires-python = ">=(.*)"', PYPROJECT)
    built = re.findall(r"cp3(\d+)-manylinux", find(r"^build = (.*)$", PYPROJECT))
    assert [f"3.{minor}" for minor in built] == [tested[0], tested[-1]]
    limited = tuple(map(int, tested[0].split(".")))
    setup = ROOT.joinpath("setup.py").read_text(encoding="utf-8")
    assert f'"py_limited_api": "cp{limited[0]}{limited[1]}"' in setup
    assert f'("Py_LIMITED_API", "0x{limited[0]:02x}{limited[1]:02x}0000")' in setup


def test_torch_versions():
    oldest, newest = (find(rf"^{name}_TORCH := (.*)$", MAKEFILE) for name in ("OLDEST", "NEWEST"))
    assert f'"torch>={oldest.removesuffix(".0")}"' in PYPROJECT
    assert f"pip install torch=={oldest} " in PYPROJECT  # wheels are built with the oldest
    major, minor = map(int, oldest.split(".")[:2])
    setup = ROOT.joinpath("setup.py").read_text(encoding="utf-8")
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in setup
    pinned = find(r"^torch==(.*)$", ROOT.joinpath("requirements-dev.txt").read_text(encoding="utf-8"))
    numbers = [tuple(map(int, version.split("."))) for version in (oldest, pinned, newest)]
    assert numbers == sorted(numbers)


def test_citation():
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    assert citation["license"] == find(r'^license = "(.*)"', PYPROJECT)
