"""How `torch.vmap` maps the operators. In attention the mapped dimension becomes part of the batch, or of the heads
where a tensor has no batch dimension (sinks), or one that is taken (packed sequences); in a norm part of the rows, or
of the heads where parameters are mapped, or have a gradient for each call. A call whose meaning depends on its batch
rows, by a callable or by dropout, is run once for each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .. import tracing
from . import attention_derivatives, norm  # noqa: F401  (which define the operators)
from .register import library

# The dimensions of tensors in the operators' schemas, by name.
HEADS = "q k v out grad_out tangent_q tangent_k tangent_v tangent_out grad_q grad_k grad_v"  # (batch, heads, ...)
ROWS = "lse rest grad_lse tangent_lse max_scores entropy column_sums"  # (batch, heads, ...), or empty
PAIRS = "mask bias tangent_bias grad_bias"  # (batch, heads, ...), each of them possibly 1
SLOPES = "alibi_slopes"  # (batch or 1, heads)
LENGTHS = "q_lengths kv_lengths"  # (batch,)
OF_HEADS = "sinks tangent_sinks grad_sinks max_logit"  # (heads,)
KINDS = {
    name: kind
    for kind, names in dict(
        heads=HEADS, rows=ROWS, pairs=PAIRS, slopes=SLOPES, lengths=LENGTHS, of_heads=OF_HEADS
    ).items()
    for name in names.split()
}
BATCH_DIM, HEADS_DIM = 0, 1


class Fold(NamedTuple):
    """`size` calls of this batch and these heads as one, in dimension `dim`."""

    size: int
    batch: int
    heads: int
    dim: int

    def fold(self, name: str, x: Tensor, at: int | None, whole: bool) -> Tensor:
        """An argument that is mapped over dimension `at` as that of the one call. whole: none that is broadcast along
        `dim` will do, since each call gets a gradient of its own."""
        kind = KINDS.get(name)
        if at is None and not whole and (kind is None or self.is_shared(kind, x)):
            return x
        x = x.expand(self.size, *x.shape) if at is None else x.movedim(at, 0)
        if kind == "rows" and x.dim() == 2:  # empty
            return x[0]
        if kind in ("lengths", "of_heads"):
            return x.flatten(0, 1)
        sizes = list(x.shape)
        sizes[self.dim + 1] = self.batch if self.dim == BATCH_DIM else self.heads
        if kind in ("pairs", "slopes"):
            x = x.expand(sizes)
        return x.movedim(0, self.dim).flatten(self.dim, self.dim + 1)

    def is_shared(self, kind: str, x: Tensor) -> bool:
        """Whether the one call can take what all calls share as it is."""
        if kind == "pairs" or (kind == "slopes" and self.dim == BATCH_DIM):
            return x.shape[self.dim] == 1
        return kind == ("of_heads" if self.dim == BATCH_DIM else "lengths")

    def unfold(self, name: str, x: Tensor, like: dict[str, Tensor]) -> Tensor:
        """A result of the one call as (size, ...)."""
        kind = KINDS[name]
        if kind == "of_heads":
            return x.unflatten(0, (self.size, -1))
        x = x.unflatten(self.dim, (self.size, -1)).movedim(self.dim, 0)
        if name == "grad_bias" and like["bias"].shape[self.dim] == 1:
            x = x.sum(self.dim + 1, keepdim=True)
        return x


def choose_dim(operator, options: dict, mapped: set[str]) -> int | None:
    """Where the calls are folded; None if nowhere."""
    results = {result.name for result in operator._schema.returns}
    if options["dropout_p"] > 0 or options["score_mod"] is not None or options["mask_mod"] is not None:
        return None
    if not mapped <= KINDS.keys():  # the boundaries of packed sequences
        return None
    of_heads = any(KINDS[name] == "of_heads" for name in mapped) or "max_logit" in results
    if options["sinks"] is not None and "grad_sinks" in results:
        of_heads = True
    if not of_heads and options["cu_seqlens"] is None:
        return BATCH_DIM
    return None if any(KINDS[name] == "lengths" for name in mapped) else HEADS_DIM


def map_operator(operator, size: int, in_dims: tuple, args: tuple) -> tuple[tuple, tuple]:
    """(results, the dimension of each that is mapped): `operator` of each of `size` calls."""
    names = [argument.name for argument in operator._schema.arguments]
    options = dict(zip(names, args, strict=True))
    dims = {name: at for name, x, at in zip(names, args, in_dims, strict=True) if isinstance(x, Tensor)}
    mapped = {name for name, at in dims.items() if at is not None}
    dim = choose_dim(operator, options, mapped)
    # Where tangents alone are mapped, the results are those of every call; forward mode asks for one of them then.
    shared = all(name.startswith("tangent") for name in mapped)
    if dim is None:
        return share_results(operator, shared, *run_each(operator, size, in_dims, args))
    like = {name: options[name] if at is None else options[name].select(at, 0) for name, at in dims.items()}
    fold = Fold(size, *like["q"].shape[:2], dim)
    together = {"bias", "tangent_bias"}
    own_bias = bool(options.get("with_grad_bias")) or bool(mapped & together)
    folded = []
    for name, x in options.items():
        whole = name in together and own_bias
        folded.append(fold.fold(name, x, dims[name], whole) if isinstance(x, Tensor) else x)
    results = operator(*folded)
    unfolded, out_dims = [], []
    for result, x in zip(operator._schema.returns, results, strict=True):
        exists = isinstance(x, Tensor) and (x.dim() > 1 or x.numel() > 0)
        unfolded.append(fold.unfold(result.name, x, like) if exists else x)
        out_dims.append(0 if exists else tree_map(lambda _: None, x))
    return share_results(operator, shared, tuple(unfolded), tuple(out_dims))


def share_results(operator, shared: bool, results: tuple, out_dims: tuple) -> tuple[tuple, tuple]:
    """The first of the results that are not tangents, where they are `shared` by all calls."""
    if not shared or operator._schema.returns[-1].name != "tangent_lse":
        return results, out_dims
    shares = [
        at == 0 and not r.name.startswith("tangent") for r, at in zip(operator._schema.returns, out_dims, strict=True)
    ]
    results = tuple(x[0] if share else x for x, share in zip(results, shares, strict=True))
    return results, tuple(None if share else at for at, share in zip(out_dims, shares, strict=True))


NORM_KINDS = {
    name: kind
    for kind, names in dict(
        rows="x residual hidden grad_y grad_hidden y grad_x grad_residual",  # (..., width)
        stats="mean rstd",  # (rows,)
        parameters="weight bias grad_weight grad_bias",  # (width,) or (heads, width)
    ).items()
    for name in names.split()
}


class NormFold(NamedTuple):
    """`size` norms of rows of this shape as one, of rows (outer, size * heads, width)."""

    size: int
    shape: tuple[int, ...]  # (..., heads, width), or (..., width) and one head
    heads: int

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
            return x.unflatten(0, (self.size, -1)).flatten(1, -2) if self.heads > 1 else x
        if kind == "stats":
            return x.reshape(-1, self.size, self.heads).movedim(1, 0).flatten(1)
        return x.unflatten(1, (self.size, self.heads)).movedim(1, 0).reshape(self.size, *self.shape)


def map_norm(operator, size: int, in_dims: tuple, args: tuple) -> tuple[tuple, tuple]:
    """`map_operator` of a norm."""
    names = [argument.name for argument in operator._schema.arguments]
    options = dict(zip(names, args, strict=True))
    dims = {name: at for name, x, at in zip(names, args, in_dims, strict=True) if isinstance(x, Tensor)}
    if options["dropout_p"] > 0:
        return run_each(operator, size, in_dims, args)
    like = {name: options[name] if at is None else options[name].select(at, 0) for name, at in dims.items()}
    parameters = [p for name, p in like.items() if NORM_KINDS.get(name) == "parameters"]
    heads = parameters[0].shape[0] if parameters and parameters[0].dim() == 2 else 1
    fold = NormFold(size, tuple(like["x" if "x" in like else "hidden"].shape), heads)
    folded = [
        fold.fold(name, x, dims[name]) if name in NORM_KINDS and name in dims else x for name, x in options.items()
    ]
    results = operator(*folded)
    out_dims = tuple(None if x.dim() == 1 and x.numel() == 0 else 0 for x in results)
    named = zip(operator._schema.returns, results, out_dims, strict=True)
    return tuple(x if at is None else fold.unfold(result.name, x) for result, x, at in named), out_dims


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
for name in ("norm_forward", "norm_backward"):
    register(name, map_norm)
