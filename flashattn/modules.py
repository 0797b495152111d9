"""The norms as modules, with torch.nn's constructors and state dicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .norm import layer_norm, rms_norm


class _Norm(nn.Module):
    def __init__(self, normalized_shape, eps, elementwise_affine, bias, heads, weight_offset, device, dtype):
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) != 1:
            raise ValueError(f"normalized_shape must be the width of the last dimension alone, got {shape}")
        self.normalized_shape, self.eps, self.weight_offset = shape, eps, weight_offset
        shape = shape if heads is None else (heads, *shape)
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1 - self.weight_offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class LayerNorm(_Norm):
    """`torch.nn.LayerNorm` over the last dimension, fused, with a residual and `prenorm` in the call.

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

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False):
        return layer_norm(
            x, self.weight, self.bias, self.eps, residual, prenorm=prenorm, weight_offset=self.weight_offset
        )


class RMSNorm(_Norm):
    """`torch.nn.RMSNorm` over the last dimension, fused, with a residual and `prenorm` in the call. As there, eps None
    is the machine epsilon of x's dtype; `heads` as in `LayerNorm`.

    >>> import torch, flashattn
    >>> flashattn.RMSNorm(64, eps=1e-6)(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(
        self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None,
        *, heads=None, weight_offset=0.0,
    ):  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, False, heads, weight_offset, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False):
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps, residual, prenorm=prenorm, weight_offset=self.weight_offset)
