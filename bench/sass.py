"""NVIDIA machine code read: its loops, and what stands in those that hold tensor instructions."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

LABEL = re.compile(r"^\s*(\.L_x?_?\w+):", re.M)
TARGET = re.compile(r"`\((\.L_x?_?\w+)\)")  # of a branch
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
REGISTER = re.compile(r"\bR(\d+)\b")
TENSOR = re.compile(r"(HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|DMMA|UTC\w*MMA)")
# What an instruction is for, by how its name begins; what is in no list is arithmetic of other kinds.
KINDS = {
    "tensor": ("HMMA", "HGMMA", "IMMA", "IGMMA", "QMMA", "QGMMA", "DMMA", "UTC", "WARPGROUP", "UTCBAR"),
    "fma": ("FFMA", "FMUL", "FADD", "HFMA", "HMUL", "HADD", "DFMA", "DMUL", "DADD"),
    "special": ("MUFU",),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "global": ("LDG", "STG", "LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG", "ATOMG", "RED"),
    "local": ("LDL", "STL"),
    "control": ("BRA", "BAR", "SYNCS", "DEPBAR", "LDGDEPBAR", "BSSY", "BSYNC", "EXIT", "WARPSYNC", "NOP", "ELECT",
                "VOTE"),
    "integer": ("IADD", "IMAD", "ISETP", "LEA", "LOP", "SHF", "PRMT", "IMNMX", "VIADD", "UIADD", "ULEA", "ULOP", "USHF",
                "UIMAD", "UISETP", "USEL", "UMOV", "R2UR", "MOV", "SEL", "S2R", "S2UR", "IABS", "UPRMT", "CS2R"),
    "float": ("FSEL", "FMNMX", "FSETP", "F2F", "F2FP", "I2F", "F2I", "FCHK", "HSET", "HMNMX"),
}  # fmt: skip


class Instruction(NamedTuple):
    address: int
    guarded: bool
    name: str
    rest: str


class Loop(NamedTuple):
    """An innermost loop of machine code. flops: of a warp in one turn; None where the code does not tell the shape."""

    start: int  # address
    instructions: int
    mix: dict[str, int]
    tensor_instructions: int
    flops: int | None

    @property
    def overhead(self) -> float | None:
        """Issue slots of other instructions for 1,024 tensor FLOPs of a warp."""
        if not self.flops:
            return None
        return (self.instructions - self.tensor_instructions) / self.flops * 1024


def tensor_flops(name: str) -> int | None:
    """FLOPs of one instruction for a warp: HMMA.16816 is m16n8k16 of a warp, HGMMA.64x128x16 of four warps."""
    if match := re.search(r"\.(\d+)x(\d+)x(\d+)", name):
        m, n, k = (int(x) for x in match.groups())
        return 2 * m * n * k // (4 if "GMMA" in name else 1)
    if match := re.search(r"\.(8|16)(8)(4|8|16|32|64)\b", name):
        m, n, k = (int(x) for x in match.groups())
        return 2 * m * n * k
    return None


def kind(name: str) -> str:
    base = name.split(".")[0]
    found = [(len(start), k) for k, starts in KINDS.items() for start in starts if base.startswith(start)]
    return max(found)[1] if found else "other"


def tensor_loops(sass: str) -> list[Loop]:
    """The innermost loops that hold tensor instructions, in order."""
    code, labels = read(sass)
    spans = loop_spans(code, labels)
    loops = []
    for start, end in spans:
        names = [x.name for x in code[start : end + 1]]
        tensor = [name for name in names if TENSOR.match(name)]
        inner = [s for s in spans if s != (start, end) and start <= s[0] and s[1] <= end]
        held = any(TENSOR.match(x.name) for s in inner for x in code[s[0] : s[1] + 1])
        if not tensor or held:
            continue
        flops = [tensor_flops(name) for name in tensor]
        total = None if None in flops else sum(flops)
        mix = dict(Counter(kind(name) for name in names).most_common())
        loops.append(Loop(code[start].address, len(names), mix, len(tensor), total))
    return loops


def steady_loops(loops: list[Loop]) -> list[Loop]:
    """The loops over whole tiles: of each two that follow each other, in each role, the other is over tiles with an
    edge, and has more to do for its FLOPs."""
    pairs = [loops[n : n + 2] for n in range(0, len(loops), 2)]
    return [min(pair, key=lambda loop: loop.overhead or loop.instructions) for pair in pairs]


def roles(sass: str) -> list[list[Instruction]]:
    """The code of a warp-specialised kernel, cut where warps give up registers or ask for more."""
    parts: list[list[Instruction]] = [[]]
    for x in read(sass)[0]:
        if x.name.startswith("USETMAXREG"):
            parts.append([])
        parts[-1].append(x)
    return parts


def highest_register(code: list[Instruction]) -> int:
    return max((int(number) for x in code for number in REGISTER.findall(x.rest)), default=-1)


def read(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and the number of the one that follows each label."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if match := LABEL.match(line):
            labels[match.group(1)] = len(code)
        elif match := INSTRUCTION.search(line):
            address, guard, name, rest = match.groups()
            code.append(Instruction(int(address, 16), guard is not None, name, rest))
    return code, labels


def loop_spans(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """(first, last) instruction of each loop: from the target of a branch that goes back to the branch.

    Two kinds of branch go back and make no loop. Waits for an mbarrier are moved behind the end of the code and return
    from there, past an EXIT. And warps that have ended their role go back to where they are given the next one, by an
    indirect branch."""
    ends = {n for n, x in enumerate(code) if x.name.startswith("BRX") or (x.name.startswith("EXIT") and not x.guarded)}
    spans = set()
    for end, branch in enumerate(code):
        target = TARGET.search(branch.rest)
        start = labels.get(target.group(1), end + 1) if branch.name.startswith("BRA") and target else end + 1
        if start <= end and not ends.intersection(range(start, end)):
            spans.add((start, end))
    return sorted(spans)
