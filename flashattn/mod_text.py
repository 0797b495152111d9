"""A traced callable as text and back: operators take it so, and compiled graphs hold it so, also on disk for another
process."""

from __future__ import annotations

import functools
import json

import torch
from torch import fx

from . import mod_graph


def write(graph: fx.Graph, arguments: int) -> str:
    """Operation by operation, with their result dtypes; of the tensors that come after the arguments dtype and
    dimensions. Two callables of one text are one callable."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    captured = [node.meta["val"] for node in nodes if node.op == "placeholder"][arguments:]
    numbers = {node: number for number, node in enumerate(nodes)}
    operations = [
        [str(node.target), *(_encode(x, numbers) for x in (node.args, node.kwargs, node.meta["val"].dtype))]
        for node in nodes
        if node.op == "call_function"
    ]
    return json.dumps({
        "arguments": arguments,
        "captured": [[_encode(x.dtype, {}), x.dim()] for x in captured],
        "operations": operations,
        "result": numbers[mod_graph.get_result(graph)],
    })  # fmt: skip


@functools.lru_cache(maxsize=256)
def read(text: str) -> fx.GraphModule:
    """The graph of a text; the same object for the same text, so that its generated kernel is found again."""
    written = json.loads(text)
    graph = fx.Graph()
    nodes = [graph.placeholder(f"argument_{number}") for number in range(written["arguments"])]
    nodes += [graph.placeholder(f"captured_{number}") for number in range(len(written["captured"]))]
    for name, args, kwargs, dtype in written["operations"]:
        space, operation, overload = name.split(".")
        target = getattr(getattr(getattr(torch.ops, space), operation), overload)
        node = graph.call_function(target, tuple(_decode(args, nodes)), _decode(kwargs, nodes))
        node.meta["val"] = torch.empty((), dtype=_decode(dtype, nodes), device="meta")
        nodes.append(node)
    graph.output(nodes[written["result"]])
    return fx.GraphModule({}, graph)


def _encode(value, numbers: dict[fx.Node, int]):
    """An argument of an operation as JSON has it."""
    if isinstance(value, fx.Node):
        return {"node": numbers[value]}
    if isinstance(value, (list, tuple)):
        return [_encode(x, numbers) for x in value]
    if isinstance(value, dict):
        return {"arguments": [(name, _encode(x, numbers)) for name, x in value.items()]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a score_mod or mask_mod must compute with tensors and numbers, got {value!r}")


def _decode(plain, nodes: list[fx.Node]):
    if isinstance(plain, list):
        return [_decode(x, nodes) for x in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, what),) = plain.items()
    if kind == "node":
        return nodes[what]
    if kind == "arguments":
        return {name: _decode(x, nodes) for name, x in what}
    return torch.device(what) if kind == "device" else getattr(torch, what)
