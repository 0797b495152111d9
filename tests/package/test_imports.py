"""A test module is imported by pytest alone: tables and checks that several share are plain modules beside them."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT).as_posix() for folder in ("bench", "tests") for path in (ROOT / folder).rglob("*.py")
)


def imported(text: str) -> set[str]:
    """The names of what it imports, with the modules that these come from."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def from_tests(text: str) -> list[str]:
    """What it imports from test modules, or these themselves."""
    return sorted(name for name in imported(text) if name.startswith("tests.") and ".test_" in name)


def test_such_imports_are_found():
    text = "import tests.norm.test_norm\ndef f():\n    from tests.attention import cases, test_decode\n"
    text += "from tests.ptx.test_faults import run\nfrom tests.norm.cases import check\n"
    assert from_tests(text) == [
        "tests.attention.test_decode", "tests.norm.test_norm", "tests.ptx.test_faults.run",
    ]  # fmt: skip


def test_no_test_module_is_imported():
    found = {path: from_tests((ROOT / path).read_text()) for path in MODULES}
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}
