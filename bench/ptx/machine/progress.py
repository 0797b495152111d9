"""Detects endless loops: lanes that return to the same state.

Registers and memory determine what a lane does next. Lanes that return to an instruction with the same registers and
unchanged memory loop forever unless another warp or block changes memory: they are suspended until then. The state is
compared with an earlier one, which is replaced each time that the number of steps doubles (Brent, 1980).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .unit import Unit

FIRST_STEPS = 1024  # before the first state is saved
IDLE = 4  # max_instructions // IDLE may pass without a memory access


class State(NamedTuple):
    pc: int
    mask: np.ndarray
    registers: list[np.ndarray]
    changes: int  # of memory
    accesses: int
    steps: int


class Progress:
    """Of one unit."""

    def __init__(self):
        self.state: State | None = None
        self.next = FIRST_STEPS

    def is_repeating(self, unit: Unit, pc: int, mask: np.ndarray) -> bool:
        """Whether these lanes were at this instruction before in the same state."""
        if unit.steps >= self.next:
            self.next = 2 * unit.steps
            copies = [x.copy() for x in unit.lane_state()]
            self.state = State(pc, mask.copy(), copies, count_changes(unit), count_accesses(unit), unit.steps)
            return False
        state = self.state
        if (
            state is None
            or pc != state.pc
            or count_changes(unit) != state.changes
            or not np.array_equal(mask, state.mask)
        ):
            return False
        lane, pairs = int(np.argmax(mask)), list(zip(unit.lane_state(), state.registers, strict=True))
        if any((now[..., lane] != before[..., lane]).any() for now, before in pairs):  # the common case, cheaply
            return False
        return all(np.array_equal(now, before) for now, before in pairs)

    def is_idle(self, unit: Unit, max_instructions: int) -> bool:
        """Whether the unit has accessed no memory for too long."""
        state = self.state
        return (
            state is not None
            and unit.steps - state.steps > max_instructions // IDLE
            and count_accesses(unit) == state.accesses
        )


def count_changes(unit: Unit) -> int:
    """The number of changes of memory."""
    return unit.wave.memory.changes + unit.wave.shared.changes


def count_accesses(unit: Unit) -> int:
    counts = unit.wave.counts
    return int(counts.global_requests.sum() + counts.shared_requests.sum())
