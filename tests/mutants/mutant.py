"""The fields of a mutant."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # node ids
    interpreted: bool = False  # the tests are those of Triton's interpreter

    @property
    def is_engine(self) -> bool:
        return self.file.startswith("csrc/")
