"""Meta tensors and FakeTensors, which have shapes and no data: what a call gives has the shape, dtype and strides of
what it gives with data, and a backward too."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import flashattn
from flashattn.compat import flash_attn
from flashattn.compat.flex import flex_attention
from flashattn.compat.sdpa import scaled_dot_product_attention

CALLS = {
    "attention": lambda q, n: flashattn.attention(q, q, q[..., :4], causal=True),
    "lengths": lambda q, n: flashattn.attention(q, q, q, kv_lengths=n[1:], q_lengths=n[1:]),
    "dropout": lambda q, n: flashattn.attention(q, q, q, dropout_p=0.3, seed=1, mask=q[:1, :1, :, :6] > 0),
    "score_mod": lambda q, n: flashattn.attention(q, q, q, score_mod=lambda s, b, h, i, j: s * 2),
    "packed": lambda q, n: flashattn.attention_varlen(*[q[0].transpose(0, 1)] * 3, n, n, 6, 6),
    "flash_attn": lambda q, n: flash_attn.flash_attn_func(*[q.transpose(1, 2)] * 3, causal=True),
    "flash_attn_packed": lambda q, n: flash_attn.flash_attn_varlen_func(*[q[0].transpose(0, 1)] * 3, n, n, 6, 6),
    "sdpa": lambda q, n: scaled_dot_product_attention(q, q, q, attn_mask=q[:, :, :, :6]),
    "flex": lambda q, n: flex_attention(q, q, q),
    "layer_norm": lambda q, n: flashattn.layer_norm(q, q[0, 0, 0], q[0, 0, 0], residual=q, dropout_p=0.1, seed=1),
    "rms_norm": lambda q, n: flashattn.rms_norm(q.transpose(1, 2), q[0, 0, 0]),
}


def run(name, convert):
    q = convert(torch.randn(2, 6, 4, 8)).transpose(1, 2).requires_grad_()
    out = CALLS[name](q, convert(torch.tensor([0, 2, 6], dtype=torch.int32)))
    return out, torch.autograd.grad(out.sum(), q)[0]


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", CALLS)
def test_as_with_data(name, kind):
    expected = run(name, lambda x: x)
    if kind == "meta":
        found = run(name, lambda x: x.to("meta"))
    else:
        with FakeTensorMode() as mode:
            found = run(name, mode.from_tensor)
            assert all(isinstance(x, FakeTensor) for x in found)
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert found[0].stride() == expected[0].stride()


def test_lengths_that_would_have_to_be_read():
    with FakeTensorMode() as mode:
        x, starts = mode.from_tensor(torch.randn(6, 2, 8)), mode.from_tensor(torch.tensor([0, 6], dtype=torch.int32))
        with pytest.raises(ValueError, match=r"max_seqlen_q must be given .*where cu_seqlens_q has no data, got None"):
            flashattn.attention_varlen(x, x, x, starts, starts)
