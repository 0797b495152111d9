"""Pointer provenance: the tensors of a launch that an address may derive from, by static analysis of the kernel.

The provenance of a value is a set of alternatives: a pointer to a tensor (the name of the parameter or variable that
holds it), the address of such a parameter ("&" and its name), another integer (INTEGER), or anything (UNKNOWN: loaded
from memory). A sum combines every pair of alternatives; a pointer plus an integer is a pointer. All definitions of a
register count, so the analysis is conservative: it never names too few tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .program import Program
from .syntax import Address, Group, Immediate, Instruction, Operand, Register, Symbol, split_vector

Provenance = frozenset  # of names
INTEGER, UNKNOWN = "integer", "unknown"
ONLY_INTEGER, ONLY_UNKNOWN = Provenance([INTEGER]), Provenance([UNKNOWN])
SUMS = ("add", "sub", "mad", "or", "xor", "and", "lop3", "prmt", "bfi", "shl", "shr", "addc", "subc", "madc")
COPIES = ("mov", "cvta", "cvt", "shfl")
CHOICES = ("selp", "min", "max")
PRODUCTS = ("mul", "div", "rem", "popc", "clz", "bfind", "setp", "set", "vote", "elect", "activemask")
ACCESSES = ("ld", "ldu", "st", "atom", "red", "cp")


def infer_provenance(program: Program, parameters: Iterable[str]) -> None:
    """Sets `provenance` of each access. parameters: those that hold the address of a tensor or its tensor map."""
    if program.provenance_parameters == frozenset(parameters):
        return
    program.provenance_parameters = frozenset(parameters)
    # A symbol is the address of a parameter, or of a variable, which is a tensor of its own.
    pointers = {name: f"&{name}" for name in parameters} | {
        extent.name: extent.name for extent, _ in program.constant_data
    }
    declared = program.function.registers
    values = {name: ONLY_INTEGER for names in program.uses for name in names if name not in declared}  # %tid.x …
    rules = [rule for i in program.instructions if (rule := make_rule(i, pointers, values))]
    while sum([rule() for rule in rules]):
        pass
    for instruction in program.instructions:
        if instruction.parts[0] in ACCESSES:
            instruction.provenance = find_access_provenance(instruction, pointers, values)


def find_access_provenance(
    instruction: Instruction, pointers: dict[str, str], values: dict[str, Provenance]
) -> Provenance | None:
    """The tensors that an instruction may access; None: any."""
    addresses = [x.base for x in instruction.operands if isinstance(x, Address)]
    maps = [x.items[0] for x in instruction.operands if isinstance(x, Group) and isinstance(x.items[0], Address)]
    known = [find_operand_provenance(x, pointers, values) or ONLY_UNKNOWN for x in addresses]
    if maps:  # of a bulk copy
        known = [dereference([find_operand_provenance(x.base, pointers, values) or ONLY_UNKNOWN]) for x in maps]
    found = Provenance().union(*known) - ONLY_INTEGER
    return found if found and UNKNOWN not in found else None


def make_rule(instruction: Instruction, pointers: dict[str, str], values: dict[str, Provenance]) -> Callable | None:
    """A function that propagates provenance from the operands to the results; it returns whether these changed."""
    operands = instruction.operands
    if not operands or instruction.parts[0] in ("st", "red", "bra", "brx", "bar", "barrier", "call"):
        return None
    results = [x.name for x in split_vector(operands[0]) if isinstance(x, Register)]
    combine, sources = choose_rule(instruction)

    def propagate() -> bool:
        known = [find_operand_provenance(x, pointers, values) for x in sources]
        if None in known:
            return False  # defined later in the text
        found, news = combine(known), False
        for name in results:
            before = values.get(name, Provenance())
            news |= not found <= before
            values[name] = before | found
        return news

    return propagate


def choose_rule(instruction: Instruction) -> tuple[Callable, list[Operand]]:
    """(function of the operands' provenance, those operands)."""
    base, operands = instruction.parts[0], instruction.operands
    sources = [y for x in operands[1:] for y in split_vector(x)]
    if base == "ld" and "param" in instruction.parts:
        return dereference, [sources[0].base if sources[0].offset == 0 else Immediate(0)]
    if base in COPIES:
        return (take_first if len(sources) == 1 or base == "shfl" else add), sources[:1] if base == "shfl" else sources
    if base in ("mad", "madc"):
        return take_first, sources[2:]
    if base in CHOICES:
        return unite, sources[:2]
    if base in SUMS:
        return add, sources
    return (lambda _: ONLY_INTEGER if base in PRODUCTS else ONLY_UNKNOWN), []


def find_operand_provenance(
    operand: Operand, pointers: dict[str, str], values: dict[str, Provenance]
) -> Provenance | None:
    """None: not yet known."""
    if isinstance(operand, Symbol):
        return Provenance([pointers[operand.name]]) if operand.name in pointers else ONLY_INTEGER
    if isinstance(operand, Immediate):
        return ONLY_INTEGER
    return values.get(operand.name.lstrip("!")) if isinstance(operand, Register) else ONLY_UNKNOWN


def take_first(known: list[Provenance]) -> Provenance:
    return known[0]


def dereference(known: list[Provenance]) -> Provenance:
    """The values of the parameters at an address."""
    return Provenance(x[1:] if x.startswith("&") else UNKNOWN for x in known[0])


def unite(known: list[Provenance]) -> Provenance:
    return Provenance().union(*known)


def add(known: list[Provenance]) -> Provenance:
    """Combines every pair of alternatives; a pointer wins over an integer and over an unknown value."""
    result = ONLY_INTEGER
    for other in (Provenance(UNKNOWN if x.startswith("&") else x for x in each) for each in known):
        if result != ONLY_INTEGER and other != ONLY_INTEGER:
            result = Provenance().union(*(add_pair(a, b) for a in result for b in other))
        elif result == ONLY_INTEGER:
            result = other
    return result


def add_pair(a: str, b: str) -> set[str]:
    if a == INTEGER or (a == UNKNOWN and b != INTEGER):
        return {b}
    return {a} if b in (INTEGER, UNKNOWN) else {a, b}
