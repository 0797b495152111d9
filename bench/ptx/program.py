"""A kernel made ready to run: each instruction a function of (unit, mask), its operands slots of the register file.

A slot is one register seen as one type; a unit makes the arrays. `mask` is None where every lane of the unit is active.
Modules register the builders of their instructions in BUILDERS with `@builds`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import arithmetic, integers
from .faults import Fault
from .integers import DTYPES
from .syntax import BYTES, Address, Function, Group, Immediate, Instruction, Module, Operand, Register, Symbol
from .tensors import Named

# Where generic addresses of the other spaces begin: no tensor lies there.
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 1 << 61, 1 << 62
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Step = Callable  # (unit, mask) -> None
Control = Callable  # (unit, pc, mask) -> None: says where each lane goes on
BUILDERS: dict[str, Callable] = {}
CONTROLS: dict[str, Callable] = {}


def builds(*names: str, control: bool = False) -> Callable:
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
        self.grains()
        self.uses = [names_of(i) for i in self.instructions]
        self.targets = {target for i in self.instructions for target in i.targets}
        self.controls: dict[int, Control] = {}
        self.steps: list[Step | None] = []
        for number, instruction in enumerate(self.instructions):
            control = CONTROLS.get(instruction.parts[0]) or CONTROLS.get(".".join(instruction.parts[:2]))
            if control is not None:
                self.controls[number] = control(self, instruction)
                self.steps.append(None)
            else:
                self.steps.append(self.step(instruction))
        self.ends = self.block_ends()
        together = {n: lanes_together(i) for n, i in enumerate(self.instructions)}
        self.convergent = {n: lanes for n, lanes in together.items() if lanes > 1}
        self.origins_of: frozenset[str] | None = None  # the parameters that the instructions' origins are told by
        self.careful = any(i.parts[0] == "wgmma" for i in self.instructions)

    @functools.cached_property
    def definitions(self) -> dict[str, list[Instruction]]:
        """Of each register the instructions that write it."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for name in results_of(instruction):
                found.setdefault(name, []).append(instruction)
        return found

    # -------------------------------------------------------------------------------------------- layout

    def place_variables(self, variables: dict, shared_bytes: int) -> None:
        """Addresses of the module's variables: shared and local ones from 0, parameters of calls behind the kernel's
        own, global ones where NumPy put them."""
        self.addresses: dict[str, int] = {}
        self.constant_data: list[tuple[Named, np.ndarray]] = []
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
                    (Named(v.name, start, start + v.size, f"{v.size} bytes", parameter=v.name), data)
                )
        self.shared_bytes = shared + shared_bytes

    def grains(self) -> None:
        """The smallest access to each space: what its bookkeeping counts in."""
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

    def block_ends(self) -> list[int]:
        """For each instruction the next one, from it on, that is control or begins a block of its own."""
        ends, end = [0] * len(self.steps), len(self.steps)
        for n in range(len(self.steps) - 1, -1, -1):
            if n in self.controls:
                end = n
            ends[n] = end
            if n in self.targets:
                end = n
        return ends

    # -------------------------------------------------------------------------------------------- operands

    def constant(self, value) -> int:
        self.constants[self.size] = value
        self.size += 1
        return self.size - 1

    def slot(self, register: Register, dtype: type) -> int:
        key = Slot(register.name, dtype)
        if key not in self.slots:
            self.slots[key] = self.size
            self.size += 1
        return self.slots[key]

    def read(self, operand: Operand, dtype: type) -> int:
        """The slot of an operand that is read as `dtype`."""
        if isinstance(operand, Immediate):
            return self.constant(immediate_value(operand, dtype))
        if isinstance(operand, Symbol):
            return self.constant(dtype(self.address_of(operand)))
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
        return self.slot(operand, dtype)

    def write(self, operand: Operand, dtype: type) -> int | None:
        """The slot of a result; None for `_`. A narrower result is extended to the register by its sign."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return None
        width = BYTES[operand.type]
        if np.dtype(dtype).itemsize < width:
            dtype = np.dtype(f"{'i' if np.issubdtype(dtype, np.signedinteger) else 'u'}{width}").type
        return self.slot(operand, dtype)

    def address_of(self, symbol: Symbol) -> int:
        if symbol.name in self.addresses:
            return self.addresses[symbol.name]
        for param in self.function.params:
            if param.name == symbol.name:
                return param.offset
        raise Fault("unknown instruction", f"no variable {symbol.name}")

    def address(self, operand: Address) -> Callable:
        """A function of the unit: the address of each lane, int64 for 32-bit registers, uint64 for 64."""
        offset = operand.offset
        if isinstance(operand.base, Register):
            wide = BYTES[operand.base.type] == 8
            slot = self.read(operand.base, np.uint64 if wide else np.uint32)
            if wide:
                add = np.uint64(offset % (1 << 64))
                return lambda unit: unit.slots[slot] + add
            return lambda unit: unit.slots[slot].astype(np.int64) + offset
        base = operand.base.bits if isinstance(operand.base, Immediate) else self.address_of(operand.base)
        return lambda unit: np.full(unit.count, base + offset, np.int64)

    # -------------------------------------------------------------------------------------------- steps

    def step(self, instruction: Instruction) -> Step:
        builder = next((b for n in (3, 2, 1) if (b := BUILDERS.get(".".join(instruction.parts[:n])))), None)
        try:
            run = builder(self, instruction) if builder else self.arithmetic(instruction)
        except Fault as fault:
            raise Fault(fault.kind, fault.message, instruction, kernel=self.function.name) from None
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise Fault(
                "unknown instruction", f"{instruction.op}: a form not known ({error!r})", instruction,
                kernel=self.function.name,
            ) from error  # fmt: skip
        if run is None:
            raise Fault("unknown instruction", instruction.op, instruction, kernel=self.function.name)
        return run if instruction.guard is None else guarded(run, self.slot(instruction.guard, np.bool_), instruction)

    def arithmetic(self, instruction: Instruction) -> Step | None:
        known = arithmetic.value(instruction.parts)
        if known is None:
            return None
        first, *rest = instruction.operands
        results = first.items if isinstance(first, Group) else (first,)
        compute = known.compute
        operands = [self.read(x, t) for x, t in zip(rest, known.operands, strict=True)]
        out = [self.write(x, t) for x, t in zip(results, known.results, strict=False)]
        return assign(compute, operands, out, len(known.results) > 1)


def assign(compute: Callable, operands: list[int], out: list[int | None], many: bool) -> Step:
    """slots[out] = compute(slots[operands]), where the mask holds."""
    if many:

        def run(unit, mask):
            slots = unit.slots
            values = compute(*[slots[i] for i in operands])
            for where, value in zip(out, values, strict=False):
                if where is not None:
                    put(slots[where], value, mask)

    else:
        (result,) = out

        def run(unit, mask):
            slots = unit.slots
            put(slots[result], compute(*[slots[i] for i in operands]), mask)

    return run


def put(target: np.ndarray, value, mask: np.ndarray | None) -> None:
    if mask is None:
        target[...] = value
    else:
        np.copyto(target, value, where=mask, casting="unsafe")


def guarded(run: Step, guard: int, instruction: Instruction) -> Step:
    """@p and @!p: the lanes where the predicate holds."""
    negated = instruction.negated

    def masked(unit, mask):
        p = unit.slots[guard]
        p = ~p if negated else p
        active = p if mask is None else p & mask
        if active.all():
            run(unit, None)
        elif active.any():
            run(unit, active.copy())  # the guard may be the instruction's own result

    return masked


def immediate_value(operand: Immediate, dtype: type):
    if dtype is np.bool_:
        return np.bool_(operand.bits != 0)
    width = np.dtype(dtype).itemsize
    if operand.floating == 8 and width == 4:  # a decimal literal for a float32
        number = np.uint64(operand.bits).view(np.float64)
        return np.float32(number).view(dtype) if dtype is not np.float32 else np.float32(number)
    return WORD[width](operand.bits % (1 << 8 * width)).view(dtype)


def names_of(instruction: Instruction) -> frozenset[str]:
    """All registers that an instruction reads or writes."""
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


def results_of(instruction: Instruction) -> frozenset[str]:
    """The registers that it writes."""
    if not instruction.operands or instruction.parts[0] in ("st", "bar", "bra", "red", "stmatrix", "call"):
        return frozenset()
    first = instruction.operands[0]
    return frozenset(x.name for x in (first.items if isinstance(first, Group) else (first,)) if isinstance(x, Register))


def lanes_together(instruction: Instruction) -> int:
    """How many lanes must be there together: those of a warp, or of the four that a wgmma takes."""
    if instruction.parts[0] in ("mbarrier", "cp", "fence", "membar", "tensormap"):
        return 1
    if instruction.parts[:2] == ("wgmma", "mma_async"):
        return 128
    return 32 if "sync" in instruction.parts or "aligned" in instruction.parts else 1


# ------------------------------------------------------------------------------------------------ moves


@builds("mov")
def move(program: Program, instruction: Instruction) -> Step:
    """Also packs and unpacks: mov.b64 {low, high}, x and mov.b64 x, {low, high}."""
    kind = instruction.type
    dtype = DTYPES[kind]
    to, source = instruction.operands
    if isinstance(to, Group):
        part = WORD[BYTES[kind] // len(to.items)]
        value = program.read(source, dtype)
        outs = [program.write(x, part) for x in to.items]

        def unpack(unit, mask):
            whole = np.ascontiguousarray(np.broadcast_to(unit.slots[value], unit.count))
            pieces = whole.view(part).reshape(unit.count, -1)
            for i, out in enumerate(outs):
                if out is not None:
                    put(unit.slots[out], pieces[:, i], mask)

        return unpack
    if isinstance(source, Group):
        part = WORD[BYTES[kind] // len(source.items)]
        values = [program.read(x, part) for x in source.items]
        out = program.write(to, WORD[BYTES[kind]])

        def pack(unit, mask):
            pieces = np.empty((unit.count, len(values)), part)
            for i, value in enumerate(values):
                pieces[:, i] = unit.slots[value]
            put(unit.slots[out], pieces.view(WORD[BYTES[kind]])[:, 0], mask)

        return pack
    if dtype is not np.bool_:
        dtype = WORD[BYTES[kind]]
    return assign(lambda x: x, [program.read(source, dtype)], [program.write(to, dtype)], False)


@builds("cvta")
def convert_address(program: Program, instruction: Instruction) -> Step:
    """Between a space's own addresses and generic ones. Global ones are generic already."""
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
    space = next(p for p in instruction.parts[1:] if p != "to").split("::")[0]
    distance = window.get(space, 0) * (-1 if "to" in instruction.parts else 1)
    step = np.uint64(distance % (1 << 64))
    to, source = instruction.operands
    return assign(
        lambda x: x + step, [program.read(source, np.uint64)], [program.write(to, np.uint64)], False
    )  # fmt: skip


