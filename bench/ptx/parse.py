"""PTX text into instructions: what the machine runs, one flat list for a kernel, calls inlined.

PTX ISA 8.7, chapters 4 (syntax) and 5 (state spaces). Names are made unique where a scope in braces declares them
again; each instruction keeps its PTX line and the Python line that the compiler's `.loc` gives.
"""

from __future__ import annotations

import bisect
import functools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .faults import Fault

BYTES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
    "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16,
}  # fmt: skip


class Location(NamedTuple):
    """A Python line, and the call it was inlined at."""

    file: str
    line: int
    caller: Location | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}"
        return place if self.caller is None else f"{place}, called at {self.caller}"


class Register(NamedTuple):
    name: str
    type: str


class Immediate(NamedTuple):
    bits: int
    floating: int = 0  # bytes of a float literal (0f…: 4, 0d…: 8), 0 for an integer


class Symbol(NamedTuple):
    name: str


class Address(NamedTuple):
    base: Register | Symbol | Immediate
    offset: int


class Group(NamedTuple):
    """{a, b}: a vector operand. A tensor coordinate [map, {x, y}] is a Group of the map's Address and a Group."""

    items: tuple


Operand = Register | Immediate | Symbol | Address | Group


@dataclass
class Instruction:
    op: str  # "ld.global.v4.b32"
    parts: tuple[str, ...]  # op split at its dots
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool  # the guard
    line: int  # of the PTX text, from 1
    text: str
    location: Location | None
    targets: tuple[int, ...] = ()  # instruction numbers that a branch goes to
    used: int | None = None  # of a load, one bit a byte: those the compiler looks at; None: all
    scope: tuple[int, ...] = ()  # while labels are resolved

    @property
    def type(self) -> str:
        return self.parts[-1]


class Param(NamedTuple):
    name: str
    type: str
    offset: int
    bytes: int


@dataclass
class Variable:
    """A module or local variable: its bytes, zeros where no initialiser is given; size 0 is dynamic shared memory."""

    name: str
    space: str
    align: int
    size: int
    data: bytes = b""


@dataclass
class Function:
    name: str
    params: list[Param] = field(default_factory=list)
    returns: list[Param] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)  # (scope, name) -> instruction number
    tables: dict[tuple[int, str], list[str]] = field(default_factory=dict)  # (scope, name) -> labels, for brx.idx

    @property
    def param_bytes(self) -> int:
        return max((p.offset + p.bytes for p in self.params), default=0)


@dataclass
class Module:
    target: str
    kernels: dict[str, Function]
    functions: dict[str, Function]
    variables: dict[str, Variable]


COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)([^\n]*?)(?://\s*(.*))?$", re.M)
INLINED = re.compile(r"inlined_at\s+(\d+)\s+(\d+)\s+(\d+)")
LABEL = re.compile(r"([\w$.]+)\s*:(?!:)")
TABLE = re.compile(r"([\w$.]+)\s*:\s*\.branchtargets\b([^;]*);")
USED = re.compile(r'\.pragma\s+"used_bytes_mask (0x[0-9a-fA-F]+)"')
HEADER = re.compile(r"(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.(entry|func)\b")
VARIABLE = re.compile(
    r"(?:\.visible\s+|\.extern\s+|\.weak\s+)*\.(global|shared|const|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)\s*(?:\[\s*(\d*)\s*\])?\s*(?:=\s*(.*))?",
    re.S,
)
PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\b[^,]*?)?([\w$]+)\s*(?:\[(\d+)\])?\s*$", re.S)
DIRECTIVE = re.compile(
    r"\.(version|target|address_size|file|section|pragma|reqntid|maxntid|minnctapersm|maxnreg|noreturn|noinline|"
    r"reqnctapercluster|explicitcluster|maxclusterrank)\b"
)
REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)


def parse(text: str, file_of: Callable[[str], str] = str) -> Module:
    """The module of a PTX text. file_of: from the path of a source file, as the text has it, to the one to show.

    >>> module = parse('''.target sm_80
    ... .visible .entry add(.param .u64 add_param_0)
    ... { .reg .b32 %r<3>; add.s32 %r1, %r2, 7; ret; }''')
    >>> [i.op for i in module.kernels["add"].instructions]
    ['add.s32', 'ret']
    """
    return Parser(text, file_of).module()


