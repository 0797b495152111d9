"""Bytes that a norm moves relative to the bytes that it needs, from the machine's counts.

needed: x, y, hidden, their gradients and residuals, each once.
rows: the traffic of the same tensors. They exceed a cache, so every request of the warps counts, in whole sectors.
    rows / needed is 1 if no row is read twice.
parameters: weight and bias, their gradients, mean, rstd: many programs read them, from the L2. Each sector counts
    once.
sums: partial sums of the parameters' gradients, written and read once: programs * width * 8 bytes for each parameter.
    The number of programs fills the GPU whatever the number of rows, so their share falls with more rows. They are read
    from the L2 if it is large enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .machine.counts import Launch


class PassBytes(NamedTuple):
    needed: int
    rows: int
    parameters: int
    sums: int

    @property
    def moved(self) -> float:
        """Relative to the bytes needed."""
        return self.rows / self.needed

    @property
    def text(self) -> str:
        return (
            f"rows {self.rows:,} bytes moved, {self.needed:,} needed: {self.moved:.3f}; "
            f"parameters and statistics {self.parameters:,}, partial sums {self.sums:,}"
        )


def count_norm_bytes(launches: Iterable[Launch]) -> dict[str, PassBytes]:
    """By pass, "forward" or "backward", as far as the launches include it."""
    found: dict[str, list[Launch]] = {}
    for launch in launches:
        found.setdefault("forward" if launch.kernel == "norm_forward" else "backward", []).append(launch)
    return {name: count_pass_bytes(launches_of_pass) for name, launches_of_pass in found.items()}


def count_pass_bytes(launches: list[Launch]) -> PassBytes:
    needed, parameters, rows, sums = {}, {}, 0, 0
    for tensor in (tensor for launch in launches for tensor in launch.counts.tensors):
        if tensor.name.endswith(".ptr"):  # a RowView
            needed[tensor.name] = tensor.size
            rows += tensor.requested
        elif tensor.name.endswith("_parts"):
            sums += tensor.unique
        else:
            parameters[tensor.name] = tensor.unique
    return PassBytes(sum(needed.values()), rows, sum(parameters.values()), sums)
