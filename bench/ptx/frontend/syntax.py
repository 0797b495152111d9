"""The syntax of a PTX module: operands, instructions, functions and their variables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


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
    negated: bool  # whether the guard predicate is negated: @!p
    line: int  # of the PTX text, the first is 1
    text: str
    location: Location | None
    targets: tuple[int, ...] = ()  # of a branch, as instruction numbers
    used_bytes: int | None = None  # of a load: mask of the bytes that the program uses, None: all
    provenance: frozenset[str] | None = None  # parameters that the address derives from, None: any
    scopes: tuple[int, ...] = ()  # innermost first; for resolving labels

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
    """A module or local variable with its initial bytes, zeros by default; size 0 is dynamic shared memory."""

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


def split_vector(operand) -> tuple:
    return operand.items if isinstance(operand, Group) else (operand,)