class Parser:
    def __init__(self, text: str, file_of: Callable[[str], str] = str):
        files = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)
        self.files = {number: file_of(path) for number, path in files}
        section = text.find(".section")  # debug information, which holds braces of its own
        self.original = text if section < 0 else text[:section]
        self.names = {path.rsplit("/", 1)[-1]: path for path in self.files.values()}
        self.text = COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), self.original)
        self.newlines = [m.start() for m in re.finditer("\n", self.text)]
        self.at = 0
        self.next_scope = 0
        self.located: dict[tuple[str, str, str], Location | None] = {}  # (file, line, column) of a .loc
        self.used: int | None = None  # of the instruction that comes next

    # -------------------------------------------------------------------------------------------- text

    def skip(self) -> None:
        while self.at < len(self.text) and (self.text[self.at].isspace() or self.text[self.at] == ";"):
            self.at += 1

    def upto(self, *ends: str) -> str:
        """The text up to the first of these characters, which is passed over."""
        found = [x for x in (self.text.find(end, self.at) for end in ends) if x >= 0]
        end = min(found, default=len(self.text))
        piece, self.at = self.text[self.at : end], end + 1
        return piece.strip()

    def line_number(self) -> int:
        return bisect.bisect_left(self.newlines, self.at) + 1

    def error(self, message: str) -> Fault:
        return Fault("unsupported", f"PTX line {self.line_number()}: {message}")

    # -------------------------------------------------------------------------------------------- module

    def module(self) -> Module:
        target = re.search(r"\.target\s+(\w+)", self.text)
        module = Module(target.group(1) if target else "", {}, {}, {})
        while True:
            self.skip()
            if self.at >= len(self.text):
                break
            rest = self.text[self.at : self.at + 200]
            if HEADER.match(rest):
                self.function(module)
            elif VARIABLE.match(rest):
                variable = self.variable(self.upto(";"))
                module.variables[variable.name] = variable
            elif DIRECTIVE.match(rest):
                self.upto("\n", ";")
            else:
                raise self.error(f"cannot read {rest.splitlines()[0]!r}")
        for kernel in module.kernels.values():
            inline_calls(kernel, module.functions)
            resolve(kernel)
        return module

    def variable(self, text: str) -> Variable:
        space, align, kind, name, count, value = VARIABLE.match(text).groups()
        size = BYTES[kind] * (int(count or 0) if "[" in text.split("=")[0] else 1)
        data = b""
        if value:
            numbers = [int(x, 0) for x in re.findall(r"-?(?:0x[0-9a-fA-F]+|\d+)", value)]
            data = b"".join((x % (1 << 8 * BYTES[kind])).to_bytes(BYTES[kind], "little") for x in numbers)
        return Variable(name, space, int(align or BYTES[kind]), size, data.ljust(size, b"\0"))

    def params(self, text: str) -> list[Param]:
        found, offset = [], 0
        for piece in filter(None, (p.strip() for p in text.split(","))):
            match = PARAM.match(piece)
            if match is None:
                raise self.error(f"cannot read the parameter {piece!r}")
            align, kind, name, count = match.groups()
            size = BYTES[kind] * int(count or 1)
            align = int(align or BYTES[kind]) if count else BYTES[kind]
            offset = -(-offset // align) * align
            found.append(Param(name, kind, offset, size))
            offset += size
        return found

    def function(self, module: Module) -> None:
        head_end = min(x for x in (self.text.find("{", self.at), self.text.find(";", self.at)) if x >= 0)
        head = self.text[self.at : head_end]
        kind, name, returns, params = re.match(
            r".*?\.(entry|func)\s*(?:\(([^)]*)\))?\s*([\w$]+)\s*(?:\(([^)]*)\))?", head, re.S
        ).group(1, 3, 2, 4)
        declared = self.text[head_end] == ";"
        self.at = head_end + 1
        if declared:
            return
        function = Function(name, self.params(params or ""), self.params(returns or ""))
        self.body(function)
        (module.kernels if kind == "entry" else module.functions)[name] = function

    # -------------------------------------------------------------------------------------------- body

    def body(self, function: Function) -> None:
        scopes: list[tuple[int, dict[str, str]]] = []
        location = None

        def open_scope():
            self.next_scope += 1
            scopes.append((self.next_scope, {}))

        open_scope()
        while scopes:
            self.skip()
            start = self.text[self.at]
            if start == "{":
                open_scope()
                self.at += 1
            elif start == "}":
                scopes.pop()
                self.at += 1
            elif LOC.match(self.original, self.at):
                location = self.location() or location
            elif start == ".":
                self.declaration(self.upto(";"), function, scopes)
            elif table := TABLE.match(self.text, self.at):
                function.tables[scopes[-1][0], table.group(1)] = [x.strip() for x in table.group(2).split(",")]
                self.at = table.end()
            elif label := LABEL.match(self.text, self.at):
                function.labels[scopes[-1][0], label.group(1)] = len(function.instructions)
                self.at = label.end()
            else:
                line = self.line_number()
                function.instructions.append(self.instruction(self.upto(";"), line, location, scopes))

    def location(self) -> Location | None:
        """`.loc 3 87 23 // tiles.py:87:23 @[ forward.py:34:72 @[ … ] ]`: the compiler writes the callers there. Or,
        from Triton 3.8 on, `.loc 3 87 23, function_name …, inlined_at 1 34 72`, and `.loc 1 34 72` stands before it."""
        match = LOC.match(self.original, self.at)
        self.at = self.original.find("\n", self.at)
        *place, options, comment = match.groups()
        chain = re.findall(r"([^\s@\[\]:]+):(\d+):\d+", comment or "")
        if not chain:
            chain = [(self.files.get(place[0], "?"), place[1])]
        if chain[0][1] == "0":
            return None  # code that belongs to no line: keep the line before
        inlined = INLINED.search(options)
        found = self.located.get(inlined.groups()) if inlined else None
        for name, line in reversed(chain):
            found = Location(self.names.get(name, name), int(line), found)
        self.located[tuple(place)] = found
        return found

    def declaration(self, text: str, function: Function, scopes) -> None:
        scope, names = scopes[-1]
        if match := REGISTER.match(text):
            kind, listed = match.groups()
            for name in (x.strip() for x in listed.split(",")):
                many = re.match(r"(.+)<(\d+)>$", name)
                for each in [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]:
                    names[each] = f"{each}@{scope}" if len(scopes) > 1 else each
                    function.registers[names[each]] = kind
        elif match := re.match(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)\s*(\[\d+\])?$", text):
            kind, name, array = match.groups()
            if array:
                raise self.error("a call with a parameter that is an array")
            names[name] = f"{name}@{scope}"
            function.registers[names[name]] = kind
        elif VARIABLE.match(text):
            variable = self.variable(text)
            function.variables[variable.name] = variable
        elif match := USED.match(text):
            self.used = int(match.group(1), 16)
        elif not DIRECTIVE.match(text):
            raise self.error(f"cannot read {text!r}")

    def instruction(self, text: str, line: int, location: Location | None, scopes) -> Instruction:
        def register(name: str) -> str | None:
            return next((names[name] for _, names in reversed(scopes) if name in names), None)

        match = re.match(r"(?:@(!?)\s*([\w$%.]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
        if match is None:
            raise self.error(f"cannot read {text!r}")
        negated, guard, op, rest = match.groups()
        operands = tuple(self.operand(x, register) for x in split(rest))
        guard = Register(register(guard) or guard, "pred") if guard else None
        instruction = Instruction(
            op, tuple(op.split(".")), operands, guard, bool(negated), line, " ".join(text.split()), location
        )
        instruction.scope = tuple(scope for scope, _ in reversed(scopes))
        instruction.used, self.used = self.used, None
        return instruction

    def operand(self, text: str, register) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Group(tuple(self.operand(x, register) for x in split(text[1:-1])))
        if text.startswith("["):
            return self.address(text[1:-1].strip(), register)
        if "|" in text:  # a result and a predicate: setp p|q, shfl d|p, elect d|p
            return Group(tuple(self.operand(x, register) for x in text.split("|")))
        if text[0] in "0123456789+-" and (number := immediate(text)) is not None:
            return number
        negated = text.startswith("!")
        name = register(text[1:] if negated else text)
        if name is not None:
            return Register(("!" if negated else "") + name, "")
        return Register(text, "u32") if text.startswith("%") else Symbol(text)

    def address(self, text: str, register) -> Operand:
        pieces = split(text)
        if len(pieces) > 1:  # [tensor map, {coordinates}]
            return Group((self.address(pieces[0], register), self.operand(pieces[1], register)))
        base, sign, offset = re.match(r"([\w$%.@]+)\s*(?:([+-])\s*(-?\w+))?$", text).groups()
        distance = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        return Address(self.operand(base, register), distance)


def split(text: str) -> list[str]:
    """Operands at their commas, those in braces and brackets kept together."""
    if not any(c in text for c in "{[("):
        return [p for p in text.split(",") if p.strip()]
    pieces, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    pieces.append(text[start:])
    return [p for p in pieces if p.strip()]


@functools.lru_cache(maxsize=4096)
def immediate(text: str) -> Immediate | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16), 4)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16), 8)
    if re.fullmatch(r"[+-]?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0) if not re.fullmatch(r"0\d+U?", text) else int(text.rstrip("U"), 8))
    if re.fullmatch(r"[+-]?\d+\.\d*(e[+-]?\d+)?", text):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 8)
    return None


