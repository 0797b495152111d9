"""Bytes that a norm moves over the bytes it needs, from what the machine counted.

needed: x, y, hidden, their gradients and residuals, each once.
rows: the same as they were moved. They are larger than a cache, so what the warps ask for counts, each time they ask,
    in whole sectors. rows / needed is 1 where no row is read twice.
rest: parameters, their gradients, mean, rstd: many programs read them, out of the L2. Each sector once.
sums: partial sums of the parameters' gradients, written and read once: programs * width * 8 bytes for each parameter.
    There are as many programs as fill the card, whatever the rows are, so their share falls as the rows grow. They come
    back out of the L2 where it is large enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .machine.counts import Launch


class PassBytes(NamedTuple):
    needed: int
    rows: int
    rest: int
    sums: int

    @property
    def moved(self) -> float:
        """Over what is needed."""
        return self.rows / self.needed

    @property
    def text(self) -> str:
        return (
            f"rows {self.rows:,} bytes moved, {self.needed:,} needed: {self.moved:.3f}; "
            f"parameters and statistics {self.rest:,}, partial sums {self.sums:,}"
        )


def count_norm_bytes(launches: Iterable[Launch]) -> dict[str, PassBytes]:
    """Of "forward" and "backward", as far as they are among the launches."""
    found: dict[str, list[Launch]] = {}
    for launch in launches:
        found.setdefault("forward" if launch.kernel == "norm_forward" else "backward", []).append(launch)
    return {name: count_pass_bytes(launches_of_pass) for name, launches_of_pass in found.items()}


def count_pass_bytes(launches: list[Launch]) -> PassBytes:
    needed, rest, rows, sums = {}, {}, 0, 0
    for tensor in (tensor for launch in launches for tensor in launch.counts.tensors):
        if tensor.name.endswith(".ptr"):  # a RowView
            needed[tensor.name] = tensor.size
            rows += tensor.requested
        elif tensor.name.endswith("_parts"):
            sums += tensor.unique
        else:
            rest[tensor.name] = tensor.unique
    return PassBytes(sum(needed.values()), rows, sum(rest.values()), sums)
