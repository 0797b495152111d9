"""flashattn as a provider of PyTorch's flash attention: after

    torch.nn.attention.activate_flash_attention_impl("flashattn")

`torch.nn.functional.scaled_dot_product_attention` runs on flashattn's kernels wherever PyTorch would choose flash
attention, from C++ too, until `torch.nn.attention.restore_flash_attention_impl()` (PyTorch 2.10 lacks it: there the
process keeps flashattn). Importing this module, as `import flashattn.compat.sdpa` does, registers the name and
activates nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends, ops
from ..protocol import Saved
from ..score import Score
from . import layout

NAME = "flashattn"
# PyTorch's operators save lse without its rounding error, which scales every weight of the backward: 6e-8 of its size.
# Above this, as with masks of -1e9, the backward reruns the forward. (On a GPU the operator takes no such mask.)
MAX_ROUNDED_LSE = 128


class Handle:
    """The kernels in PyTorch's dispatcher, until `remove`."""

    def __init__(self, *libraries: torch.library.Library):
        self.libraries = libraries

    def remove(self) -> None:
        for library in self.libraries:
            library._destroy()
        self.libraries = ()


def register_kernels() -> Handle:
    cpu, cuda = (torch.library.Library("aten", "IMPL", key) for key in ("CPU", "CUDA"))
    cpu.impl("_scaled_dot_product_flash_attention_for_cpu", cpu_forward)
    cpu.impl("_scaled_dot_product_flash_attention_for_cpu_backward", cpu_backward)
    cuda.impl("_scaled_dot_product_flash_attention", cuda_forward)
    cuda.impl("_scaled_dot_product_flash_attention_backward", cuda_backward)
    return Handle(cpu, cuda)


def forward(query, key, value, dropout_p, is_causal, mask, scale, seed) -> tuple[Tensor, Tensor]:
    """(out, lse), with out in the memory layout of PyTorch's own kernels, which compiled graphs assume."""
    call = build_call(query, key, value, dropout_p, is_causal, mask, scale, seed)
    with torch.no_grad():
        out, lse = ops.attention.attention(*call)
    return layout.lay_out_like(out, query), lse


def backward(grad_out, query, key, value, out, lse, dropout_p, is_causal, mask, scale, seed):
    q, k, v, score, backend = build_call(query, key, value, dropout_p, is_causal, mask, scale, seed)
    verbs, lse, rest = backends.BACKENDS[backend], lse.contiguous(), None
    if not lse.is_cuda and find_max_abs_lse(lse) > MAX_ROUNDED_LSE:
        _, lse, rest = verbs.forward(q, k, v, score)
    gradients = list(verbs.backward(grad_out, None, Saved(q, k, v, out, lse, rest), score, False, [])[:3])
    for i, x in ((1, key), (2, value)):
        if gradients[i].shape != x.shape:  # keys that no query attends to were cut off
            padded = x.new_zeros(x.shape)
            padded[:, :, : gradients[i].shape[2]] = gradients[i]
            gradients[i] = padded
    return tuple(gradients)


def build_call(query, key, value, dropout_p, is_causal, mask, scale, seed) -> tuple:
    """The arguments of `ops.attention.attention`. PyTorch has checked them; its causal mask is aligned top-left."""
    seq_q = query.shape[2]
    right = None
    if is_causal:
        key, value = key[:, :, :seq_q], value[:, :, :seq_q]
        right = seq_q - key.shape[2]
    bias = None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask if mask.shape[3] == 1 or mask.stride(3) in (0, 1) else mask.contiguous()
        if mask.dtype != torch.bool:
            mask, bias = None, mask
    scale = query.shape[3] ** -0.5 if scale is None else scale
    score = Score(scale, right=right, mask=mask, bias=bias, dropout_p=dropout_p, seed=seed)
    head_dim = max(query.shape[3], value.shape[3])
    backend = backends.choose(query.device, query.dtype, head_dim=head_dim)
    return query.detach(), key.detach(), value.detach(), score, backend


def cpu_forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    seed = draw_seed(query, dropout_p)
    out, lse = forward(query, key, value, dropout_p, is_causal, attn_mask, scale, seed)
    return out, layout.lay_out_by_token(lse)


def cpu_backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    if dropout_p != 0:
        raise RuntimeError("PyTorch's CPU operator keeps no seed, so dropout has no gradient through it")
    gradients = backward(grad_out, query, key, value, out, logsumexp, 0.0, is_causal, attn_mask, scale, None)
    return tuple(map(layout.lay_out_by_token, gradients))


def cuda_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    seed = draw_seed(query, dropout_p)
    out, lse = forward(query, key, value, dropout_p, is_causal, None, scale, seed)
    none = query.new_empty(0)
    rng_state = none.long() if seed is None else seed.view(1)
    return out, lse, none.int(), none.int(), query.shape[2], key.shape[2], rng_state, none.long(), none


def cuda_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    seed = philox_seed if dropout_p > 0 else None
    gradients = backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, None, scale, seed)
    return tuple(map(layout.lay_out_like, gradients, (query, key, value)))


def find_max_abs_lse(lse: Tensor) -> float:
    """The largest magnitude of lse, fully masked rows left out."""
    return torch.where(lse == -math.inf, 0, lse).abs().max().item() if lse.numel() else 0.0


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    return None if dropout_p == 0 else torch.randint(2**62, (), dtype=torch.int64, device=x.device)


torch.nn.attention.register_flash_attention_impl(NAME, register_fn=register_kernels)