@builds("add.cc", "addc", "sub.cc", "subc", "mad.lo", "mad.hi", "madc")
def carried(program: Program, instruction: Instruction) -> Step | None:
    """Additions with the carry flag in (addc, subc, madc) and out (.cc)."""
    parts, base = instruction.parts, instruction.parts[0]
    takes, gives = base in ("addc", "subc", "madc"), "cc" in parts
    if not (takes or gives):
        return program.arithmetic(instruction)
    dtype = DTYPES[parts[-1]]
    wide = integers.unsigned(dtype)
    size = np.dtype(dtype).itemsize * 8
    operands = [program.read(x, wide) for x in instruction.operands[1:]]
    out = program.write(instruction.operands[0], wide)
    times = integers.multiply_high if "hi" in parts else np.multiply
    if size != 32:
        return None

    def run(unit, mask):
        *factors, last = (np.asarray(unit.slots[i]) for i in operands)
        first = times(*factors) if len(factors) == 2 else factors[0]
        first, last = first.astype(np.int64), last.astype(np.int64)
        carry = unit.carry if takes else 0
        total = first - last - carry if base.startswith("sub") else first + last + carry
        put(unit.slots[out], (total & 0xFFFFFFFF).astype(wide), mask)
        if gives:
            put(unit.carry, (total >> 32) & 1, mask)

    return run
