"""Loops without an end: lanes that come back to the same state.

What a lane does next follows from its registers and from memory. Lanes that stand where they stood before with the same
registers, while nothing has changed memory, go round for ever, unless another warp or block changes something: they are
set aside until then. States are compared with one of before, which moves on as the steps double (Brent, 1980).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .unit import Unit


FIRST_STEPS = 1024  # steps before the first state is kept
IDLE = 4  # a unit may go without memory for this part of the instructions that it may execute


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
        """Whether these lanes, about to go on at an instruction, have been there in the same state."""
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
        if any((now[..., lane] != before[..., lane]).any() for now, before in pairs):  # as in most loops
            return False
        return all(np.array_equal(now, before) for now, before in pairs)

    def is_idle(self, unit: Unit, max_instructions: int) -> bool:
        """Whether the unit has not touched memory for so long that it counts in vain."""
        state = self.state
        return (
            state is not None
            and unit.steps - state.steps > max_instructions // IDLE
            and count_accesses(unit) == state.accesses
        )


def count_changes(unit: Unit) -> int:
    """A number that is another after each change of memory."""
    return unit.wave.memory.changes + unit.wave.shared.changes


def count_accesses(unit: Unit) -> int:
    counts = unit.wave.counts
    return int(counts.global_requests.sum() + counts.shared_requests.sum())
