"""Triton functions from the graphs that `flashattn/score_mod.py` traced: a score_mod, its derivative, a mask_mod.

A graph computes one score; its Triton function works on a tile, whose scores, positions and intermediate values
broadcast. `EXPRESSIONS` maps PyTorch's operations to Triton; others are refused by name.
"""

from __future__ import annotations

import hashlib
import linecache
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, fx

from ..score_mod import make_example_scalars, run_in_clean_thread, trace_lock
from .scores import BlocksArgs, ModArgs, score_tensor_arg, tanh

if TYPE_CHECKING:
    from ..score_mod import BlockMask, Traced

aten = torch.ops.aten


@triton.jit
def floor_divide(a, b):
    """Towards minus infinity, as Python and PyTorch have it; Triton's // goes towards 0."""
    quotient = a // b
    return quotient - ((quotient * b != a) & ((a < 0) != (b < 0))).to(tl.int32)


@triton.jit
def remainder(a, b):
    return a - floor_divide(a, b) * b


@triton.jit
def true_divide(a, b):
    return a * 1.0 / b


@triton.jit
def wrap_index(index, size):
    """An index from the end, where it is negative."""
    return (index + tl.where(index < 0, size, 0)).to(tl.int64)


@triton.jit
def is_inside(index, size):
    return (index >= -size) & (index < size)


@triton.jit
def power(x, exponent):
    """x ** exponent of two tensors, of any x where the exponent is an integer."""
    odd = tl.abs(exponent * 1.0) % 2 == 1
    magnitude = tl.exp2(exponent * tl.log2(tl.abs(x * 1.0)))
    return tl.where(exponent == 0, 1.0, tl.where((x < 0) & odd, -magnitude, magnitude))


# The names that a generated function may use.
NAMES = dict(tl=tl, tanh=tanh, floor_divide=floor_divide, remainder=remainder, true_divide=true_divide)
NAMES |= dict(wrap_index=wrap_index, is_inside=is_inside, power=power)

EXPRESSIONS = {
    aten.add.Tensor: "({0} + {1})", aten.sub.Tensor: "({0} - {1})", aten.mul.Tensor: "({0} * {1})",
    aten.add.Scalar: "({0} + {1})", aten.sub.Scalar: "({0} - {1})", aten.mul.Scalar: "({0} * {1})",
    aten.rsub.Scalar: "({1} - {0})", aten.neg.default: "(-{0})", aten.abs.default: "tl.abs({0})",
    aten.div.Tensor: "true_divide({0}, {1})", aten.div.Scalar: "true_divide({0}, {1})",
    aten.floor_divide.default: "floor_divide({0}, {1})", aten.floor_divide.Scalar: "floor_divide({0}, {1})",
    aten.remainder.Tensor: "remainder({0}, {1})", aten.remainder.Scalar: "remainder({0}, {1})",
    aten.reciprocal.default: "(1.0 / {0})", aten.square.default: "({0} * {0})",
    aten.exp.default: "tl.exp({0} * 1.0)", aten.exp2.default: "tl.exp2({0} * 1.0)",
    aten.log.default: "tl.log({0} * 1.0)", aten.log2.default: "tl.log2({0} * 1.0)",
    aten.sqrt.default: "tl.sqrt({0} * 1.0)", aten.rsqrt.default: "(1.0 / tl.sqrt({0} * 1.0))",
    aten.sin.default: "tl.sin({0} * 1.0)",
    aten.cos.default: "tl.cos({0} * 1.0)", aten.erf.default: "tl.erf({0} * 1.0)", aten.tanh.default: "tanh({0} * 1.0)",
    aten.sigmoid.default: "tl.sigmoid({0} * 1.0)", aten.floor.default: "tl.floor({0} * 1.0)",
    aten.ceil.default: "tl.ceil({0} * 1.0)", aten.pow.Tensor_Tensor: "power({0}, {1})",
    aten.relu.default: "tl.maximum({0}, 0)", aten.minimum.default: "tl.minimum({0}, {1})",
    aten.maximum.default: "tl.maximum({0}, {1})", aten.clamp_min.default: "tl.maximum({0}, {1})",
    aten.clamp_max.default: "tl.minimum({0}, {1})", aten.where.self: "tl.where({0}, {1}, {2})",
    aten.sign.default: "(({0} > 0).to(tl.float32) - ({0} < 0).to(tl.float32))",
    aten.bitwise_and.Tensor: "({0} & {1})", aten.bitwise_or.Tensor: "({0} | {1})",
    aten.bitwise_xor.Tensor: "({0} ^ {1})", aten.logical_and.default: "(({0} != 0) & ({1} != 0))",
    aten.logical_or.default: "(({0} != 0) | ({1} != 0))", aten.logical_not.default: "({0} == 0)",
    aten.bitwise_not.default: "({0} == 0)",
}  # fmt: skip
for name, sign in dict(eq="==", ne="!=", lt="<", le="<=", gt=">", ge=">=").items():
    for kind in ("Tensor", "Scalar"):
        EXPRESSIONS[getattr(getattr(aten, name), kind)] = f"({{0}} {sign} {{1}})"
