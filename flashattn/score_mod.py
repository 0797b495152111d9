"""FlexAttention's callables and block masks, as the backends read them.

A `score_mod(score, batch, head, q_idx, kv_idx)` or `mask_mod(batch, head, q_idx, kv_idx)` is written for one score. It
is traced once, on numbers, to a graph of operations that PyTorch knows to work number by number; the graph then serves
a whole tile of scores at once. Dong et al., "Flex Attention" (2024), arXiv:2412.05496.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import mod_graph, tracing
from .closures import Closure

aten = torch.ops.aten
MAX_TRACES = 16
ANY_LENGTH = 1 << 30  # FlexAttention's block size of a mask that was made for no length
_traces: dict[tuple, Traced] = {}
trace_lock = threading.RLock()  # PyTorch's tracing is for one thread at a time


def prevent_compilation() -> contextlib.AbstractContextManager:
    """Keeps torch.compile out meanwhile: it and FX's tracing, which patches all modules, break each other. A
    compilation takes `trace_lock` within its own lock, so this comes first."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")  # absent where nobody has compiled yet
    return getattr(dynamo, "compile_lock", None) or contextlib.nullcontext()


class Traced(NamedTuple):
    """A callable as a graph of its arguments and of the tensors it captured, in that order. It is run by `forward`: a
    call would run the hooks that somebody has set for all modules."""

    graph: fx.GraphModule  # its arguments may be tensors that broadcast, too
    captured: tuple[Tensor, ...]
    before: fx.GraphModule | None = None  # computes, from the captured tensors, those that the graph takes instead

    @property
    def has_indexing(self) -> bool:
        """Whether it reads captured tensors by index."""
        return any(node.target is aten.index.Tensor for node in self.graph.graph.nodes)


def trace(name: str, function: Callable, scores: int) -> Traced:
    """Trace a callable that takes `scores` (1 or 0) scores and four positions.

    Raises:
        TypeError: if it is not a function of one score: control flow on it, reductions, mutation.
    """
    transformed = tracing.is_transformed()
    if transformed and (moved := find_transformed(function, scores)):
        return trace_transformed(name, function, scores, moved)
    closure = Closure(function)
    key = None if closure.key is None else (closure.key, scores)
    if key is not None and (traced := _traces.get(key)) is not None:
        return traced
    with prevent_compilation(), trace_lock:
        if key in _traces:
            return _traces[key]
        # Transforms wrap the numbers that a callable is traced on, too.
        run = run_in_clean_thread if transformed else lambda function, *args: function(*args)
        traced, read = run(_trace, name, function, scores)
        # A number read off a tensor, and a tensor computed from others, are as they were in this call.
        seen = {id(x) for x in closure.tensors}
        if key is not None and not read and all(id(x) in seen for x in traced.captured):
            while len(_traces) >= MAX_TRACES:
                _traces.pop(next(iter(_traces)))
            _traces[key] = traced
    return traced


class NumbersRead(TorchDispatchMode):
    """Notices where a tensor's numbers become Python's, a constant in a trace: by float(x), or as a shape."""

    TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
    found = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # (An index of positions reads none of them, one of a mask does.)
        by_position = function is aten.index.Tensor and not any(x.dtype == torch.bool for x in args[1] if x is not None)
        self.found = self.found or not (by_position or self.TAGS.isdisjoint(function.tags))
        return function(*args, **(kwargs or {}))


class ListsRead(TorchFunctionMode):
    """Notices tolist and numpy, which call no operation."""

    found = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.found = self.found or function in (Tensor.tolist, Tensor.numpy, Tensor.__array__)
        return function(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------ transforms


class TensorsMet(TorchFunctionMode):
    """Keeps the tensors that it meets."""

    def __init__(self):
        super().__init__()
        self.met: list = []
        self.made: list = []  # by the operations themselves

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.met += tree_leaves((args, kwargs))
        result = function(*args, **(kwargs or {}))
        self.made += tree_leaves(result)
        return result


class Replaced(TorchFunctionMode):
    """Puts other tensors in the place of these."""

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]):
        super().__init__()
        self.by_id = {id(x): other for x, other in pairs}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: self.by_id.get(id(x), x), (args, kwargs or {}))
        return function(*args, **kwargs)


def find_transformed(function: Callable, scores: int) -> list[Tensor]:
    """The tensors that a callable reads which a transform has wrapped, or which carry a tangent: a trace would keep
    their values alone."""
    with TensorsMet() as tensors, torch._C._DisableAutocast():
        result = function(*make_example_scalars(scores))
    known, found = {id(x) for x in tensors.made}, []
    for x in (*tensors.met, result):
        if isinstance(x, Tensor) and id(x) not in known and tracing.is_wrapped(x):
            known.add(id(x))
            found.append(x)
    return found