# ------------------------------------------------------------------------------------------------ calls and labels


def rename(operand: Operand, names: dict[str, str]) -> Operand:
    if isinstance(operand, Register):
        negated = operand.name.startswith("!")
        name = operand.name[negated:]
        return Register("!" * negated + names.get(name, name), operand.type)
    if isinstance(operand, Symbol):
        return Register(names[operand.name], "") if operand.name in names else operand
    if isinstance(operand, Address):
        return Address(rename(operand.base, names), operand.offset)
    if isinstance(operand, Group):
        return Group(tuple(rename(x, names) for x in operand.items))
    return operand


def inline_calls(kernel: Function, functions: dict[str, Function]) -> None:
    """Each call of a function of the module gives way to its instructions; its parameters become registers.

    `__assertfail` and other names from outside stay calls, for the machine to know or to refuse."""
    calls = 0
    while True:
        at = next((i for i, x in enumerate(kernel.instructions) if callee(x) in functions), None)
        if at is None:
            return
        calls += 1
        insert(kernel, at, functions[callee(kernel.instructions[at])], f"#{calls}")


def callee(instruction: Instruction) -> str | None:
    """The name of a called function: `call (results), name, (arguments)` or `call name, (arguments)`."""
    if instruction.parts[0] != "call":
        return None
    names = re.sub(r"\([^)]*\)", "", instruction.text.split(None, 1)[1])
    return names.replace(",", " ").split()[0]


