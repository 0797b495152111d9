"""`MultiheadAttention`, `LayerNorm` and `RMSNorm` as modules, with torch.nn's constructors and state dicts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import nested
from .attention import attention, attention_varlen
from .errors import ArgumentValueError, raise_as_torch
from .norm import layer_norm, rms_norm

Inputs = ParamSpec("Inputs")


def _with_signature(of: Callable[Inputs, None]) -> Callable[[Callable], Callable[Inputs, None]]:
    """A decorator for a function that passes on what it is given."""
    return functools.wraps(of)


def _wait_for_results(module: nn.Module, inputs: tuple, results) -> None:
    """A hook that does nothing. In evaluation `torch.nn.TransformerEncoderLayer` computes all of itself from the
    parameters of its parts, without calling them, unless one of them has a forward hook."""


class _Norm(nn.Module):
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, normalized_shape, eps, elementwise_affine, bias, heads, weight_offset, device, dtype):
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) == 0 or (heads is not None and len(shape) != 1):
            wanted = "one dimension" if heads is not None else "at least one dimension"
            raise ArgumentValueError(f"normalized_shape must have {wanted}, got {shape}")
        self.normalized_shape, self.eps, self.weight_offset = shape, eps, weight_offset
        shape = shape if heads is None else (heads, *shape)
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, value)
        if self.bias is None or weight_offset != 0:  # an encoder layer takes it for torch.nn.LayerNorm's parameters
            self.register_forward_hook(_wait_for_results)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1 - self.weight_offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _flatten_dims(
        self, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """x, weight, bias and residual as the norm over one dimension takes them."""
        dims = len(self.normalized_shape)
        if not x.is_nested and tuple(x.shape[-dims:]) != self.normalized_shape:
            raise ValueError(f"x must end in normalized_shape {self.normalized_shape}, got shape {tuple(x.shape)}")
        if dims == 1:
            return x, self.weight, self.bias, residual
        for name, p in (("weight", self.weight), ("bias", self.bias)):
            if p is not None and p.shape != self.normalized_shape:
                raise ValueError(f"{name} must have normalized_shape {self.normalized_shape}, got {tuple(p.shape)}")
        weight, bias, residual = (None if p is None else p.flatten(-dims) for p in (self.weight, self.bias, residual))
        return x.flatten(-dims), weight, bias, residual

    def _unflatten_dims(self, results: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if len(self.normalized_shape) == 1:
            return results
        if isinstance(results, tuple):
            return tuple(y.unflatten(-1, self.normalized_shape) for y in results)
        return results.unflatten(-1, self.normalized_shape)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class LayerNorm(_Norm):
    """`torch.nn.LayerNorm`, over the last dimensions, fused, with residual, `prenorm` and `dropout_p` in the call (the
    caller gives `dropout_p` in training only).

    With `heads`, x is (..., heads, width) and the parameters are (heads, width): each head has its own.

    >>> import torch, flashattn
    >>> flashattn.LayerNorm(64)(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(
        self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, device=None, dtype=None,
        *, heads=None, weight_offset=0.0,
    ):  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, bias, heads, weight_offset, device, dtype)

    @raise_as_torch
    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, dropout_p: float = 0.0):
        x, weight, bias, residual = self._flatten_dims(x, residual)
        y = layer_norm(
            x, weight, bias, self.eps, residual, dropout_p, prenorm=prenorm, weight_offset=self.weight_offset
        )
        return self._unflatten_dims(y)


