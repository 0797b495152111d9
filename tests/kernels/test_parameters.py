"""The functions that kernels are made of take few parameters: what belongs together is a named tuple
(`kernels/state.py`), which costs nothing."""

import ast
from pathlib import Path

import pytest

import flashattn

FILES = sorted((Path(flashattn.__file__).parent / "kernels").glob("*.py"))
MOST = 12


def helpers(source: str) -> dict[str, int]:
    """The functions under @triton.jit or @gluon.jit, not those that are launched, and their parameters."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d).endswith(".jit") for d in node.decorator_list):
            found[node.name] = len(node.args.args) + len(node.args.kwonlyargs)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_parameters_of_helpers(file):
    assert {name: count for name, count in helpers(file.read_text()).items() if count > MOST} == {}


def test_helpers_are_found():
    found = {name: count for file in FILES for name, count in helpers(file.read_text()).items()}
    assert len(found) > 50
    assert found["load_tile"] == 7
    assert "attention_forward" not in found