PASSTHROUGH = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.clone.default}
CONSTANTS = {aten.zeros.default: 0, aten.zeros_like.default: 0, aten.new_zeros.default: 0}
CONSTANTS |= {aten.ones.default: 1, aten.ones_like.default: 1, aten.new_ones.default: 1}
# The index of the argument with which an operation fills a tensor.
FILLED = {aten.scalar_tensor.default: 0, aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}
TYPES = {torch.float16: "tl.float32", torch.bfloat16: "tl.float32", torch.float32: "tl.float32", torch.bool: "tl.int1"}
TYPES |= {torch.float64: "tl.float32", torch.int32: "tl.int32", torch.int64: "tl.int64"}


class CapturedArg(NamedTuple):
    """A captured tensor inside a kernel."""

    ptr: tl.tensor
    sizes: tuple
    strides: tuple


def captured_args(tensors: tuple[Tensor, ...]) -> tuple[CapturedArg, ...]:
    return tuple(
        CapturedArg(x.view(torch.uint8) if x.dtype == torch.bool else x, tuple(x.shape), tuple(x.stride()))
        for x in tensors
    )


class TritonCodegen(NamedTuple):
    """Writes a graph as a Triton function. Errors call the callable `name`."""

    name: str
    captured: tuple[Tensor, ...]

    def write_source(self, graph: fx.Graph, function: str) -> str:
        """The source of a function of the graph's arguments, with the captured tensors as one tuple."""
        arguments = [n.name for n in graph.nodes if n.op == "placeholder" and find_captured(n) is None]
        lines = [f"def {function}({', '.join(arguments)}, captured):"]
        for node in graph.nodes:
            if node.op == "call_function":
                lines.append(f"    v_{node.name} = {self.write_expression(node)}")
            elif node.op == "output":
                value = node.args[0]
                lines.append(f"    return {self.write_value(value[0] if isinstance(value, (list, tuple)) else value)}")
        return "\n".join(lines) + "\n"

    def write_expression(self, node: fx.Node) -> str:
        """One operation."""
        operation = node.target
        arguments: tuple[Any, ...] = node.args  # the operation's schema says what each is
        options: dict[str, Any] = node.kwargs
        if operation in PASSTHROUGH:
            return self.write_value(arguments[0])
        if operation in CONSTANTS:
            return self.write_constant(CONSTANTS[operation], node.meta["val"].dtype)
        if operation in FILLED:
            return self.write_constant(arguments[FILLED[operation]], node.meta["val"].dtype)
        if operation is aten._to_copy.default:
            value, dtype = self.write_value(arguments[0]), options.get("dtype")
            return value if dtype is None else f"({value}).to({TYPES[dtype]})"
        if operation is aten.index.Tensor:
            return self.write_lookup(*arguments)
        if operation is aten.clamp.default:
            low, high = (*arguments[1:], None)[:2]
            value = self.write_value(arguments[0])
            value = value if low is None else f"tl.maximum({value}, {self.write_value(low)})"
            return value if high is None else f"tl.minimum({value}, {self.write_value(high)})"
        if operation is aten.pow.Tensor_Scalar:
            return self.write_power(*arguments)
        if operation is aten.pow.Scalar:
            return f"tl.exp2({math.log2(arguments[0])} * {self.write_value(arguments[1])})"
        if operation is aten.div.Tensor_mode and options.get("rounding_mode") == "floor":
            return f"floor_divide({self.write_value(arguments[0])}, {self.write_value(arguments[1])})"
        if operation not in EXPRESSIONS or options.get("alpha", 1) != 1:
            raise TypeError(f"{self.name} uses {operation}, which the triton backend cannot generate")
        return EXPRESSIONS[operation].format(*map(self.write_value, arguments))

    def write_constant(self, number: float, dtype: torch.dtype) -> str:
        if dtype == torch.bool:  # not Python's own: a mask must be a tensor
            return f"tl.cast({bool(number)}, tl.int1)"
        return self.write_value(float(number) if dtype.is_floating_point else int(number))

    def write_power(self, base: fx.Node, exponent: float) -> str:
        """x ** n of a number n: by multiplication where n is a small integer."""
        value = self.write_value(base)
        if exponent == int(exponent) and 1 <= abs(exponent) <= 8:
            product = "(" + " * ".join([f"({value} * 1.0)"] * abs(int(exponent))) + ")"
            return product if exponent > 0 else f"(1.0 / {product})"
        return "1.0" if exponent == 0 else f"tl.exp2({float(exponent)} * tl.log2({value} * 1.0))"

    def write_lookup(self, table: fx.Node, indices: list) -> str:
        """One element of a captured tensor. Nothing outside it is read: the indices of a masked pair may be outside."""
        which = find_captured(table)
        if which is None or None in indices or len(indices) != self.captured[which].dim():
            raise TypeError(f"{self.name} must index captured tensors, one number at a time, for the triton backend")
        arg = f"captured[{which}]"
        values = [self.write_value(index) for index in indices]
        offsets = [f"wrap_index({x}, {arg}.sizes[{d}]) * {arg}.strides[{d}]" for d, x in enumerate(values)]
        there = " & ".join(f"is_inside({x}, {arg}.sizes[{d}])" for d, x in enumerate(values))
        # The score of a pair that attends, with indices outside, becomes NaN: a kernel cannot raise.
        other = 'float("nan")' if self.captured[which].is_floating_point() else "0"
        return self.write_load(which, f"{arg}.ptr + {' + '.join(offsets)}, mask={there}, other={other}")

    def write_load(self, which: int, arguments: str) -> str:
        dtype = self.captured[which].dtype
        return f"(tl.load({arguments}) != 0)" if dtype == torch.bool else f"tl.load({arguments}).to({TYPES[dtype]})"

    def write_value(self, value) -> str:
        """A number, an argument or an earlier value."""
        if isinstance(value, fx.Node):
            which = find_captured(value)
            if which is not None:
                return self.write_load(which, f"captured[{which}].ptr")
            return value.name if value.op == "placeholder" else f"v_{value.name}"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        return repr(value)


