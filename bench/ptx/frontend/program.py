"""A kernel ready to execute: each instruction a function of (unit, mask), its operands slots of the register file.

A slot is one register viewed as one type; a unit allocates the arrays. `mask` is None where every lane of the unit is
active. The modules of `instructions/` register their builders with `@implements`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..faults import Fault
from ..memory.extents import TensorExtent
from .syntax import Address, Function, Group, Immediate, Instruction, Module, Operand, Register, Symbol, split_vector
from .types import BYTES, UNSIGNED

# Generic addresses of the other state spaces begin here: no tensor has such addresses.
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 1 << 61, 1 << 62


Step = Callable  # (unit, mask) -> None
Control = Callable  # (unit, pc, mask) -> None: enqueues each lane at its next instruction
BUILDERS: dict[str, Callable] = {}
CONTROLS: dict[str, Callable] = {}


def implements(*names: str, control: bool = False) -> Callable:
    def register(builder: Callable) -> Callable:
        (CONTROLS if control else BUILDERS).update(dict.fromkeys(names, builder))
        return builder

    return register


class Slot(NamedTuple):
    register: str
    dtype: type


class Program:
    def __init__(self, function: Function, module: Module, shared_bytes: int = 0):
        self.function = function
        self.instructions = function.instructions
        self.slots: dict[Slot, int] = {}
        self.constants: dict[int, object] = {}
        self.specials: dict[int, str] = {}
        self.size = 0  # slots
        self.place_variables({**module.variables, **function.variables}, shared_bytes)
        self.choose_grains()
        self.uses = [find_registers(i) for i in self.instructions]
        self.targets = {target for i in self.instructions for target in i.targets}
        self.check_pending_use: Callable | None = None  # (unit, instruction, registers, mask), while a wgmma runs
        self.controls: dict[int, Control] = {}
        self.steps: list[Step | None] = []
        for number, instruction in enumerate(self.instructions):
            control = CONTROLS.get(instruction.parts[0]) or CONTROLS.get(".".join(instruction.parts[:2]))
            if control is not None:
                self.controls[number] = control(self, instruction)
                self.steps.append(None)
            else:
                self.steps.append(self.build_step(instruction))
        self.block_ends = self.find_block_ends()
        together = {n: count_converged_lanes(i) for n, i in enumerate(self.instructions)}
        self.convergent = {n: lanes for n, lanes in together.items() if lanes > 1}
        self.provenance_parameters: frozenset[str] | None = None  # of Instruction.provenance
        self.has_wgmma = any(i.parts[0] == "wgmma" for i in self.instructions)

    @functools.cached_property
    def definitions(self) -> dict[str, list[Instruction]]:
        """The instructions that write each register."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for name in find_results(instruction):
                found.setdefault(name, []).append(instruction)
        return found

    # -------------------------------------------------------------------------------------------- layout

    def place_variables(self, variables: dict, shared_bytes: int) -> None:
        """Assigns addresses: shared and local variables from 0, parameters of calls after the kernel's own, global
        variables where NumPy allocates them."""
        self.addresses: dict[str, int] = {}
        self.constant_data: list[tuple[TensorExtent, np.ndarray]] = []
        self.local_bytes = shared = 0
        self.param_bytes = self.function.param_bytes
        for v in sorted(variables.values(), key=lambda v: v.size == 0):  # dynamic shared memory comes last
            if v.space == "shared":
                shared = -(-shared // v.align) * v.align
                self.addresses[v.name] = shared
                shared += v.size
            elif v.space == "local":
                self.addresses[v.name] = self.local_bytes = -(-self.local_bytes // v.align) * v.align
                self.local_bytes += v.size
            elif v.space == "param":
                self.addresses[v.name] = self.param_bytes = -(-self.param_bytes // v.align) * v.align
                self.param_bytes += v.size
            else:
                data = np.zeros(v.size + 16, np.uint8)
                start = -(-data.ctypes.data // 16) * 16
                data[start - data.ctypes.data :][: v.size] = np.frombuffer(v.data, np.uint8)
                self.addresses[v.name] = start
                self.constant_data.append(
                    (TensorExtent(v.name, start, start + v.size, f"{v.size} bytes", parameter=v.name), data)
                )
        self.shared_bytes = shared + shared_bytes

    def choose_grains(self) -> None:
        """Sets the grain of each state space, the unit of its bookkeeping: its smallest access."""
        self.shared_grain = self.global_grain = 16
        for i in self.instructions:
            if i.parts[0] in ("ld", "st", "atom", "red") and "param" not in i.parts and "local" not in i.parts:
                size = BYTES[i.type]
                if "shared" in i.parts or "shared::cta" in i.parts or "global" not in i.parts:
                    self.shared_grain = min(self.shared_grain, size)
                if "shared" not in i.parts:
                    self.global_grain = min(self.global_grain, size)
            if i.op.startswith(("cp.async.ca", "cp.async.cg")):
                size = i.operands[2].bits if isinstance(i.operands[2], Immediate) else 4
                self.shared_grain, self.global_grain = min(self.shared_grain, size), min(self.global_grain, 4)
            if i.parts[0] in ("mbarrier", "tensormap"):
                self.shared_grain = min(self.shared_grain, 4 if i.parts[0] == "tensormap" else 8)

    def find_block_ends(self) -> list[int]:
        """For each instruction the end of its basic block: the next control instruction or branch target."""
        ends, end = [0] * len(self.steps), len(self.steps)
        for n in range(len(self.steps) - 1, -1, -1):
            if n in self.controls:
                end = n
            ends[n] = end
            if n in self.targets:
                end = n
        return ends

    # -------------------------------------------------------------------------------------------- operands

    def make_constant_slot(self, value) -> int:
        self.constants[self.size] = value
        self.size += 1
        return self.size - 1

    def make_register_slot(self, register: Register, dtype: type) -> int:
        key = Slot(register.name, dtype)
        if key not in self.slots:
            self.slots[key] = self.size
            self.size += 1
        return self.slots[key]

    def make_source_slot(self, operand: Operand, dtype: type) -> int:
        """The slot of a source operand that is read as `dtype`."""
        if isinstance(operand, Immediate):
            return self.make_constant_slot(convert_immediate(operand, dtype))
        if isinstance(operand, Symbol):
            return self.make_constant_slot(dtype(self.find_symbol_address(operand)))
        if (
            isinstance(operand, Register)
            and operand.name.startswith("%")
            and operand.name not in self.function.registers
        ):
            self.specials[self.size] = operand.name
            self.size += 1
            return self.size - 1
        if not isinstance(operand, Register) or operand.name.startswith("!") or not operand.type:
            raise Fault("unknown instruction", f"operand {operand}")
        return self.make_register_slot(operand, dtype)

    def make_dest_slot(self, operand: Operand, dtype: type) -> int | None:
        """The slot of a destination; None for `_`. A narrower result is sign- or zero-extended to the register."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return None
        width = BYTES[operand.type]
        if np.dtype(dtype).itemsize < width:
            dtype = np.dtype(f"{'i' if np.issubdtype(dtype, np.signedinteger) else 'u'}{width}").type
        return self.make_register_slot(operand, dtype)

    def find_symbol_address(self, symbol: Symbol) -> int:
        if symbol.name in self.addresses:
            return self.addresses[symbol.name]
        for param in self.function.params:
            if param.name == symbol.name:
                return param.offset
        raise Fault("unknown instruction", f"no variable {symbol.name}")

    def make_address_getter(self, operand: Address) -> Callable:
        """A function of the unit: the address of each lane, int64 for 32-bit and uint64 for 64-bit registers."""
        offset = operand.offset
        if isinstance(operand.base, Register):
            wide = BYTES[operand.base.type] == 8
            slot = self.make_source_slot(operand.base, np.uint64 if wide else np.uint32)
            if wide:
                add = np.uint64(offset % (1 << 64))
                return lambda unit: unit.slots[slot] + add
            return lambda unit: unit.slots[slot].astype(np.int64) + offset
        base = operand.base.bits if isinstance(operand.base, Immediate) else self.find_symbol_address(operand.base)
        return lambda unit: np.full(unit.count, base + offset, np.int64)

    # -------------------------------------------------------------------------------------------- steps

    def build_step(self, instruction: Instruction) -> Step:
        builder = next((b for n in (3, 2, 1) if (b := BUILDERS.get(".".join(instruction.parts[:n])))), None)
        try:
            run = builder(self, instruction) if builder else None
        except Fault as fault:
            raise Fault(fault.kind, fault.message, instruction, kernel=self.function.name) from None
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise Fault(
                "unknown instruction", f"{instruction.op}: unsupported form ({error!r})", instruction,
                kernel=self.function.name,
            ) from error  # fmt: skip
        if run is None:
            raise Fault("unknown instruction", instruction.op, instruction, kernel=self.function.name)
        return (
            run
            if instruction.guard is None
            else apply_guard(run, self.make_register_slot(instruction.guard, np.bool_), instruction)
        )


def assign(compute: Callable, operands: list[int], out: list[int | None], many: bool) -> Step:
    """slots[out] = compute(slots[operands]) where the mask is true."""
    if many:

        def run(unit, mask):
            slots = unit.slots
            values = compute(*[slots[i] for i in operands])
            for where, value in zip(out, values, strict=False):
                if where is not None:
                    write_masked(slots[where], value, mask)

    else:
        (result,) = out

        def run(unit, mask):
            slots = unit.slots
            write_masked(slots[result], compute(*[slots[i] for i in operands]), mask)

    return run


def write_masked(target: np.ndarray, value, mask: np.ndarray | None) -> None:
    if mask is None:
        target[...] = value
    else:
        np.copyto(target, value, where=mask, casting="unsafe")


def apply_guard(run: Step, guard: int, instruction: Instruction) -> Step:
    """@p and @!p: only in the lanes whose guard predicate is true."""
    negated = instruction.negated

    def run_guarded(unit, mask):
        p = unit.slots[guard]
        p = ~p if negated else p
        active = p if mask is None else p & mask
        if active.all():
            run(unit, None)
        elif active.any():
            run(unit, active.copy())  # the instruction may overwrite its own guard

    return run_guarded


def convert_immediate(operand: Immediate, dtype: type):
    if dtype is np.bool_:
        return np.bool_(operand.bits != 0)
    width = np.dtype(dtype).itemsize
    if operand.floating == 8 and width == 4:  # a decimal literal as float32
        number = np.uint64(operand.bits).view(np.float64)
        return np.float32(number).view(dtype) if dtype is not np.float32 else np.float32(number)
    return UNSIGNED[width](operand.bits % (1 << 8 * width)).view(dtype)


def find_registers(instruction: Instruction) -> frozenset[str]:
    """The registers that an instruction reads or writes."""
    found: set[str] = set()

    def visit(operand):
        if isinstance(operand, Register):
            found.add(operand.name.lstrip("!"))
        elif isinstance(operand, Address):
            visit(operand.base)
        elif isinstance(operand, Group):
            for item in operand.items:
                visit(item)

    for operand in instruction.operands:
        visit(operand)
    if instruction.guard is not None:
        visit(instruction.guard)
    return frozenset(found)


def find_results(instruction: Instruction) -> frozenset[str]:
    """The registers that an instruction writes."""
    if not instruction.operands or instruction.parts[0] in ("st", "bar", "bra", "red", "stmatrix", "call"):
        return frozenset()
    return frozenset(x.name for x in split_vector(instruction.operands[0]) if isinstance(x, Register))


def count_converged_lanes(instruction: Instruction) -> int:
    """How many lanes execute an instruction convergently: 1, a warp, or the warp group of a wgmma."""
    if instruction.parts[0] in ("mbarrier", "cp", "fence", "membar", "tensormap"):
        return 1
    if instruction.parts[:2] == ("wgmma", "mma_async"):
        return 128
    return 32 if "sync" in instruction.parts or "aligned" in instruction.parts else 1


# ------------------------------------------------------------------------------------------------ control


def guard_mask(program: Program, instruction: Instruction):
    """A function of (unit, mask): the lanes of the mask whose guard predicate is true."""
    if instruction.guard is None:
        return lambda unit, mask: mask
    slot, negated = program.make_register_slot(instruction.guard, np.bool_), instruction.negated
    return lambda unit, mask: mask & (~unit.slots[slot] if negated else unit.slots[slot])


def encode_immediate(operand) -> int:
    if not isinstance(operand, Immediate):
        raise Fault("unknown instruction", f"{operand} where a constant is expected")
    return operand.bits
