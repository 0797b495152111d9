"""A setting of the whole process that a block of code changes while it lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Override:
    """One override, compared by identity, as `list.remove` needs."""

    def __init__(self, value):
        self.value = value


class Setting:
    """A process-wide value that `with` blocks override. Blocks of several threads may overlap: of those that have not
    ended, the one that began last counts."""

    def __init__(self, value):
        self._overrides = [Override(value)]

    @property
    def value(self):
        return self._overrides[-1].value

    @contextlib.contextmanager
    def override(self, value: Any) -> Iterator[None]:
        override = Override(value)
        self._overrides.append(override)
        try:
            yield
        finally:
            self._overrides.remove(override)