def find_captured(node: fx.Node) -> int | None:
    """Which captured tensor an argument of a graph is; None if it is none."""
    number = node.name.removeprefix("captured_")
    return int(number) if node.op == "placeholder" and number.isdigit() else None


def list_pair_loads(traced: Traced) -> list[int]:
    """The bytes of each element that a callable loads for every (query, key) pair, by an index that depends on both."""
    if traced.graph not in _pair_loads:
        _pair_loads[traced.graph] = _find_pair_loads(traced)
    return _pair_loads[traced.graph]


_pair_loads: weakref.WeakKeyDictionary[fx.GraphModule, list[int]] = weakref.WeakKeyDictionary()


def _find_pair_loads(traced: Traced) -> list[int]:
    nodes = list(traced.graph.graph.nodes)
    *before, query, key = (n for n in nodes if n.op == "placeholder" and find_captured(n) is None)
    depends: dict[fx.Node, set[str]] = {query: {"query"}, key: {"key"}}
    if len(before) == 3:  # the score, before batch and head
        depends[before[0]] = {"query", "key"}
    loads = []
    for node in nodes:
        depends.setdefault(node, set()).update(*(depends[n] for n in node.all_input_nodes))
        if node.target is aten.index.Tensor and len(depends[node]) == 2:
            which = find_captured(node.args[0])  # None is refused when the function is generated
            loads += [] if which is None else [traced.captured[which].element_size()]
    return loads


