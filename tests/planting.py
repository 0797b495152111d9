"""Modules of kernels with a fault planted in their source."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

_numbers = itertools.count()


def plant(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """The module with some text of its source replaced, each found exactly once in it."""
    source = Path(module.__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{source.count(old)} times in {module.__name__}: {old}"
        source = source.replace(old, new)
    file = folder / f"mutant_{next(_numbers)}.py"
    file.write_text(source)
    name = f"{module.__package__}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