def insert(kernel: Function, at: int, function: Function, suffix: str) -> None:
    call = kernel.instructions[at]
    lists = [x.replace(",", " ").split() for x in re.findall(r"\(([^)]*)\)", call.text)]
    returns, given = lists if function.returns else ([], lists[0] if lists else [])
    scope = next(s for s in call.scope if all(f"{x}@{s}" in kernel.registers for x in returns + given))
    names = {name: name + suffix for name in function.registers}
    for formal, actual in zip(function.returns + function.params, returns + given, strict=True):
        names[formal.name] = f"{actual}@{scope}"
    kernel.registers.update({names[name]: kind for name, kind in function.registers.items()})
    for variable in function.variables.values():
        kernel.variables[variable.name] = variable
    body = []
    for old in function.instructions:
        new = replace(
            old,
            operands=tuple(rename(x, names) for x in old.operands),
            guard=None if old.guard is None else rename(old.guard, names),
            location=call.location,
            scope=tuple(f"{s}{suffix}" for s in old.scope),
        )
        if old.parts[0] == "ret":
            new.op, new.parts, new.operands = "bra.uni", ("bra", "uni"), (Symbol(f"$after{suffix}"),)
            new.scope = (f"after{suffix}",)
        body.append(new)
    grown = len(body) - 1
    kernel.labels = {key: n + grown * (n > at) for key, n in kernel.labels.items()}
    kernel.labels |= {(f"{s}{suffix}", name): n + at for (s, name), n in function.labels.items()}
    kernel.labels[f"after{suffix}", f"$after{suffix}"] = at + len(body)
    kernel.tables |= {(f"{s}{suffix}", name): labels for (s, name), labels in function.tables.items()}
    kernel.instructions[at : at + 1] = body


def resolve(kernel: Function) -> None:
    """Branch targets by number, and each register with its type."""
    for instruction in kernel.instructions:
        names = []
        if instruction.parts[0] == "bra":
            names = [instruction.operands[0].name]
        elif instruction.parts[0] == "brx":
            names = in_scope(kernel.tables, instruction.operands[1].name, instruction)
        instruction.targets = tuple(in_scope(kernel.labels, name, instruction) for name in names)
        instruction.operands = tuple(typed(x, kernel.registers) for x in instruction.operands)


def in_scope(declared: dict, name: str, instruction: Instruction):
    """What a name stands for at an instruction: the innermost scope that declares it."""
    for scope in instruction.scope:
        if (scope, name) in declared:
            return declared[scope, name]
    raise Fault("unsupported", f"no label {name}", instruction)


def typed(operand: Operand, registers: dict[str, str]) -> Operand:
    if isinstance(operand, Register):
        return Register(operand.name, registers.get(operand.name.lstrip("!"), operand.type))
    if isinstance(operand, Address):
        return Address(typed(operand.base, registers), operand.offset)
    if isinstance(operand, Group):
        return Group(tuple(typed(x, registers) for x in operand.items))
    return operand