_functions: dict[str, triton.JITFunction] = {}


def jit(name: str, graph: fx.Graph, captured: tuple[Tensor, ...]) -> triton.JITFunction:
    """A graph as a Triton function; the same source is compiled once. The name contains the source's hash, since the
    compiler takes two functions with one name and the same types of arguments for one."""
    code = TritonCodegen(name, captured).write_source(graph, "FUNCTION")
    function = f"{name.replace('.', '_')}_{hashlib.sha256(code.encode()).hexdigest()[:12]}"
    code = code.replace("FUNCTION", function, 1)
    if code not in _functions:
        file = f"<flashattn {function}>"
        linecache.cache[file] = (len(code), None, code.splitlines(True), file)  # Triton reads a function's source
        namespace = dict(NAMES, __name__=__name__)
        exec(compile(code, file, "exec"), namespace)
        _functions[code] = triton.jit(namespace[function])
    return _functions[code]


_mods: weakref.WeakKeyDictionary[fx.GraphModule, tuple[triton.JITFunction, triton.JITFunction]]
_mods = weakref.WeakKeyDictionary()  # a score_mod and its derivative


def mod_arg(mod: Traced | None) -> ModArgs | None:
    """A score_mod as an argument of a kernel."""
    if mod is None:
        return None
    with trace_lock:
        if mod.graph not in _mods:
            graphs = mod.graph.graph, run_in_clean_thread(derive, mod.graph, mod.captured)
            value, dscore = (jit("score_mod", graph, mod.captured) for graph in graphs)
            _mods[mod.graph] = value, dscore
    return ModArgs(*_mods[mod.graph], captured_args(mod.captured))


_mod_tangents: weakref.WeakKeyDictionary[fx.GraphModule, dict[tuple, triton.JITFunction]]
_mod_tangents = weakref.WeakKeyDictionary()  # the tangents of a score_mod and of its derivative


def mod_tangent_args(mod: Traced | None, tangents: tuple[Tensor | None, ...], with_dscore: bool) -> dict:
    """The fields of TangentArgs for a score_mod, whose captured tensors have these tangents."""
    if mod is None:
        return dict(captured=None, mod_value=None, mod_dscore=None)
    given = tuple(n for n, x in enumerate(tangents) if x is not None)
    captured = mod.captured + tuple(x for x in tangents if x is not None)

    def generate(of_dscore: bool) -> triton.JITFunction:
        functions, key = _mod_tangents.setdefault(mod.graph, {}), (given, of_dscore)
        if key not in functions:
            graph = run_in_clean_thread(derive_tangent, mod.graph, mod.captured, given, of_dscore)
            functions[key] = jit("score_mod", graph, captured)
        return functions[key]

    with trace_lock:
        value, dscore = generate(False), generate(True) if with_dscore else None
    return dict(captured=captured_args(captured), mod_value=value, mod_dscore=dscore)


