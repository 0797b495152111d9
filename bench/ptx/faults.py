"""What the machine refuses, and where it happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .syntax import Instruction


class Fault(RuntimeError):  # noqa: N818  (it is the kernel's, not ours)
    """A kernel did what a GPU would punish, or would let pass unseen.

    kind: "out of bounds", "misaligned", "uninitialised", "pending copy", "pending wgmma", "race", "global race",
    "barrier", "endless", "assert", "unknown instruction" or "unsupported".
    """

    def __init__(
        self,
        kind: str,
        message: str,
        instruction: Instruction | None = None,
        block: tuple[int, int, int] | None = None,
        thread: int | None = None,
        tensor: str | None = None,
        other: Instruction | None = None,  # what it clashes with
    ):
        self.kind, self.message, self.instruction, self.other = kind, message, instruction, other
        self.block, self.thread, self.tensor = block, thread, tensor
        lines = [f"{kind}: {message}"]
        if block is not None:
            lines.append(f"  block {block}" + ("" if thread is None else f", thread {thread}"))
        if instruction is not None:
            lines += place(instruction)
        if other is not None:
            lines += ["  The other instruction:", *place(other)]
        super().__init__("\n".join(lines))


def place(instruction: Instruction) -> list[str]:
    python = instruction.location or "no Python line"
    return [f"  {python}", f"  PTX line {instruction.line}: {instruction.text}"]
