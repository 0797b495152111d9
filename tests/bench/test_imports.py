"""No module imports itself by way of others, so that each can be read, and imported, after those it needs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTENSIONS = ("flashattn._C",)  # modules without a .py


def list_modules(package: str) -> dict[str, Path]:
    """{dotted name: file}; a package is its __init__.py."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def walk_statements(body: list[ast.stmt], functions: bool) -> Iterator[ast.stmt]:
    """All statements but those under `if TYPE_CHECKING`. functions: those of functions too."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        if functions or not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "handlers", "finalbody"):
                yield from walk_statements(getattr(statement, field, []), functions)


def list_imports(name: str, modules: dict[str, Path], functions: bool) -> set[str]:
    """The modules of the package that a module imports."""
    path = modules[name]
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    imported: set[str] = set()
    for statement in walk_statements(ast.parse(path.read_text(encoding="utf-8")).body, functions):
        if isinstance(statement, ast.Import):
            imported |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            above = here[: len(here) - statement.level + 1] if statement.level else []
            source = ".".join([*above, *filter(None, [statement.module])])
            for alias in statement.names:
                submodule = f"{source}.{alias.name}"
                imported.add(submodule if submodule in {*modules, *EXTENSIONS} else source)
    return imported & set(modules)


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, in order; none: []."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(imports[name]):
                if cycle := visit(other, [*path, name]):
                    return cycle
            done.add(name)
        return []

    return next((cycle for name in imports if (cycle := visit(name, []))), [])


# (package, whether imports within functions count)
PACKAGES = [("bench", True), ("flashattn", True), ("model", True)]


@pytest.mark.parametrize("package, functions", PACKAGES)
def test_no_import_cycle(package, functions):
    modules = list_modules(package)
    cycle = find_cycle({name: list_imports(name, modules, functions) for name in modules})
    assert not cycle, " -> ".join(cycle)


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