def trace_transformed(name: str, function: Callable, scores: int, transformed: list[Tensor]) -> Traced:
    """The trace of a callable that reads these tensors, which become inputs of the graph, and with them all that is
    computed of them. It is not kept: other calls have others."""
    tracing.refuse_capture(name, "it is traced in its first call, which must come before the capture")
    stand_ins = [(x.shape, x.dtype, x.device) for x in transformed]
    with prevent_compilation(), trace_lock:
        return run_in_clean_thread(_trace_with_inputs, name, function, scores, transformed, stand_ins)


def _trace_with_inputs(
    name: str, function: Callable, scores: int, inputs: list[Tensor], stand_ins: list[tuple]
) -> Traced:
    def run(*args):
        with Replaced(zip(inputs, args[scores + 4 :], strict=True)):
            return function(*args[: scores + 4])

    examples = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in stand_ins)
    with ListsRead() as lists:
        module = _make_fx(name, run, [*make_example_scalars(scores), *examples])
    if lists.found:
        raise TypeError(f"{name} must not make a list or an array of a tensor that is mapped or differentiated")
    name_captured(module, scores)
    captured = *inputs, *_lift_captured(module, len(inputs))
    return _make_pointwise(name, module.graph, scores, captured)


def run_in_clean_thread(function: Callable, *args):
    """The function's result, from a thread with no modes and with every dispatch key: the caller may be in PyTorch's
    own tracing, or in an operator, below autograd."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def _trace(name: str, function: Callable, scores: int) -> tuple[Traced, bool]:
    """The trace, and whether it read numbers off tensors."""
    tracing.refuse_capture(name, "it is traced in its first call, which must come before the capture")
    with NumbersRead() as numbers, ListsRead() as lists:
        module = _make_fx(name, function, make_example_scalars(scores))
        captured = _lift_captured(module)
        traced = _make_pointwise(name, module.graph, scores, captured)
    return traced, numbers.found or lists.found


def trace_graph(name: str, graph: fx.GraphModule, scores: int, shapes: list[tuple[torch.dtype, list[int]]]) -> Traced:
    """Trace a graph made elsewhere; after its arguments it takes captured tensors of these dtypes and sizes."""
    captured = [torch.zeros((), dtype=dtype, device="cpu").expand(shape) for dtype, shape in shapes]
    module = _make_fx(name, graph, [*make_example_scalars(scores), *captured], "fake")
    if any(node.op == "get_attr" for node in module.graph.nodes):
        raise TypeError(f"{name} must make no tensor of numbers that depends on its arguments")
    name_captured(module, scores)
    return _make_pointwise(name, module.graph, scores, tuple(captured))


def name_captured(module: fx.GraphModule, scores: int) -> None:
    """Name the inputs after the arguments as captured tensors are."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for number, node in enumerate(inputs[scores + 4 :]):
        node.name = node.target = f"captured_{number}"


def _make_fx(
    name: str, function: Callable, examples: list[Tensor], mode: Literal["real", "fake"] = "real"
) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        # A tangent is refused by name later.
        with torch._C._DisableAutocast(), forward_ad._set_fwd_grad_enabled(False), mod_graph.IndexByPosition():
            return make_fx(lambda *args: function(*args), tracing_mode=mode)(*examples)  # which counts a method's self
    except Exception as error:
        what = str(error).strip().split("\n")[0]
        raise TypeError(
            f"{name} must be traceable for one score, without control flow on its arguments: {what}"
        ) from error


def _make_pointwise(name: str, graph: fx.Graph, scores: int, captured: tuple[Tensor, ...]) -> Traced:
    mod_graph.check(name, graph, is_mask=scores == 0)
    before, graph = mod_graph.hoist(graph, scores + 4)
    mod_graph.join_indices(graph)
    mod_graph.check_numbers(name, graph)
    return Traced(fx.GraphModule({}, graph), captured, None if before is None else fx.GraphModule({}, before))


def make_example_scalars(scores: int) -> list[Tensor]:
    """The example inputs of a trace: scores and four positions. On the CPU, whatever the default device is, since
    scalars there combine with tensors of any device."""
    score, position = (torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.int32))
    return [score] * scores + [position.clone() for _ in range(4)]


def _lift_captured(module: fx.GraphModule, first: int = 0) -> tuple[Tensor, ...]:
    """Make arguments of the constants of a graph, after the `first` captured tensors; returns them, each once."""
    places: dict[int, fx.Node] = {}
    captured: list[Tensor] = []
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1]
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(module, node.target)
        if id(value) not in places:
            with module.graph.inserting_after(last):
                last = places[id(value)] = module.graph.placeholder(f"captured_{first + len(captured)}")
            last.meta["val"] = node.meta["val"]
            captured.append(value)
        node.replace_all_uses_with(places[id(value)])
        module.graph.erase_node(node)
    return tuple(captured)


def trace_for(name: str, function: object, scores: int, device: torch.device) -> Traced:
    """A callable for a call on tensors of this device; itself in what Dynamo traces, which traces it then."""
    if not callable(function):
        raise TypeError(f"{name} must be a callable, got {type(function).__name__}")
    if torch.compiler.is_dynamo_compiling():
        return function  # type: ignore[return-value]  # there only `mods_in_graph.call` gets it
    return move_numbers(name, trace(name, function, scores), device)