class RMSNorm(_Norm):
    """`torch.nn.RMSNorm`, over the last dimensions, with residual, `prenorm` and `dropout_p` in the call. As in
    `torch.nn`, eps None is the machine epsilon of the dtype it computes in, float32's in 16 bits; `heads` as in
    `LayerNorm`.

    >>> import torch, flashattn
    >>> flashattn.RMSNorm(64, eps=1e-6)(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(
        self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None,
        *, heads=None, weight_offset=0.0,
    ):  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, False, heads, weight_offset, device, dtype)

    @raise_as_torch
    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, dropout_p: float = 0.0):
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        x, weight, _, residual = self._flatten_dims(x, residual)
        y = rms_norm(x, weight, eps, residual, dropout_p, prenorm=prenorm, weight_offset=self.weight_offset)
        return self._unflatten_dims(y)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: its constructor, arguments, state dict and masks (True = masked, in both).

    Without `need_weights` nothing of size (seq_q, seq_k) is made, and masks are not expanded. With it the weights are,
    by PyTorch's own operations, and after dropout, as in `torch.nn`. A fully masked row gives zeros, not NaN, before
    the output projection. In a `torch.nn.TransformerEncoderLayer` it computes in evaluation too, where PyTorch's own
    module would not be called. Nested inputs (batch, seq, embed_dim) are taken without masks and need_weights.

    >>> import torch, flashattn
    >>> layer = flashattn.MultiheadAttention(64, 4, batch_first=True)
    >>> x = torch.randn(2, 5, 64)
    >>> out, weights = layer(x, x, x)
    >>> out.shape, weights.shape
    (torch.Size([2, 5, 64]), torch.Size([2, 5, 5]))
    """

    @_with_signature(nn.MultiheadAttention.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_forward_hook(_wait_for_results)

    @raise_as_torch
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, weights or None). Arguments and shapes as in torch.nn: (seq, batch, embed_dim), (batch, seq, embed_dim)
        with `batch_first`, or (seq, embed_dim). `is_causal` says that attn_mask, which must be there, is causal."""
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given where is_causal is True, as torch.nn has it; got None")
        if any(map(nested.is_nested, (query, key, value))):
            masks = dict(key_padding_mask=key_padding_mask, attn_mask=attn_mask, bias_k=self.bias_k)
            return self._nested(query, key, value, masks, need_weights), None
        for name, x in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if x is not None and x.dtype != torch.bool and not x.is_floating_point():
                raise TypeError(f"{name} must be bool (True = masked) or floating (added to the scores), got {x.dtype}")
        batched = query.dim() == 3
        first = 0 if self.batch_first and batched else 1  # the batch dimension
        if not batched:
            query, key, value = query[:, None], key[:, None], value[:, None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = (self._split_heads(x, first) for x in self._project(query, key, value))
        padding = None if key_padding_mask is None else key_padding_mask[:, None, None]  # (batch, 1, 1, seq_k)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        k, v, (padding, attn_mask) = self._add_keys(k, v, padding, attn_mask)
        mask, bias = _combine_masks(attn_mask, padding, q.dtype)
        dropout_p = self.dropout if self.training else 0.0
        weights: Tensor | None
        if need_weights or dropout_p == 1:
            out, weights = _attend_with_weights(q, k, v, mask, bias, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = None if not need_weights else weights if batched else weights[0]
        else:
            out, weights = attention(q, k, v, mask=mask, bias=bias, dropout_p=dropout_p), None
        out = out.transpose(1, 2) if first == 0 else out.permute(2, 0, 1, 3)
        out = functional.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        return out if batched else out[:, 0], weights

    def _nested(self, query: Tensor, key: Tensor, value: Tensor, masks: dict, need_weights: bool) -> Tensor:
        """Out of nested inputs, whose sequences are packed."""
        for name, x in masks.items():
            if x is not None:
                raise ValueError(f"{name} must be None where query is nested")
        if need_weights or self.add_zero_attn:
            name = "need_weights" if need_weights else "add_zero_attn"
            raise ValueError(f"{name} must be False where query is nested")
        for name, x in (("query", query), ("key", key), ("value", value)):
            nested.check_nested(name, x, 3, "(batch, seq, embed_dim), as query, key or value is")
        q, starts_q = nested.pack(query)
        k, starts_k = (q, starts_q) if key is query else nested.pack(key)
        v, starts_v = (k, starts_k) if value is key else nested.pack(value)
        nested.check_same_lengths("value", starts_v, "key", starts_k)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in self._project(q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        longest = map(nested.bound_longest, (q, k))
        out = attention_varlen(q, k, v, starts_q.int(), starts_k.int(), *longest, dropout_p=dropout_p)
        out = functional.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)
        return nested.unpack(out, starts_q, query.layout)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim and query is key is value:
            return functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(functional.linear, (query, key, value), weights, biases))

    def _split_heads(self, x: Tensor, first: int) -> Tensor:
        """(batch, heads, seq, head_dim), a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if first == 0 else x.permute(1, 2, 0, 3)

    def _add_keys(self, k: Tensor, v: Tensor, *masks: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """With add_bias_kv and add_zero_attn: one more key and value each, which no mask hides."""
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, self._split_heads(extra, 1).expand(x.shape[0], -1, -1, -1)], 2)
                for x, extra in ((k, self.bias_k), (v, self.bias_v))
            )
            added += 1
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
            added += 1
        return k, v, [None if m is None else functional.pad(m, (0, added)) for m in masks]


def _combine_masks(
    attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Both masks, boolean (True = masked) or added to the scores, as a mask (True = attend) and a bias. Neither is
    expanded: of two boolean ones, that of the padding becomes a bias of -inf."""
    given = [m for m in (attn_mask, padding) if m is not None]
    masks, biases = [~m for m in given if m.dtype == torch.bool], [m.to(dtype) for m in given if m.dtype != torch.bool]
    if len(masks) == 2 and padding is not None:
        hidden = torch.zeros(padding.shape, dtype=dtype, device=padding.device)
        biases = [hidden.masked_fill_(padding, float("-inf"))]
    bias = biases[0] + biases[1] if len(biases) == 2 else biases[0] if biases else None
    return masks[0] if masks else None, bias


def _attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(out, weights), with the weights written out."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    weights = functional.dropout(weights, dropout_p)
    return weights @ v, weights
