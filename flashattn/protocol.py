"""The interface of a backend: a module with these functions. Tensors are checked and on one device; those that a call
does not need are None."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cache import CacheView, Rotary
    from .score import Norm, Score


class Capabilities(NamedTuple):
    refused_dtypes: dict[torch.dtype, str]  # and why
    max_head_dim: int | None  # of head_dim and head_dim_v; None is no limit
    captures_mods: bool = False  # whether a CUDA graph can capture calls with callables


class Saved(NamedTuple):
    """The tensors that attention's forward saves for its backward."""

    q: Tensor  # (batch, heads, seq_q, head_dim)
    k: Tensor  # (batch, kv_heads, seq_k, head_dim)
    v: Tensor  # (batch, kv_heads, seq_k, head_dim_v)
    out: Tensor  # (batch, heads, seq_q, head_dim_v)
    lse: Tensor  # (batch, heads, seq_q), natural logarithm
    rest: Tensor | None  # likewise, or None: the rounding error of lse; weights exp(s - lse - rest) sum to one


class Tangents(NamedTuple):
    """The tangents of attention's inputs, each of its input's shape and dtype; None is 0."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    captured: tuple[Tensor | None, ...] = ()  # of the tensors that a score_mod captured, in their order

    def select(self, queries: slice, keys: slice, bias: Tensor | None) -> Tangents:
        """Those of some queries and keys; bias: their part of its tangent."""
        q = None if self.q is None else self.q[:, :, queries]
        k, v = (None if x is None else x[:, :, keys] for x in (self.k, self.v))
        return self._replace(q=q, k=k, v=v, bias=bias)


class SavedNorm(NamedTuple):
    """The tensors that a norm's forward saves for its backward."""

    hidden: Tensor  # what was normalised
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor  # (rows,), empty for RMSNorm
    rstd: Tensor  # (rows,)


class NormTangents(NamedTuple):
    """The tangents of a norm's inputs, each of its input's shape and dtype; None is 0."""

    x: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Backend(Protocol):
    CAPABILITIES: Capabilities

    def unavailable_reason(self, device: torch.device) -> str | None:
        """Why this machine cannot run it on tensors of the device; None if it can."""

    def has_rest(self, q: Tensor, score: Score) -> bool:
        """Whether forward returns the rest of lse."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor | None]:
        """(out, lse, rest), as in `Saved`."""

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, with_grad_bias: bool,
        grad_captured: list[Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """The gradients of q, k, v and, with_grad_bias, of the bias. Those of what a score_mod captured are added to
        grad_captured, where that has a tensor."""

    def jvp(
        self, q: Tensor, k: Tensor, v: Tensor, score: Score, tangents: Tangents
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """(out, lse, rest) of forward, and the tangents of out and lse: the derivative of forward, times the
        tangents."""

    def hvp(
        self, grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, tangents: Tangents,
        tangent_out: Tensor, tangent_lse: Tensor, with_grad_bias: bool, grad_captured: list[Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """The tangents of backward's results, of constant grad_out and grad_lse: the Hessian of
        sum(grad_out * out) + sum(grad_lse * lse), times the tangents. tangent_out and tangent_lse are those of jvp."""

    def attention_stats(self, q: Tensor, k: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(max_scores, max_logit, entropy, column_sums), as in `AuxOutput`."""

    def rotate(self, x: Tensor, starts: Tensor, counts: Tensor | None, rotary: Rotary) -> Tensor:
        """x (batch, heads, seq, dim), rotated; token t of batch row b is at position starts[b] + t. Tokens at and past
        counts[b] do not exist."""

    def append(
        self, q: Tensor, k: Tensor, v: Tensor, cached: CacheView, counts: Tensor | None, rotary: Rotary | None
    ) -> Tensor:
        """Write the first counts[b] new keys of each batch row, rotated, and values to the cache after those that it
        has. Returns q, rotated to the same positions."""

    def decode(self, q: Tensor, cached: CacheView, score: Score) -> tuple[Tensor, Tensor]:
        """(out, lse) of queries that are the last tokens of the cache."""

    def norm_forward(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        hidden_dtype: torch.dtype, keep_hidden: bool, norm: Norm,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
        """(y, hidden, mean, rstd); hidden if keep_hidden, mean of LayerNorm."""

    def norm_backward(
        self, grad_y: Tensor, grad_hidden: Tensor | None, saved: SavedNorm, x_dtype: torch.dtype,
        residual_dtype: torch.dtype | None, norm: Norm,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """The gradients of x, of the residual where it has a dtype, of weight and bias."""

    def norm_jvp(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, tangents: NormTangents,
        hidden_dtype: torch.dtype, keep_hidden: bool, norm: Norm,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """(y, hidden, mean, rstd) of norm_forward, and the tangents of y and hidden."""

    def norm_hvp(
        self, grad_y: Tensor, saved: SavedNorm, tangent_hidden: Tensor, tangent_weight: Tensor | None,
        x_dtype: torch.dtype, residual_dtype: torch.dtype | None, norm: Norm,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The tangents of norm_backward's gradients of x, residual and weight, of constant grad_y and grad_hidden; that
        of the gradient of the bias is 0."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weight^T + bias, without a gradient."""
