"""The peers of attention. Each function prepares a call of (q, k, v), (batch, heads, seq, head_dim)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLASH_ATTN = ("flash_attn", "flash_attn_interface")  # packages: version 2 and version 3


def prepare_sdpa(name: str, causal: bool, rehearse: bool) -> Attention:
    """PyTorch's scaled_dot_product_attention with this backend only; in a rehearsal with its math backend."""
    backend = SDPBackend.MATH if rehearse else BACKENDS[name]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return call


def prepare_flex(causal: bool, seq: int, device: torch.device, rehearse: bool) -> Attention:
    """FlexAttention, compiled; in a rehearsal eager."""

    def is_causal(b, h, i, j):
        return i >= j

    block_mask = create_block_mask(is_causal, None, None, seq, seq, device) if causal else None
    compiled = flex_attention if rehearse else torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

    return call


def prepare_flash_attn(package: str, causal: bool) -> Attention:
    """The package flash_attn, which takes (batch, seq, heads, head_dim): transposed views, not copies."""
    function = importlib.import_module(package).flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
        return (out if isinstance(out, Tensor) else out[0]).transpose(1, 2)

    return call


@functools.cache
def find_installed() -> tuple[str, ...]:
    return tuple(name for name in FLASH_ATTN if importlib.util.find_spec(name) is not None)


def list_attention_peers(causal: bool, rehearse: bool) -> dict[str, Callable[[], Attention]]:
    """Functions that prepare each peer, by name, without those that must be compiled."""
    found: dict[str, Callable[[], Attention]] = {
        name: functools.partial(prepare_sdpa, name, causal, rehearse) for name in BACKENDS
    }
    return found | {name: functools.partial(prepare_flash_attn, name, causal) for name in find_installed()}
