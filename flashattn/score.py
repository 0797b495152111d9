"""`Score` and `Norm`: the checked options of attention and of a norm, which every backend reads, and their fields in
the schemas of operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, ForwardRef, NamedTuple, TypedDict, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from .score_mod import BlockMask, Traced


class Score(NamedTuple):
    """How attention weights are made from q.k:

        s = scale * q.k;  s = softcap * tanh(s / softcap);  s += bias - slope * distance;  s = score_mod(s)
        s = -inf where masked;  p = exp(s) / (sum(exp(s)) + exp(sink)), then dropout

    This is the one list of its fields: operators take them in this order. `CONTRIBUTING.md`, "Add a feature of
    attention", lists where a new one has a meaning. `arguments.build_score` checks the arguments and fills it.
    """

    scale: float
    left: int | None = None  # query i attends to keys i - left <= j + seq_q - seq_k <= i + right, None = all on a side;
    right: int | None = None  # causal is right = 0
    q_lengths: Tensor | None = None  # (batch,) int32; queries at or past it attend to nothing
    kv_lengths: Tensor | None = None  # (batch,) int32; keys at or past it are masked
    softcap: float | None = None
    alibi_slopes: Tensor | None = None  # (batch or 1, heads) float32
    mask: Tensor | None = None  # bool, four dimensions, each that of the scores or 1; True = attend
    dropout_p: float = 0.0
    seed: Tensor | None = None  # () int64
    cu_seqlens: Tensor | None = None  # (2, batch + 1) int32: boundaries of packed sequences, in q and in k
    max_seqlen_q: int | None = None  # an upper bound of their lengths
    max_seqlen_k: int | None = None
    bias: Tensor | None = None  # floating, four dimensions, each that of the scores or 1; has a gradient
    sinks: Tensor | None = None  # (heads,) floating; has a gradient
    score_mod: Traced | None = None
    block_mask: BlockMask | None = None

    def saved_tensors(self) -> list[Tensor]:
        """The tensors without a gradient. Autograd saves them to notice a change in place between forward and backward,
        not for their contents. It cannot save tensors of inference mode."""
        fields = (self.q_lengths, self.kv_lengths, self.alibi_slopes, self.mask, self.seed, self.cu_seqlens)
        captured = () if self.block_mask is None else self.block_mask.mask.captured
        return [x for x in (*fields, *captured) if x is not None and not x.is_inference()]

    def sizes(self, q: Tensor, k: Tensor) -> tuple[int, int, int]:
        """(batch, seq_q, seq_k); of packed sequences their number and the largest possible lengths."""
        if self.cu_seqlens is None:
            return q.shape[0], q.shape[2], k.shape[2]
        assert self.max_seqlen_q is not None
        assert self.max_seqlen_k is not None
        return self.cu_seqlens.shape[1] - 1, min(self.max_seqlen_q, q.shape[2]), min(self.max_seqlen_k, k.shape[2])

    def bounds(self, seq_q: int, seq_k: int) -> tuple[int | None, int | None]:
        """(first, last): query i attends to keys i + first <= j <= i + last; None is no limit."""
        diagonal = seq_k - seq_q
        return (
            None if self.left is None else diagonal - self.left,
            None if self.right is None else diagonal + self.right,
        )

    def has_score_changes(self) -> bool:
        """Whether a field changes the scores scale * q.k, apart from masking some."""
        return any(self[n] is not None for n in CHANGES_SCORES)


KEEPS_SCORES = (
    "scale", "left", "right", "q_lengths", "kv_lengths", "mask", "dropout_p", "seed", "cu_seqlens", "max_seqlen_q",
    "max_seqlen_k", "sinks", "block_mask",
)  # fmt: skip
CHANGES_SCORES = tuple(n for n, name in enumerate(Score._fields) if name not in KEEPS_SCORES)  # a new field too


class ScoreOptions(TypedDict, total=False):
    """The options that `attention`, `attention_varlen` and `decode` hand over as they are; None by default. `attention`
    documents them."""

    window: tuple[int | None, int | None] | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    scale: float | None


def read_annotations(settings: type) -> dict[str, str]:
    """{name: its annotation as text} of the fields of a class of this file."""
    hints = settings.__annotations__.items()
    return {name: hint.__forward_arg__ if isinstance(hint, ForwardRef) else hint for name, hint in hints}


Call = TypeVar("Call", bound=Callable)


def list_options(call: Call) -> Call:
    """A decorator for a call with **options: Unpack[ScoreOptions], which names them in its signature."""
    signature = inspect.signature(call)
    *own, _ = signature.parameters.values()
    shared = (
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in read_annotations(ScoreOptions).items()
    )
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]  # which inspect looks for
        parameters=[*own, *shared]
    )
    return call


class Norm(NamedTuple):
    """The options of a norm: y = (h - mean) / sqrt(var + eps) * (weight + weight_offset) + bias, of
    h = residual + dropout(x)."""

    center: bool  # subtract the mean: LayerNorm does, RMSNorm does not
    eps: float
    weight_offset: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None  # () int64


SCHEMA_TYPES = {
    "bool": "bool", "float": "float", "float | None": "float?", "int": "SymInt", "int | None": "SymInt?", "str": "str",
    "Tensor | None": "Tensor?",
}  # fmt: skip


def list_operator_fields(settings: type) -> dict[str, str]:
    """{name: type in an operator's schema} of the fields of a named tuple that an operator takes one by one: those
    before the first whose type no operator has."""
    fields = {}
    for name, annotation in read_annotations(settings).items():
        if annotation not in SCHEMA_TYPES:
            break
        fields[name] = SCHEMA_TYPES[annotation]
    return fields


def write_operator_schema(settings: type) -> str:
    """Those fields as arguments of an operator's schema.

    >>> write_operator_schema(Norm)
    'bool center, float eps, float weight_offset, float dropout_p, Tensor? seed'
    """
    return ", ".join(f"{kind} {name}" for name, kind in list_operator_fields(settings).items())


SCORE_FIELDS = len(list_operator_fields(Score))  # all but the callables
