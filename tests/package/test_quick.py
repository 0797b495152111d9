"""What `make quick` leaves out, and its samples of that, are there under these names."""

import re
import subprocess
import sys
from pathlib import Path

from tests import quick

TESTS = Path(__file__).parents[1]


def has(file: str, function: str) -> bool:
    """Whether a function's name in the file begins so."""
    return re.search(rf"^def {function}", (TESTS / file).read_text(), re.MULTILINE) is not None


def test_names_are_those_of_tests():
    slow = [(file, name) for file, names in quick.SLOW.items() for name in names or ("test_",)]
    samples = [node.partition("[")[0].split("::") for node in quick.SAMPLES]
    assert [pair for pair in (*slow, *samples) if not has(*pair)] == []
    assert all(node.partition("::")[0] in quick.SLOW for node in quick.SAMPLES)


def test_samples_are_collected():
    """Each exists with its parameters."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"]
    samples = [f"tests/{node}" for node in quick.SAMPLES]
    done = subprocess.run([*command, *samples], cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_quick():
    assert quick.is_quick("tests/norm/test_norm.py::test_threads[2]")
    assert quick.is_quick("flashattn/attention.py::flashattn.attention.attention")
    assert quick.is_quick("tests/kernels/test_compiled.py::test_norms[sm_80-64]")
    assert not quick.is_quick("tests/kernels/test_compiled.py::test_norms[sm_90-64]")
    assert not quick.is_quick("tests/compat/test_flex.py::test_memory_is_linear")