def blocks_arg(block_mask: BlockMask | None) -> BlocksArgs | None:
    """A block mask as an argument of a kernel. Its states are 0, 1 and 2: `scores.BLOCK_SKIP` and so on."""
    if block_mask is None:
        return None
    mask = block_mask.mask
    states = block_mask.partial.to(torch.uint8) + 2 * block_mask.full.to(torch.uint8)
    function = jit("block_mask.mask_mod", mask.graph.graph, mask.captured)
    return BlocksArgs(
        captured_args(mask.captured), score_tensor_arg(states), block_mask.block_q, block_mask.block_k, function
    )


def derive(graph: fx.GraphModule, captured: tuple[Tensor, ...]) -> fx.Graph:
    """The graph of a score_mod's derivative by the score."""

    def dscore(score, *others):
        with torch.enable_grad():
            return differentiate(graph, score.detach().requires_grad_(), *others)

    return trace_numbers(dscore, list_arguments(graph), captured)


def derive_tangent(
    graph: fx.GraphModule, captured: tuple[Tensor, ...], given: tuple[int, ...], of_dscore: bool
) -> fx.Graph:
    """The graph of the tangent of a score_mod, or of its derivative by the score. Its arguments are those of the
    score_mod with the score's tangent after the positions and, at the end, the tangents of the captured tensors
    `given`. The gradients are linear in that of the result, and their derivative by it is the tangent: reverse mode
    twice, since forward mode has one level for all threads, which the caller may be in."""

    def tangent(score, *others):
        positions, tangent, values = others[:4], others[4], list(others[5 : 5 + len(captured)])
        tangents = [tangent, *others[5 + len(captured) :]]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (score, *(values[n] for n in given))]
            for n, leaf in zip(given, leaves[1:], strict=True):
                values[n] = leaf
            result = (partial(differentiate, graph) if of_dscore else graph)(leaves[0], *positions, *values)
            if not result.requires_grad:
                return torch.zeros_like(score)
            weight = torch.ones_like(result).requires_grad_()
            gradients = torch.autograd.grad(result, leaves, weight, create_graph=True, allow_unused=True)
            pairs = [(g, t) for g, t in zip(gradients, tangents, strict=True) if g is not None]
            (total,) = torch.autograd.grad([g for g, _ in pairs], weight, [t for _, t in pairs])
        return total

    before, after = (names := list_arguments(graph))[:5], names[5:]
    after += [f"captured_{len(captured) + n}" for n in range(len(given))]
    return trace_numbers(tangent, [*before, "tangent", *after], captured + tuple(captured[n] for n in given))


def differentiate(graph: fx.GraphModule, score: Tensor, *others: Tensor) -> Tensor:
    """The derivative of a score_mod by the score, which can be differentiated again."""
    result = graph(score, *others)
    if not result.requires_grad:
        return torch.zeros_like(score)
    (gradient,) = torch.autograd.grad(
        result, score, torch.ones_like(result), create_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradient


def list_arguments(graph: fx.GraphModule) -> list[str]:
    return [n.name for n in graph.graph.nodes if n.op == "placeholder"]


def trace_numbers(function: Callable, names: list[str], captured: tuple[Tensor, ...]) -> fx.Graph:
    """The graph of a function of numbers with these names, the last of which are captured tensors."""
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    examples = make_example_scalars(1)
    examples += [examples[0].clone() for _ in names[len(examples) : len(names) - len(captured)]]
    # Only shape and dtype of captured tensors matter: nothing is copied from a GPU.
    examples += [torch.zeros((), dtype=x.dtype, device="cpu").expand(x.shape) for x in captured]
    traced = make_fx(function)(*examples)
    functional = torch.func.functionalize(traced)
    table = core_aten_decompositions()
    traced = make_fx(functional, decomposition_table=table)(*examples)  # type: ignore[arg-type]  # of wider keys
    for node, wanted in zip([n for n in traced.graph.nodes if n.op == "placeholder"], names, strict=True):
        node.name = wanted
    for node in traced.graph.nodes:
        if node.target in PASSTHROUGH:  # a captured tensor is to be indexed as it is
            node.replace_all_uses_with(node.args[0])
    traced.graph.eliminate_dead_code()
    return traced.graph