def move_numbers(name: str, traced: Traced, device: torch.device) -> Traced:
    """With all that it captured on q's device. A tensor of one number may be elsewhere, as in PyTorch's own operations
    (torch.tensor(0.5) is on the CPU), and its gradient goes back there; a kernel can only read what is on its GPU."""
    captured = tuple(move_captured(name, x, device) for x in traced.captured)
    if traced.before is not None:
        with torch._C._DisableAutocast():
            captured = tuple(x.to(device) for x in traced.before.forward(*captured))
    return Traced(traced.graph, captured)


def move_captured(name: str, x: Tensor, device: torch.device) -> Tensor:
    if x.device == device:
        return x
    if x.dim() > 0:
        raise ValueError(f"{name} must capture tensors on q's device {device}, got one on {x.device}")
    tracing.refuse_capture(name, f"it captured a number on {x.device}, which must be on {device}")
    return x.to(device)


class BlockMask(NamedTuple):
    """A block mask: in `partial` blocks mask_mod decides, in `full` blocks all pairs attend, in the others none."""

    mask: Traced  # in what Dynamo traces the callable itself
    partial: Tensor  # (batch or 1, heads or 1, blocks of queries, blocks of keys) bool
    full: Tensor
    block_q: int
    block_k: int

    def attend_mask(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """(batch or 1, heads or 1, queries, keys): which of queries i (a column) and keys j attend, of all batch rows b
        and heads h."""
        rows, columns = i.view(-1) // self.block_q, j // self.block_k
        full, partial = (x.index_select(2, rows).index_select(3, columns) for x in (self.full, self.partial))
        return full | (partial & self.mask.graph.forward(b, h, i, j, *self.mask.captured))

    def select_keys(self, queries: slice, seq_k: int) -> Tensor:
        """The keys of the blocks that are active for some of these queries, in any batch row and head."""
        first, last = queries.start // self.block_q, (queries.stop - 1) // self.block_q
        some = (self.partial | self.full)[:, :, first : last + 1].flatten(0, 2).any(0)
        keys = some.repeat_interleave(self.block_k)[:seq_k]
        return keys.nonzero().view(-1)


def read_block_mask(block_mask, batch: int, heads: int, seq_q: int, seq_k: int, device: torch.device) -> BlockMask:
    """A `torch.nn.attention.flex_attention.BlockMask`, checked and as the backends read it."""
    from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

    if not isinstance(block_mask, TorchBlockMask):
        raise TypeError(f"block_mask must be a BlockMask of create_block_mask, got {type(block_mask).__name__}")
    size, wanted = tuple(block_mask.shape), (batch, heads, seq_q, seq_k)
    of_any_length = tuple(block_mask.BLOCK_SIZE) == (ANY_LENGTH, ANY_LENGTH)
    if any(s != 1 and s != w for s, w in zip(size[:2], wanted[:2], strict=True)) or (
        size[2:] != wanted[2:] and not of_any_length
    ):
        raise ValueError(f"block_mask must be made for (batch or 1, heads or 1, seq_q, seq_k) = {wanted}, got {size}")
    if block_mask.kv_num_blocks.device != device:
        raise ValueError(f"block_mask must be on q's device {device}, got {block_mask.kv_num_blocks.device}")
    block_q, block_k = map(_limit_block_size, block_mask.BLOCK_SIZE, (seq_q, seq_k))
    blocks = -(-seq_k // block_k)
    list_ones = torch.ops.flashattn.list_blocks if torch.compiler.is_dynamo_compiling() else _densify
    partial = list_ones(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = list_ones(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)
    mask = trace_for("block_mask.mask_mod", block_mask.mask_mod, 0, device)
    return BlockMask(mask, partial, full, block_q, block_k)


def _limit_block_size(size: int, seq: int) -> int:
    """A block larger than the sequence is made smaller: memory is allocated for all that the blocks cover."""
    enough = 128
    while enough < seq and enough < size:  # each a guard of a graph, which serves other lengths up to the next power
        enough *= 2
    return size if size <= enough else enough


# One operator in a graph, so that its intermediate sizes create no guards.
torch.library.define("flashattn::list_blocks", "(Tensor counts, Tensor indices, SymInt blocks) -> Tensor")


@torch.library.register_fake("flashattn::list_blocks")
def _(counts, indices, blocks):
    return indices.new_empty(*indices.shape[:-1], blocks, dtype=torch.bool)


def _densify(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """(..., blocks of queries, blocks of keys) bool from the number of blocks in each row and their indices."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    dense = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    dense.scatter_(-1, torch.where(listed, indices, blocks).long(), True)
    return dense[..., :blocks]


torch.library.impl("flashattn::list_blocks", "CompositeExplicitAutograd")(lambda *args: _densify(*args).contiguous())
