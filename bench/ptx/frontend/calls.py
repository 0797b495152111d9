"""Inlines calls and resolves labels."""

from __future__ import annotations

from dataclasses import replace

from ..faults import Fault
from .syntax import Address, Function, Group, Instruction, Operand, Register, Symbol


def rename_registers(operand: Operand, names: dict[str, str]) -> Operand:
    if isinstance(operand, Register):
        negated = operand.name.startswith("!")
        name = operand.name[negated:]
        return Register("!" * negated + names.get(name, name), operand.type)
    if isinstance(operand, Symbol):
        return Symbol(names.get(operand.name, operand.name))
    if isinstance(operand, Address):
        return Address(rename_registers(operand.base, names), operand.offset)
    if isinstance(operand, Group):
        return Group(tuple(rename_registers(x, names) for x in operand.items))
    return operand


def inline_calls(kernel: Function, functions: dict[str, Function]) -> None:
    """Replaces each call of a function of the module by its instructions. Its parameters are the caller's variables.

    Calls of external functions such as `__assertfail` stay (`instructions/external_calls.py`)."""
    calls = 0
    while True:
        at = next((i for i, x in enumerate(kernel.instructions) if find_callee(x) in functions), None)
        if at is None:
            return
        calls += 1
        inline_call(kernel, at, functions[find_callee(kernel.instructions[at])], f"#{calls}")


def find_callee(instruction: Instruction) -> str | None:
    """The name of a called function: `call (results), name, (arguments)` or `call name, (arguments)`."""
    if instruction.parts[0] != "call":
        return None
    return next(x.name for x in instruction.operands if not isinstance(x, Group))


def find_call_arguments(call: Instruction, returns: bool) -> tuple[list[str], list[str]]:
    """(results, arguments) of a call: names of the caller's variables."""
    lists = [[x.name for x in operand.items] for operand in call.operands if isinstance(operand, Group)]
    results = lists.pop(0) if returns else []
    return results, lists[0] if lists else []


def inline_call(kernel: Function, at: int, function: Function, suffix: str) -> None:
    call = kernel.instructions[at]
    results, given = find_call_arguments(call, bool(function.returns))
    names = {name: name + suffix for name in function.registers}
    kernel.registers.update({names[name]: kind for name, kind in function.registers.items()})
    names |= {x.name: actual for x, actual in zip(function.returns + function.params, results + given, strict=True)}
    for variable in function.variables.values():
        kernel.variables[variable.name] = variable
    body = []
    for old in function.instructions:
        new = replace(
            old,
            operands=tuple(rename_registers(x, names) for x in old.operands),
            guard=None if old.guard is None else rename_registers(old.guard, names),
            location=call.location,
            scopes=tuple(f"{s}{suffix}" for s in old.scopes),
        )
        if old.parts[0] == "ret":
            new.op, new.parts, new.operands = "bra.uni", ("bra", "uni"), (Symbol(f"$after{suffix}"),)
            new.scopes = (f"after{suffix}",)
        body.append(new)
    grown = len(body) - 1
    kernel.labels = {key: n + grown * (n > at) for key, n in kernel.labels.items()}
    kernel.labels |= {(f"{s}{suffix}", name): n + at for (s, name), n in function.labels.items()}
    kernel.labels[f"after{suffix}", f"$after{suffix}"] = at + len(body)
    kernel.tables |= {(f"{s}{suffix}", name): labels for (s, name), labels in function.tables.items()}
    kernel.instructions[at : at + 1] = body


def resolve_names(kernel: Function) -> None:
    """Sets the branch targets, as instruction numbers, and the type of each register."""
    for instruction in kernel.instructions:
        names = []
        if instruction.parts[0] == "bra":
            names = [instruction.operands[0].name]
        elif instruction.parts[0] == "brx":
            names = look_up(kernel.tables, instruction.operands[1].name, instruction)
        instruction.targets = tuple(look_up(kernel.labels, name, instruction) for name in names)
        instruction.operands = tuple(assign_types(x, kernel.registers) for x in instruction.operands)


def look_up(declared: dict, name: str, instruction: Instruction):
    """The declaration of a name in the innermost scope of an instruction that has one."""
    for scopes in instruction.scopes:
        if (scopes, name) in declared:
            return declared[scopes, name]
    raise Fault("unsupported", f"no label {name}", instruction)


def assign_types(operand: Operand, registers: dict[str, str]) -> Operand:
    if isinstance(operand, Register):
        return Register(operand.name, registers.get(operand.name.lstrip("!"), operand.type))
    if isinstance(operand, Address):
        return Address(assign_types(operand.base, registers), operand.offset)
    if isinstance(operand, Group):
        return Group(tuple(assign_types(x, registers) for x in operand.items))
    return operand
