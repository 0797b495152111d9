"""How `torch.vmap` maps the operators: those of attention by `folding.py`; in a norm the mapped dimension becomes part
of the rows, or of the heads, which have parameters of their own. A call whose meaning depends on its batch rows, by a
callable or by dropout, is run once for each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .. import tracing
from . import attention_derivatives, norm_derivatives  # noqa: F401  (which define the operators)
from .folding import choose_fold, is_row_dependent, list_kinds
from .register import library


class Named(NamedTuple):
    """A mapped call of an operator, by the names of its schema."""

    options: dict[str, Any]  # its arguments
    dims: dict[str, int | None]  # of those that are tensors: the dimension that is mapped
    returns: list[str]
    shared: bool  # whether tangents alone are mapped: the other results are those of every call


def name_arguments(operator, in_dims: tuple, args: tuple) -> Named:
    names = [argument.name for argument in operator._schema.arguments]
    dims = {name: at for name, x, at in zip(names, args, in_dims, strict=True) if isinstance(x, Tensor)}
    returns = [result.name for result in operator._schema.returns]
    shared = all(at is None or name.startswith("tangent") for name, at in dims.items())
    return Named(dict(zip(names, args, strict=True)), dims, returns, shared)


def map_operator(operator, size: int, in_dims: tuple, args: tuple) -> tuple[tuple, tuple]:
    """(results, the dimension of each that is mapped): an operator of attention for each of `size` calls."""
    options, dims, returns, shared = name_arguments(operator, in_dims, args)
    tensors = {name: options[name] for name in dims}
    alone = is_row_dependent(options["dropout_p"], options["score_mod"], options["mask_mod"])
    fold = None if alone else choose_fold(tensors, dims, size, returns)
    if fold is None:
        return share_results(returns, shared, *run_each(operator, size, in_dims, args))
    folded = options | fold.fold_all(tensors, dims, bool(options.get("with_grad_bias")))
    results = operator(*folded.values())
    bias = options.get("bias")
    sum_bias = (
        bias is not None and (bias if dims["bias"] is None else bias.select(dims["bias"], 0)).shape[fold.dim] == 1
    )
    exists = [isinstance(x, Tensor) and (x.dim() > 1 or x.numel() > 0) for x in results]
    named = zip(returns, results, exists, strict=True)
    unfolded = tuple(fold.unfold(name, x, sum_bias) if there else x for name, x, there in named)
    out_dims = tuple(0 if there else tree_map(lambda _: None, x) for x, there in zip(results, exists, strict=True))
    return share_results(returns, shared, unfolded, out_dims)


def share_results(returns: list[str], shared: bool, results: tuple, out_dims: tuple) -> tuple[tuple, tuple]:
    """The first of the results that are not tangents, where they are `shared` by all calls: forward mode asks for one
    of them."""
    if not shared or not returns[-1].startswith("tangent"):
        return results, out_dims
    shares = [at == 0 and not name.startswith("tangent") for name, at in zip(returns, out_dims, strict=True)]
    results = tuple(x[0] if share else x for x, share in zip(results, shares, strict=True))
    return results, tuple(None if share else at for at, share in zip(out_dims, shares, strict=True))


NORM_KINDS = list_kinds(
    rows="x residual hidden grad_y grad_hidden y grad_x grad_residual "
    "tangent_x tangent_residual tangent_hidden tangent_y",  # (..., width)
    stats="mean rstd",  # (rows,)
    parameters="weight bias grad_weight grad_bias tangent_weight tangent_bias",  # (width,) or (heads, width)
)


class NormFold(NamedTuple):
    """`size` norms of rows of this shape as one, of rows (outer, size * heads, width)."""

    size: int
    shape: tuple[int, ...]  # (..., heads, width), or (..., width) and one head
    heads: int
    per_head: bool  # whether parameters are (heads, width)

    def fold(self, name: str, x: Tensor, at: int | None) -> Tensor:
        x = x.expand(self.size, *x.shape) if at is None else x.movedim(at, 0)
        kind = NORM_KINDS[name]
        if x[0].numel() == 0 and x.dim() == 2 and kind != "parameters":  # a result that there is not
            return x[0]
        if kind == "parameters":
            return x.reshape(self.size * self.heads, -1)
        if kind == "stats":
            return x.reshape(self.size, -1, self.heads).movedim(0, 1).flatten()
        return x.reshape(self.size, -1, self.heads, self.shape[-1]).movedim(0, 1).flatten(1, 2)

    def unfold(self, name: str, x: Tensor) -> Tensor:
        kind = NORM_KINDS[name]
        if kind == "parameters":
            return x.unflatten(0, (self.size, -1)) if self.per_head else x
        if kind == "stats":
            return x.reshape(-1, self.size, self.heads).movedim(1, 0).flatten(1)
        return x.unflatten(1, (self.size, self.heads)).movedim(1, 0).reshape(self.size, *self.shape)


def map_norm(operator, size: int, in_dims: tuple, args: tuple) -> tuple[tuple, tuple]:
    """`map_operator` of a norm."""
    options, dims, returns, shared = name_arguments(operator, in_dims, args)
    if options["dropout_p"] > 0:
        return share_results(returns, shared, *run_each(operator, size, in_dims, args))
    like = {name: options[name] if at is None else options[name].select(at, 0) for name, at in dims.items()}
    parameters = [p for name, p in like.items() if NORM_KINDS.get(name) == "parameters"]
    per_head = bool(parameters) and parameters[0].dim() == 2
    heads = parameters[0].shape[0] if per_head else 1
    fold = NormFold(size, tuple(like["x" if "x" in like else "hidden"].shape), heads, per_head)
    folded = [
        fold.fold(name, x, dims[name]) if name in NORM_KINDS and name in dims else x for name, x in options.items()
    ]
    results = operator(*folded)
    out_dims = tuple(None if x.dim() == 1 and x.numel() == 0 else 0 for x in results)
    named = zip(returns, results, out_dims, strict=True)
    unfolded = tuple(x if at is None else fold.unfold(name, x) for name, x, at in named)
    return share_results(returns, shared, unfolded, out_dims)


def run_each(operator, size: int, in_dims: tuple, args: tuple) -> tuple[tuple, tuple]:
    """One call after another."""
    flat, structure = tree_flatten(args)
    dims = tree_flatten(in_dims)[0]
    results = []
    for n in range(size):
        own = [x if at is None else x.select(at, n) for x, at in zip(flat, dims, strict=True)]
        results.append(tree_flatten(operator(*tree_unflatten(own, structure))))
    stacked = [torch.stack(x) for x in zip(*(x for x, _ in results), strict=True)]
    return tree_unflatten(stacked, results[0][1]), tree_unflatten([0] * len(stacked), results[0][1])


def register(name: str, rule=map_operator) -> None:
    """Register the rule of an operator, for functorch and for the older vmap of `is_grads_batched`."""
    operator = getattr(torch.ops.flashattn, name).default

    def map_calls(info, in_dims, *args):
        return rule(operator, info.batch_size, in_dims, args)

    def map_legacy(*args):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        flat, structure = tree_flatten(args)
        dims = [0 if tracing.is_legacy_batched(x) else None for x in flat]
        plain = [x if at is None else torch._remove_batch_dim(x, level, 1, 0) for x, at in zip(flat, dims, strict=True)]
        size = next(x.shape[0] for x, at in zip(plain, dims, strict=True) if at == 0)
        results, out_dims = rule(operator, size, tree_unflatten(dims, structure), tree_unflatten(plain, structure))
        results, structure = tree_flatten(results)
        batched = (
            x if at is None else torch._add_batch_dim(x, at, level)
            for x, at in zip(results, tree_flatten(out_dims)[0], strict=True)
        )
        return tree_unflatten(list(batched), structure)

    torch.library.register_vmap(f"flashattn::{name}", map_calls)
    library.impl(name, map_legacy, "Batched")


for name in ("attention_forward", "attention_backward", "attention_jvp", "attention_hvp", "attention_stats"):
    register(name)
for name in ("norm_forward", "norm_backward", "norm_jvp", "norm_hvp"):
    register(name, map_norm)
