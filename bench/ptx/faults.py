"""Faults of a kernel, and what is done about each kind."""

from __future__ import annotations

from collections.abc import Mapping

from .frontend.syntax import Instruction

RAISE, NOTE, IGNORE = "raise", "note", "ignore"
# The kinds of fault after which a launch can go on, with the default choice. What is noted by default may be right on a
# GPU: slow, or with last bits that vary; and a kernel may not use the uninitialised part of a box that a bulk copy
# brings.
CHOICES = {
    "out of bounds": RAISE, "out of view": RAISE, "uninitialised": RAISE, "pending copy": RAISE, "race": RAISE,
    "global race": RAISE, "pending wgmma": NOTE, "last bits": NOTE, "uninitialised copy": NOTE,
}  # fmt: skip


class Fault(RuntimeError):  # noqa: N818  (it is the kernel's, not ours)
    """An error of a kernel that would stop a GPU, or pass unnoticed on it.

    kind: one of CHOICES, or "misaligned", "barrier", "endless", "assert", "unknown instruction" or "unsupported".
    kernel, block, thread, tensor, element (the index of the first element concerned) and instruction say where, as far
    as known.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        instruction: Instruction | None = None,
        block: tuple[int, int, int] | None = None,
        thread: int | None = None,
        tensor: str | None = None,
        other: Instruction | None = None,  # the conflicting one
        kernel: str | None = None,
        element: tuple[int, ...] | None = None,
    ):
        self.kind, self.message, self.instruction, self.other = kind, message, instruction, other
        self.block, self.thread, self.tensor, self.kernel, self.element = block, thread, tensor, kernel, element
        who = {"kernel": kernel, "block": block, "thread": thread}
        lines = [f"{kind}: {message}"]
        if place := [f"{name} {value}" for name, value in who.items() if value is not None]:
            lines.append(f"  {', '.join(place)}")
        if instruction is not None:
            lines += format_instruction(instruction)
        if other is not None:
            lines += ["  The other instruction:", *format_instruction(other)]
        super().__init__("\n".join(lines))


def format_instruction(instruction: Instruction) -> list[str]:
    python = instruction.location or "no Python line"
    return [f"  {python}", f"  PTX line {instruction.line}: {instruction.text}"]


class Judge:
    """Raises, notes or ignores faults, by their kinds."""

    def __init__(self, on_fault: str | Mapping[str, str] = ()):
        """on_fault: the choice for each kind of CHOICES, or for all of them."""
        given = dict.fromkeys(CHOICES, on_fault) if isinstance(on_fault, str) else dict(on_fault)
        for kind, choice in given.items():
            if kind not in CHOICES:
                raise ValueError(f"on_fault takes the kinds {', '.join(map(repr, CHOICES))}, got {kind!r}")
            if choice not in (RAISE, NOTE, IGNORE):
                raise ValueError(f"on_fault must say 'raise', 'note' or 'ignore', got {choice!r}")
        self.choices = {**CHOICES, **given}
        self.noted: dict[tuple, Fault] = {}

    @property
    def notes(self) -> list[Fault]:
        """The first of each kind, kernel, instruction and tensor."""
        return list(self.noted.values())

    def __call__(self, fault: Fault) -> None:
        choice = self.choices.get(fault.kind, RAISE)
        if choice == RAISE:
            raise fault
        if choice == NOTE:
            line = fault.instruction and fault.instruction.line
            self.noted.setdefault((fault.kind, fault.kernel, line, fault.tensor), fault)
