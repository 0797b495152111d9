"""Calls for the tests of this folder: forward and backward, on tensors of a device."""

import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashattn
from flashattn.compat import flash_attn


def make_tensors(device, *sizes: int, dtype=torch.bfloat16, requires_grad=False) -> list[torch.Tensor]:
    """q, k and v of (batch, heads, seq, head_dim); k and v with half the heads, at least one."""
    batch, heads, seq, dim = sizes
    shapes = [(batch, n, seq, dim) for n in (heads, max(1, heads // 2), max(1, heads // 2))]
    return [torch.randn(*s, device=device).to(dtype).requires_grad_(requires_grad) for s in shapes]


def assert_same(results, expected) -> None:
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)


def run_attention(q, k, v, **options) -> list[torch.Tensor]:
    """out and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = flashattn.attention(q, k, v, causal=True, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), out.detach())]


def run_norm(x, weight) -> list[torch.Tensor]:
    """y and the residual of a LayerNorm of x + x, and the gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y, h = flashattn.layer_norm(x, weight, residual=x * 1, prenorm=True)
    return [y.detach(), h.detach(), *torch.autograd.grad(y.float().square().sum() + h.float().sum(), (x, weight))]


def run_packed(q, k, v, starts, longest: int) -> list[torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = flashattn.attention_varlen(q, k, v, starts, starts, longest, longest, causal=True)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), out.detach())]


def prepare_attention(device):
    inputs = make_tensors(device, 2, 2, 63, 32)
    slopes = torch.rand(2, device=device)
    lengths = torch.tensor([63, 40], device=device)
    return inputs, lambda: run_attention(*inputs, alibi_slopes=slopes, kv_lengths=lengths, dropout_p=0.2, seed=5)


def prepare_packed(device):
    """The lengths are inputs too: each replay reads them."""
    inputs = [x[0].transpose(0, 1).contiguous() for x in make_tensors(device, 1, 2, 111, 32)]
    starts = torch.tensor([0, 70, 111], dtype=torch.int32, device=device)
    middle = starts[1:2]
    return [*inputs, middle], lambda: run_packed(*inputs, starts, 111)


def prepare_norms(device):
    inputs = [torch.randn(40, 3, 64, device=device), torch.randn(64, device=device)]
    return inputs, lambda: run_norm(*inputs)


def prepare_decoding(device):
    """With flash_attn's call, whose lengths are on the GPU; five splits of the keys at full capacity."""
    q, k, v = (torch.randn(2, 1, heads, 64, device=device).bfloat16() for heads in (4, 2, 2))
    caches = torch.randn(2, 2, 600, 2, 64, device=device).bfloat16()
    lengths = torch.tensor([500, 7], dtype=torch.int32, device=device)
    angles = torch.rand(600, 16, device=device) * 6

    def step():
        here = caches.clone()
        out = flash_attn.flash_attn_with_kvcache(
            q, *here, k, v, angles.cos(), angles.sin(), cache_seqlens=lengths, causal=True
        )
        return [out, here]

    return [q, k, v, caches, lengths], step


def prepare_callables(device):
    inputs = make_tensors(device, 1, 2, 70, 32)
    table, document = torch.randn(2, 200, device=device), torch.arange(70, device=device) // 30
    mask = create_block_mask(lambda b, h, i, j: document[i] == document[j], None, None, 70, 70, device, 32)

    def mod(score, b, h, i, j):
        return score + table[h, i - j + 70]

    return [*inputs, table], lambda: run_attention(*inputs, score_mod=mod, block_mask=mask)


GRAPH_CASES = {
    "attention": prepare_attention, "packed": prepare_packed, "norms": prepare_norms,
    "decoding": prepare_decoding, "callables": prepare_callables,
}  # fmt: skip
