"""How torch.compile takes a call with a `score_mod` or a `block_mask`: callables, which no operator takes.

Dynamo traces them beside PyTorch's own FlexAttention, to one graph module each and the tensors that they captured, and
asks for this by the operator's name. So `mods_in_graph` bears that name. Whenever what Dynamo wrote down runs, it calls
the plain operator in its place, with each graph module as text: later compilation stages hold no callables.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from . import mod_graph, mod_text, score_mod
from .score_mod import Traced

ANY_SIZES = 1024, 1000  # for a dimension whose size is a symbol: what is traced must be the same for both
KINDS = Tensor, torch.SymInt, torch.SymFloat  # of a graph's inputs; other numbers are written into it


class ModsInGraph(HigherOrderOperator):
    def __init__(self):
        super().__init__("flashattn_mods")
        self.__name__, self.__module__ = "flex_attention", __name__  # a printed graph finds it in this module

    def __call__(self, number, operator, has_mod, mod, operands_and_mask, has_mask, _, captured=(), mask_captured=()):
        """FlexAttention's query, key, value, score_mod, block_mask, scale, kernel_options, and what the callables
        captured. Dynamo passes other arguments through."""
        *operands, mask = operands_and_mask
        text, captured = lower("score_mod", mod, 1, captured, operands[0]) if has_mod else (None, [])
        mask_text, mask_captured = (
            lower("block_mask.mask_mod", mask, 0, mask_captured, operands[0]) if has_mask else (None, [])
        )
        return getattr(torch.ops.flashattn, operator).default(*operands, captured, text, mask_captured, mask_text)


mods_in_graph = ModsInGraph()


def identity_mod(score, batch, head, q_idx, kv_idx):
    """Where there is no score_mod."""
    return score


def call(operator: str, operands: tuple, mod: Callable | Traced | None, mask: Callable | Traced | None):
    """Called while Dynamo traces: flashattn's operator of this name. Its last arguments are the score_mod's captured
    tensors and text, then the mask_mod's. The first of the operands is q."""
    number = torch.zeros((), dtype=torch.float32, device="cpu")  # Dynamo makes its example of a score like it
    has_mod, has_mask = mod is not None, mask is not None
    return mods_in_graph(number, operator, has_mod, mod if has_mod else identity_mod, (*operands, mask), has_mask, {})


def lower(name: str, module: fx.GraphModule, scores: int, captured: tuple, q: Tensor) -> tuple[str, list[Tensor]]:
    """Dynamo's graph module as text, and the tensors that it takes."""
    with torch._C._DisableAutocast():
        graph, values = split(name, module, scores + 4, captured)
        values = [score_mod.move_captured(name, as_tensor(x, q), q.device) for x in values]
        text, before = retrace(name, graph, scores, values, ANY_SIZES[0])
        some_change = any(isinstance(size, torch.SymInt) for x in values for size in x.shape)
        if some_change and retrace(name, graph, scores, values, ANY_SIZES[1])[0] != text:
            raise TypeError(f"{name} must not depend on the sizes of tensors that it captured, which may change")
        return text, values if before is None else [x.to(q.device) for x in before(*values)]


def split(name: str, module: fx.GraphModule, arguments: int, captured: tuple) -> tuple[fx.GraphModule, list]:
    """(graph, values): the module, which takes the arguments and the captured tensors, as a graph that takes the
    arguments and values. The values, sizes and whatever does not depend on the arguments, are computed here."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    interpreter = fx.Interpreter(module)
    known = interpreter.env
    known.update(zip(inputs[arguments:], captured, strict=True))
    depends = set(inputs[:arguments])
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if depends.isdisjoint(node.all_input_nodes):
            with mod_graph.Refused(name):
                known[node] = interpreter.run_node(node)
        elif is_size(node.meta.get("example_value")):
            known[node] = node.meta["example_value"]
        else:
            depends.add(node)
    graph = fx.Graph()
    made = {node: graph.placeholder(node.name) for node in inputs[:arguments]}
    result = mod_graph.get_result(module.graph)
    taken = [n for n, x in known.items() if isinstance(x, KINDS) and (n is result or not depends.isdisjoint(n.users))]
    made.update((node, graph.placeholder(node.name)) for node in taken)
    for node in module.graph.nodes:
        if node in depends and node not in made:
            made[node] = graph.node_copy(node, lambda n: made[n] if n in made else known[n])
    graph.output(made.get(result, result))
    return fx.GraphModule(module, graph), [known[node] for node in taken]


def is_size(value) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(x, (int, torch.SymInt)) for x in values)


def as_tensor(value: Tensor | torch.SymInt | torch.SymFloat, q: Tensor) -> Tensor:
    """A number that has a symbol is an operand, as tensors are."""
    if isinstance(value, Tensor):
        return value
    floating = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtype = torch.int64 if isinstance(value, torch.SymInt) else floating
    return torch.scalar_tensor(value, dtype=dtype, device=q.device)  # type: ignore[arg-type]  # its stub has no symbols


def retrace(name: str, graph: fx.GraphModule, scores: int, values: list[Tensor], any_size: int):
    """(text, before): as `score_mod.trace` does it, of tensors that have the dtypes and dimensions of these."""
    shapes = [(x.dtype, [size if isinstance(size, int) else any_size for size in x.shape]) for x in values]
    with score_mod.trace_lock:
        traced = score_mod.run_in_clean_thread(score_mod.trace_graph, name, graph, scores, shapes)
    return mod_text.write(traced.graph.graph, scores + 4), traced.before
