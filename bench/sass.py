"""Loops in NVIDIA machine code (SASS), and the instruction mix of those with tensor instructions."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

LABEL = re.compile(r"^\s*(\.L_x?_?\w+):", re.M)
TARGET = re.compile(r"`\((\.L_x?_?\w+)\)")  # of a branch
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
REGISTER = re.compile(r"\bR(\d+)\b")
TENSOR = re.compile(r"(HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|DMMA|UTC\w*MMA)")
# Kinds of instructions by prefix of the name, of which the longest decides; the rest is "other".
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
    predicated: bool
    name: str
    rest: str


class Loop(NamedTuple):
    """An innermost loop. flops: of a warp in one iteration; None where the code does not give the shape."""

    start: int  # address
    instructions: int
    mix: dict[str, int]
    tensor_instructions: int
    flops: int | None

    @property
    def overhead(self) -> float | None:
        """Issue slots of other instructions per 1,024 tensor FLOPs of a warp."""
        if not self.flops:
            return None
        return (self.instructions - self.tensor_instructions) / self.flops * 1024


def count_tensor_flops(name: str) -> int | None:
    """FLOPs of an instruction per warp: HMMA.16816 is m16n8k16 of one warp, HGMMA.64x128x16 of four."""
    if match := re.search(r"\.(\d+)x(\d+)x(\d+)", name):
        m, n, k = (int(x) for x in match.groups())
        return 2 * m * n * k // (4 if "GMMA" in name else 1)
    if match := re.search(r"\.(8|16)(8)(4|8|16|32|64)\b", name):
        m, n, k = (int(x) for x in match.groups())
        return 2 * m * n * k
    return None


def classify(name: str) -> str:
    base = name.split(".")[0]
    found = [(len(start), k) for k, starts in KINDS.items() for start in starts if base.startswith(start)]
    return max(found)[1] if found else "other"


def find_tensor_loops(sass: str) -> list[Loop]:
    """The innermost loops with tensor instructions, in order."""
    code, labels = parse(sass)
    spans = find_loops(code, labels)
    loops = []
    for start, end in spans:
        names = [x.name for x in code[start : end + 1]]
        tensor = [name for name in names if TENSOR.match(name)]
        inner = [s for s in spans if s != (start, end) and start <= s[0] and s[1] <= end]
        has_inner = any(TENSOR.match(x.name) for s in inner for x in code[s[0] : s[1] + 1])
        if not tensor or has_inner:
            continue
        flops = [count_tensor_flops(name) for name in tensor]
        total = None if None in flops else sum(flops)
        mix = dict(Counter(classify(name) for name in names).most_common())
        loops.append(Loop(code[start].address, len(names), mix, len(tensor), total))
    return loops


def find_full_tile_loops(sass: str) -> list[Loop]:
    """The loops over full tiles: each role has a pair of loops, and the one over partial tiles has more other
    instructions for its FLOPs."""
    loops = find_tensor_loops(sass)
    pairs = [loops[n : n + 2] for n in range(0, len(loops), 2)]
    return [min(pair, key=lambda loop: loop.overhead or loop.instructions) for pair in pairs]


def split_roles(sass: str) -> list[list[Instruction]]:
    """The code of a warp-specialised kernel, split where warps release or request registers (setmaxnreg)."""
    parts: list[list[Instruction]] = [[]]
    for x in parse(sass)[0]:
        if x.name.startswith("USETMAXREG"):
            parts.append([])
        parts[-1].append(x)
    return parts


def find_max_register(code: list[Instruction]) -> int:
    return max((int(number) for x in code for number in REGISTER.findall(x.rest)), default=-1)


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and the index of the first one after each label."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if match := LABEL.match(line):
            labels[match.group(1)] = len(code)
        elif match := INSTRUCTION.search(line):
            address, predicate, name, rest = match.groups()
            code.append(Instruction(int(address, 16), predicate is not None, name, rest))
    return code, labels


def find_loops(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """(first, last) instruction of each loop: from the target of a backward branch to the branch.

    Two kinds of backward branches make no loop. Waits for an mbarrier are placed after the end of the code and return
    from there, past an EXIT. And warps that have finished their role return to the dispatch of roles, an indirect
    branch."""
    ends = {
        n for n, x in enumerate(code) if x.name.startswith("BRX") or (x.name.startswith("EXIT") and not x.predicated)
    }
    spans = set()
    for end, branch in enumerate(code):
        target = TARGET.search(branch.rest)
        start = labels.get(target.group(1), end + 1) if branch.name.startswith("BRA") and target else end + 1
        if start <= end and not ends.intersection(range(start, end)):
            spans.add((start, end))
    return sorted(spans)
