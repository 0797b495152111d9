"""Parses PTX text: for each kernel one flat list of instructions, with calls inlined.

PTX ISA 8.7, chapters 4 (syntax) and 5 (state spaces). Names that an inner scope declares again are made unique; each
instruction keeps its PTX line and the Python line of the compiler's `.loc`.
"""

from __future__ import annotations

import bisect
import functools
import re
import struct
from collections.abc import Callable

from ..faults import Fault
from .calls import inline_calls, resolve_names
from .syntax import (
    Address,
    Function,
    Group,
    Immediate,
    Instruction,
    Location,
    Module,
    Operand,
    Param,
    Register,
    Symbol,
    Variable,
)
from .types import BYTES

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


def parse(text: str, map_path: Callable[[str], str] = str) -> Module:
    """The module of a PTX text. map_path: from the path of a source file in the text to the one to show.

    >>> module = parse('''.target sm_80
    ... .visible .entry add(.param .u64 add_param_0)
    ... { .reg .b32 %r<3>; add.s32 %r1, %r2, 7; ret; }''')
    >>> [i.op for i in module.kernels["add"].instructions]
    ['add.s32', 'ret']
    """
    return Parser(text, map_path).parse_module()


class Parser:
    def __init__(self, text: str, map_path: Callable[[str], str] = str):
        files = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)
        self.files = {number: map_path(path) for number, path in files}
        section = text.find(".section")  # debug information: its braces are no scopes
        self.original = text if section < 0 else text[:section]
        self.names = {path.rsplit("/", 1)[-1]: path for path in self.files.values()}
        self.text = COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), self.original)
        self.newlines = [m.start() for m in re.finditer("\n", self.text)]
        self.position = 0
        self.next_scope = 0
        self.locations: dict[tuple[str, str, str], Location | None] = {}  # (file, line, column) of a .loc
        self.used_bytes: int | None = None  # of the next instruction

    # -------------------------------------------------------------------------------------------- text

    def skip_space(self) -> None:
        while self.position < len(self.text) and (
            self.text[self.position].isspace() or self.text[self.position] == ";"
        ):
            self.position += 1

    def read_until(self, *ends: str) -> str:
        """The text up to the first of these characters, which is skipped."""
        found = [x for x in (self.text.find(end, self.position) for end in ends) if x >= 0]
        end = min(found, default=len(self.text))
        piece, self.position = self.text[self.position : end], end + 1
        return piece.strip()

    def line_number(self) -> int:
        return bisect.bisect_left(self.newlines, self.position) + 1

    def make_fault(self, message: str) -> Fault:
        return Fault("unsupported", f"PTX line {self.line_number()}: {message}")

    # -------------------------------------------------------------------------------------------- module

    def parse_module(self) -> Module:
        target = re.search(r"\.target\s+(\w+)", self.text)
        module = Module(target.group(1) if target else "", {}, {}, {})
        while True:
            self.skip_space()
            if self.position >= len(self.text):
                break
            rest = self.text[self.position : self.position + 200]
            if HEADER.match(rest):
                self.parse_function(module)
            elif VARIABLE.match(rest):
                variable = self.parse_variable(self.read_until(";"))
                module.variables[variable.name] = variable
            elif DIRECTIVE.match(rest):
                self.read_until("\n", ";")
            else:
                raise self.make_fault(f"cannot read {rest.splitlines()[0]!r}")
        for kernel in module.kernels.values():
            inline_calls(kernel, module.functions)
            resolve_names(kernel)
        return module

    def parse_variable(self, text: str) -> Variable:
        space, align, kind, name, count, value = VARIABLE.match(text).groups()
        size = BYTES[kind] * (int(count or 0) if "[" in text.split("=")[0] else 1)
        data = b""
        if value:
            numbers = [int(x, 0) for x in re.findall(r"-?(?:0x[0-9a-fA-F]+|\d+)", value)]
            data = b"".join((x % (1 << 8 * BYTES[kind])).to_bytes(BYTES[kind], "little") for x in numbers)
        return Variable(name, space, int(align or BYTES[kind]), size, data.ljust(size, b"\0"))

    def parse_params(self, text: str) -> list[Param]:
        found, offset = [], 0
        for piece in filter(None, (p.strip() for p in text.split(","))):
            match = PARAM.match(piece)
            if match is None:
                raise self.make_fault(f"cannot read the parameter {piece!r}")
            align, kind, name, count = match.groups()
            size = BYTES[kind] * int(count or 1)
            align = int(align or BYTES[kind]) if count else BYTES[kind]
            offset = -(-offset // align) * align
            found.append(Param(name, kind, offset, size))
            offset += size
        return found

    def parse_function(self, module: Module) -> None:
        head_end = min(x for x in (self.text.find("{", self.position), self.text.find(";", self.position)) if x >= 0)
        head = self.text[self.position : head_end]
        kind, name, returns, params = re.match(
            r".*?\.(entry|func)\s*(?:\(([^)]*)\))?\s*([\w$]+)\s*(?:\(([^)]*)\))?", head, re.S
        ).group(1, 3, 2, 4)
        declared = self.text[head_end] == ";"
        self.position = head_end + 1
        if declared:
            return
        function = Function(name, self.parse_params(params or ""), self.parse_params(returns or ""))
        self.parse_body(function)
        (module.kernels if kind == "entry" else module.functions)[name] = function

    # -------------------------------------------------------------------------------------------- body

    def parse_body(self, function: Function) -> None:
        scopes: list[tuple[int, dict[str, Register | Symbol]]] = []  # (number, what each name refers to)
        location = None

        def open_scope():
            self.next_scope += 1
            scopes.append((self.next_scope, {}))

        open_scope()
        while scopes:
            self.skip_space()
            start = self.text[self.position]
            if start == "{":
                open_scope()
                self.position += 1
            elif start == "}":
                scopes.pop()
                self.position += 1
            elif LOC.match(self.original, self.position):
                location = self.parse_location() or location
            elif start == ".":
                self.parse_declaration(self.read_until(";"), function, scopes)
            elif table := TABLE.match(self.text, self.position):
                function.tables[scopes[-1][0], table.group(1)] = [x.strip() for x in table.group(2).split(",")]
                self.position = table.end()
            elif label := LABEL.match(self.text, self.position):
                function.labels[scopes[-1][0], label.group(1)] = len(function.instructions)
                self.position = label.end()
            else:
                line = self.line_number()
                function.instructions.append(self.parse_instruction(self.read_until(";"), line, location, scopes))

    def parse_location(self) -> Location | None:
        """`.loc 3 87 23 // tiles.py:87:23 @[ forward.py:34:72 @[ … ] ]`, with the callers in the comment. Since
        Triton 3.8 `.loc 3 87 23, function_name …, inlined_at 1 34 72`, and `.loc 1 34 72` comes before it."""
        match = LOC.match(self.original, self.position)
        self.position = self.original.find("\n", self.position)
        *place, options, comment = match.groups()
        chain = re.findall(r"([^\s@\[\]:]+):(\d+):\d+", comment or "")
        if not chain:
            chain = [(self.files.get(place[0], "?"), place[1])]
        if chain[0][1] == "0":
            return None  # belongs to no line: keep the line before
        inlined = INLINED.search(options)
        found = self.locations.get(inlined.groups()) if inlined else None
        for name, line in reversed(chain):
            found = Location(self.names.get(name, name), int(line), found)
        self.locations[tuple(place)] = found
        return found

    def parse_declaration(self, text: str, function: Function, scopes) -> None:
        scope, names = scopes[-1]
        if match := REGISTER.match(text):
            kind, listed = match.groups()
            for name in (x.strip() for x in listed.split(",")):
                many = re.match(r"(.+)<(\d+)>$", name)
                for each in [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]:
                    unique = f"{each}@{scope}" if len(scopes) > 1 else each
                    names[each], function.registers[unique] = Register(unique, ""), kind
        elif match := PARAM.match(text):  # of a call in this function
            align, kind, name, count = match.groups()
            unique, size = f"{name}@{scope}", BYTES[kind] * int(count or 1)
            names[name] = Symbol(unique)
            function.variables[unique] = Variable(unique, "param", int(align or BYTES[kind]), size)
        elif VARIABLE.match(text):
            variable = self.parse_variable(text)
            function.variables[variable.name] = variable
        elif match := USED.match(text):
            self.used_bytes = int(match.group(1), 16)
        elif not DIRECTIVE.match(text):
            raise self.make_fault(f"cannot read {text!r}")

    def parse_instruction(self, text: str, line: int, location: Location | None, scopes) -> Instruction:
        def look_up(name: str) -> Register | Symbol | None:
            return next((names[name] for _, names in reversed(scopes) if name in names), None)

        match = re.match(r"(?:@(!?)\s*([\w$%.]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
        if match is None:
            raise self.make_fault(f"cannot read {text!r}")
        negated, guard, op, rest = match.groups()
        operands = tuple(self.parse_operand(x, look_up) for x in split_operands(rest))
        if "L2::cache_hint" in op:  # a cache policy comes last
            operands = operands[:-1]
        guard = Register(look_up(guard).name if look_up(guard) else guard, "pred") if guard else None
        instruction = Instruction(
            op, tuple(op.split(".")), operands, guard, bool(negated), line, " ".join(text.split()), location
        )
        instruction.scopes = tuple(scope for scope, _ in reversed(scopes))
        instruction.used_bytes, self.used_bytes = self.used_bytes, None
        return instruction

    def parse_operand(self, text: str, look_up) -> Operand:
        text = text.strip()
        if text[0] in "{(":  # a vector, or the lists of a call
            return Group(tuple(self.parse_operand(x, look_up) for x in split_operands(text[1:-1])))
        if text.startswith("["):
            return self.parse_address(text[1:-1].strip(), look_up)
        if "|" in text:  # a result and a predicate: setp p|q, shfl d|p, elect d|p
            return Group(tuple(self.parse_operand(x, look_up) for x in text.split("|")))
        if text[0] in "0123456789+-" and (number := parse_immediate(text)) is not None:
            return number
        negated = text.startswith("!")
        found = look_up(text[1:] if negated else text)
        if found is not None:
            return Register(f"!{found.name}", "") if negated else found
        return Register(text, "u32") if text.startswith("%") else Symbol(text)

    def parse_address(self, text: str, look_up) -> Operand:
        pieces = split_operands(text)
        if len(pieces) > 1:  # [tensor map, {coordinates}]
            return Group((self.parse_address(pieces[0], look_up), self.parse_operand(pieces[1], look_up)))
        base, sign, offset = re.match(r"([\w$%.@]+)\s*(?:([+-])\s*(-?\w+))?$", text).groups()
        distance = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        return Address(self.parse_operand(base, look_up), distance)


def split_operands(text: str) -> list[str]:
    """Splits at the commas outside of braces and brackets."""
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
def parse_immediate(text: str) -> Immediate | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16), 4)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16), 8)
    if re.fullmatch(r"[+-]?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0) if not re.fullmatch(r"0\d+U?", text) else int(text.rstrip("U"), 8))
    if re.fullmatch(r"[+-]?\d+\.\d*(e[+-]?\d+)?", text):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 8)
    return None
