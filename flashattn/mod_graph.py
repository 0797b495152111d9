"""Rewrites the graph of a traced callable, before backends read it, into a graph of operations on scalars.

`hoist` moves the operations on captured tensors alone, which may be any of PyTorch's, out of the graph, to run once a
call. The others must work number by number; `join_indices` turns a chain of indexing such as table[h][i], whose links
are not numbers, into one.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Besides those that PyTorch tags as pointwise.
ALLOWED = {
    aten.index.Tensor, aten.floor_divide.default, aten.floor_divide.Scalar, aten._to_copy.default,
    aten.scalar_tensor.default, aten.zeros.default, aten.ones.default, aten.full.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default, aten.full_like.default, aten.zeros_like.default,
    aten.ones_like.default, aten.lift_fresh_copy.default, aten.detach.default, aten.alias.default, aten.clone.default,
}  # fmt: skip


class IndexByPosition(TorchFunctionMode):
    """Within it table[h] of a position h is an operation on h. Python's own indexing would ask for its number."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            x, key = args
            key = key if isinstance(key, tuple) else (key,)
            if any(_is_index(k) and k.dim() == 0 for k in key) and all(_is_index(k) or _is_basic(k) for k in key):
                return _take(x, key)
        return func(*args, **(kwargs or {}))


def _is_index(key) -> bool:
    return isinstance(key, Tensor) and not key.dtype.is_floating_point and key.dtype != torch.bool


def _is_basic(key) -> bool:
    return key is None or key is Ellipsis or isinstance(key, slice) or type(key) is int


def _take(x: Tensor, key: tuple) -> Tensor:
    """x[key], of which integers, slices and new dimensions come first: they leave a view."""
    if Ellipsis in [k for k in key if not isinstance(k, Tensor)]:
        at = next(n for n, k in enumerate(key) if k is Ellipsis)
        missing = x.dim() - sum(k is not None and k is not Ellipsis for k in key)
        key = (*key[:at], *[slice(None)] * missing, *key[at + 1 :])
    basic = tuple(slice(None) if isinstance(k, Tensor) else k for k in key)
    if any(k != slice(None) for k in basic):
        x = x[basic]
    left = [k for k in key if type(k) is not int]
    return aten.index.Tensor(x, [k if isinstance(k, Tensor) else None for k in left])


def refuse(name: str, operation) -> None:
    """Refuse an operation that changes a tensor or draws random numbers."""
    schema = getattr(operation, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise TypeError(f"{name} must not change a tensor, got {operation}")
    if torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ()):
        raise TypeError(f"{name} must give the same for the same arguments, got {operation}")


class Refused(TorchDispatchMode):
    """`refuse` what runs meanwhile."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        refuse(self.name, function)
        return function(*args, **(kwargs or {}))


def check(name: str, graph: fx.Graph, is_mask: bool) -> None:
    """Check that a graph changes no tensor, draws no random numbers and returns a tensor, bool for a mask."""
    for node in graph.nodes:
        if node.op == "call_function":
            refuse(name, node.target)
    result = get_result(graph)
    if not isinstance(result, fx.Node):
        raise TypeError(f"{name} must return a tensor, got {type(result).__name__}")
    if is_mask and result.meta["val"].dtype != torch.bool:
        raise TypeError(f"{name} must return a bool tensor, got {result.meta['val'].dtype}")


def check_numbers(name: str, graph: fx.Graph) -> None:
    """Check that every operation is pointwise on scalars."""
    operations = [node for node in graph.nodes if node.op == "call_function"]
    for node in operations:
        if node.target not in ALLOWED and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            raise TypeError(
                f"{name} must work on one score at a time (arithmetic, torch.where, indexing), got {node.target}"
            )
    for node in (*operations, get_result(graph)):
        shape = tuple(node.meta["val"].shape)
        if shape != ():
            raise TypeError(f"{name} must work on one score at a time, got a tensor of shape {shape} from {node}")


def get_result(graph: fx.Graph):
    return next(node for node in graph.nodes if node.op == "output").args[0]


def hoist(graph: fx.Graph, arguments: int) -> tuple[fx.Graph | None, fx.Graph]:
    """(before, graph): `before` computes, from the captured tensors, those that the graph then takes in their place;
    None where the graph takes them as they are. `arguments`: how many of its inputs come before them."""
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    depends = set(inputs[:arguments])
    for node in nodes:
        if any(x in depends for x in node.all_input_nodes):
            depends.add(node)
    numbers: set[fx.Node] = set()  # made of nothing; both graphs may have them
    for node in nodes:
        if _is_number(node, numbers):
            numbers.add(node)
    constant = [n for n in nodes if n.op == "call_function" and n not in depends]
    if numbers.issuperset(constant):
        return None, graph
    before, after = fx.Graph(), fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in (*inputs[arguments:], *constant):
        made[node] = before.node_copy(node, made.__getitem__)
    taken = [n for n in made if n not in numbers and any(user not in made for user in n.users)]
    before.output(tuple(made[n] for n in taken))
    before.eliminate_dead_code()
    copies = {node: after.node_copy(node) for node in inputs[:arguments]}
    for number, node in enumerate(taken):
        copies[node] = after.placeholder(f"captured_{number}")
        copies[node].meta.update(node.meta)
    for node in nodes:
        if (node in numbers or node not in made) and node not in copies:
            copies[node] = after.node_copy(node, copies.__getitem__)
    after.eliminate_dead_code()
    return before, after


def _is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Whether it makes a number out of nothing, such as torch.zeros(()), or of such `numbers`."""
    if node.op != "call_function" or not numbers.issuperset(node.all_input_nodes):
        return False
    single = node.target in ALLOWED or torch.Tag.pointwise in getattr(node.target, "tags", ())
    return single and node.meta["val"].dim() == 0


def join_indices(graph: fx.Graph) -> None:
    """Index each table once, by all positions at once."""
    partial: dict[fx.Node, tuple[fx.Node, list]] = {}  # of a node with dimensions left: the table, and None for each
    for node in list(graph.nodes):
        if node.target not in (aten.index.Tensor, aten.select.int):
            continue
        table = node.args[0]
        base, at = partial.get(table, (table, [None] * table.meta["val"].dim()))
        left = [d for d, index in enumerate(at) if index is None]
        if node.target is aten.select.int:
            with graph.inserting_before(node):
                index = graph.call_function(aten.scalar_tensor.default, (node.args[2],), {"dtype": torch.int64})
            index.meta["val"] = torch.empty((), dtype=torch.int64, device="meta")
            new = {left[node.args[1]]: index}
        else:
            new = {left[d]: index for d, index in enumerate(node.args[1]) if index is not None}
        if any(index.meta["val"].dim() > 0 for index in new.values()):
            continue
        at = [new.get(d, index) for d, index in enumerate(at)]
        if None in at:
            partial[node] = base, at
        elif table in partial:
            node.target, node.args = aten.index.Tensor, (base, at)
    graph.eliminate_dead_code()
