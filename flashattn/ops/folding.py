"""Many calls of attention as one: the dimension that `torch.vmap` maps becomes part of the batch, or of the heads where
a tensor has no batch dimension (sinks), or one that is taken (packed sequences)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import VmapInterpreter

from ..score import Score, list_operator_fields


def list_kinds(**names: str) -> dict[str, str]:
    """{name: kind} of the names of each kind."""
    return {name: kind for kind, all_names in names.items() for name in all_names.split()}


# The dimensions of tensors in the operators' schemas, by name.
KINDS = list_kinds(
    heads="q k v out grad_out tangent_q tangent_k tangent_v tangent_out grad_q grad_k grad_v",  # (batch, heads, ...)
    rows="lse rest grad_lse tangent_lse max_scores entropy column_sums",  # (batch, heads, ...), or empty
    pairs="mask bias tangent_bias grad_bias",  # (batch, heads, ...), each of them possibly 1
    slopes="alibi_slopes",  # (batch or 1, heads)
    lengths="q_lengths kv_lengths",  # (batch,)
    of_heads="sinks tangent_sinks grad_sinks max_logit",  # (heads,)
)
BATCH_DIM, HEADS_DIM = 0, 1


def move_dim(x: Tensor, source: int, to: int) -> Tensor:
    """`movedim`, which takes microseconds where there is nothing to move too."""
    return x if source == to else x.movedim(source, to)


def split_dim(x: Tensor, dim: int, size: int) -> Tensor:
    """`unflatten` into (size, rest), in half of its time."""
    shape = x.shape
    return x.view(*shape[:dim], size, shape[dim] // size, *shape[dim + 1 :])


class Fold(NamedTuple):
    """`size` calls of this batch and these heads as one, in dimension `dim`."""

    size: int
    batch: int
    heads: int
    dim: int

    def fold_all(self, tensors: dict[str, Tensor], dims: dict[str, int | None], own_bias: bool) -> dict[str, Tensor]:
        """The arguments of the one call; own_bias: each call gets a gradient of the bias of its own."""
        own_bias = own_bias or dims.get("bias") is not None or dims.get("tangent_bias") is not None
        whole = ("bias", "tangent_bias") if own_bias else ()
        return {name: self.fold(name, x, dims[name], name in whole) for name, x in tensors.items()}

    def fold(self, name: str, x: Tensor, at: int | None, whole: bool) -> Tensor:
        """An argument that is mapped over dimension `at` as that of the one call. whole: none that is broadcast along
        `dim` will do, since each call gets a gradient of its own."""
        kind = KINDS.get(name)
        if at is None and not whole and (kind is None or self.is_shared(kind, x)):
            return x
        x = x.expand(self.size, *x.shape) if at is None else move_dim(x, at, 0)
        if kind == "rows" and x.dim() == 2:  # empty
            return x[0]
        if kind in ("lengths", "of_heads"):
            return x.flatten(0, 1)
        if kind in ("pairs", "slopes"):
            sizes = list(x.shape)
            sizes[self.dim + 1] = self.batch if self.dim == BATCH_DIM else self.heads
            x = x.expand(sizes)
        return move_dim(x, 0, self.dim).flatten(self.dim, self.dim + 1)

    def is_shared(self, kind: str, x: Tensor) -> bool:
        """Whether the one call can take what all calls share as it is."""
        if kind == "pairs" or (kind == "slopes" and self.dim == BATCH_DIM):
            return x.shape[self.dim] == 1
        return kind == ("of_heads" if self.dim == BATCH_DIM else "lengths")

    def unfold(self, name: str, x: Tensor, sum_bias: bool = False) -> Tensor:
        """A result of the one call as (size, ...). sum_bias: the bias is broadcast along `dim`."""
        if KINDS[name] == "of_heads":
            return split_dim(x, 0, self.size)
        x = move_dim(split_dim(x, self.dim, self.size), self.dim, 0)
        return x.sum(self.dim + 1, keepdim=True) if name == "grad_bias" and sum_bias else x


def choose_fold(
    tensors: dict[str, Tensor], dims: dict[str, int | None], size: int, results: Collection[str]
) -> Fold | None:
    """How calls on these tensors, each mapped over a dimension or shared by all, are one call with these results; None
    where they cannot be."""
    mapped = {KINDS.get(name) for name, at in dims.items() if at is not None}
    if None in mapped:  # the boundaries of packed sequences
        return None
    dim = BATCH_DIM
    own_sinks = "sinks" in tensors and "grad_sinks" in results
    if own_sinks or "of_heads" in mapped or "cu_seqlens" in tensors or "max_logit" in results:
        dim = HEADS_DIM
    if dim == HEADS_DIM and "lengths" in mapped:
        return None
    q = list(tensors["q"].shape)
    if dims["q"] is not None:
        q.pop(dims["q"])
    return Fold(size, q[0], q[1], dim)


def is_row_dependent(dropout_p: float, *mods: object) -> bool:
    """Whether a call's meaning depends on the numbers of its batch rows and heads."""
    return dropout_p > 0 or any(mod is not None for mod in mods)


# (position, name) of a Score's tensors, fewer to visit than all of its fields.
TENSORS = tuple((n, name) for n, (name, kind) in enumerate(list_operator_fields(Score).items()) if kind == "Tensor?")


def map_call(
    vmap: VmapInterpreter, q: Tensor, k: Tensor, v: Tensor, score: Score,
    run: Callable[[Tensor, Tensor, Tensor, Score], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """`run` under vmap, the innermost transform, past the dispatcher, which costs several times what this does; None
    where calls cannot be one."""
    if is_row_dependent(score.dropout_p, score.score_mod, score.block_mask):
        return None
    functorch, level = torch._C._functorch, vmap.level()
    tensors, dims = dict(q=q, k=k, v=v), {}
    for n, name in TENSORS:
        if isinstance(field := score[n], Tensor):
            tensors[name] = field
    for name, x in tensors.items():
        is_mapped = functorch.is_batchedtensor(x) and functorch.maybe_get_level(x) == level
        dims[name] = functorch.maybe_get_bdim(x) if is_mapped else None
        tensors[name] = functorch.get_unwrapped(x) if is_mapped else x
    fold = choose_fold(tensors, dims, vmap.batch_size(), ())
    if fold is None:
        return None
    with vmap.lower():
        folded: dict[str, Any] = fold.fold_all(tensors, dims, False)
        q, k, v = (folded.pop(name) for name in "qkv")
        out, lse = run(q, k, v, score._replace(**folded) if folded else score)
        out, lse = fold.unfold("out", out), fold.unfold("lse", lse)
    return functorch._add_batch_dim(out, 0, level), functorch._add_batch_dim(lse, 0, level)
