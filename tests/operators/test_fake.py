"""Meta tensors and FakeTensors, which have shapes and no data: what a call gives has the shape, dtype and strides of
what it gives with data, and a backward too."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

import flashattn
from flashattn.compat import flash_attn
from flashattn.compat.flex import flex_attention
from flashattn.compat.sdpa import scaled_dot_product_attention

AUX = flashattn.AuxRequest(max_scores=True, max_logit=True, entropy=True, column_sums=True)


def block_mask(q):
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, 6, 6, device=q.device)


def step(make):
    """A prompt and a token, with a head_dim_v of its own."""

    def call(like):
        cache, rotary = make(like.device), flashattn.Rotary(*like.new_ones(2, 9, 4))
        for seq in (3, 1):
            q, k, v = (like.new_ones(2, heads, seq, dim) for heads, dim in ((4, 8), (2, 8), (2, 12)))
            results = flashattn.decode(q, cache, k, v, rotary=rotary, return_lse=True)
        return *results, cache

    return call


def with_kvcache(causal):
    def call(like):
        q, k, v = (like.new_ones(2, 3, heads, dim) for heads, dim in ((4, 8), (2, 8), (2, 12)))
        caches = like.new_ones(2, 16, 2, 8), like.new_ones(2, 16, 2, 12)
        starts, (cos, sin) = like.new_ones(2, dtype=torch.int32), like.new_ones(2, 19, 4)
        return *flash_attn.flash_attn_with_kvcache(
            q, *caches, k, v, cos, sin, starts, causal=causal, return_softmax_lse=True
        ), None  # fmt: skip

    return call


def paged(device):
    cache = flashattn.PagedKVCache(8, 4, 2, 8, 12, device=device)
    return cache.select([cache.add(), cache.add()])


DECODING = {
    "contiguous": step(lambda device: flashattn.KVCache(2, 2, 8, 8, 12, device=device)),
    "paged": step(paged),
    "with_kvcache": with_kvcache(True),
    "with_kvcache_at_one_position": with_kvcache(False),
}

CALLS = {
    "attention": lambda q, n: flashattn.attention(q, q, q[..., :4], causal=True),
    "lengths": lambda q, n: flashattn.attention(q, q, q, kv_lengths=n[1:], q_lengths=n[1:]),
    "dropout": lambda q, n: flashattn.attention(q, q, q, dropout_p=0.3, seed=1, mask=q[:1, :1, :, :6] > 0),
    "score_mod": lambda q, n: flashattn.attention(q, q, q, score_mod=lambda s, b, h, i, j: s * 2),
    "packed": lambda q, n: flashattn.attention_varlen(*[q[0].transpose(0, 1)] * 3, n, n, 6, 6),
    "flash_attn": lambda q, n: flash_attn.flash_attn_func(*[q.transpose(1, 2)] * 3, causal=True),
    "flash_attn_packed": lambda q, n: flash_attn.flash_attn_varlen_func(*[q[0].transpose(0, 1)] * 3, n, n, 6, 6),
    "sdpa": lambda q, n: scaled_dot_product_attention(q, q, q, attn_mask=q[:, :, :, :6]),
    "block_mask": lambda q, n: flashattn.attention(q, q, q, block_mask=block_mask(q)),
    "return_aux": lambda q, n: flashattn.attention(q, q, q, return_aux=AUX, score_mod=lambda s, b, h, i, j: s * 2)[0],
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


MAKE_TENSORS = {"dropout", "block_mask", "return_aux", "layer_norm"}  # with data, outside the mode


@pytest.mark.parametrize("name", sorted(CALLS.keys() - MAKE_TENSORS))
def test_outside_the_mode(name):
    """There is no mode to ask: that an input is a FakeTensor has to bring the call to the dispatcher."""
    assert all(isinstance(x, FakeTensor) for x in run(name, FakeTensorMode().from_tensor))


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", DECODING)
def test_decoding_as_with_data(name, kind):
    """A cache moves on as ever."""
    *expected, kept = DECODING[name](torch.ones(1))
    if kind == "meta":
        *found, moved = DECODING[name](torch.ones(1, device="meta"))
    else:
        with FakeTensorMode() as mode:
            *found, moved = DECODING[name](mode.from_tensor(torch.ones(1)))
            assert all(isinstance(x, FakeTensor) for x in found)
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
    assert kept is moved is None or kept.lengths == moved.lengths == [4, 4]


def test_lengths_that_would_have_to_be_read():
    with FakeTensorMode() as mode:
        x, starts = mode.from_tensor(torch.randn(6, 2, 8)), mode.from_tensor(torch.tensor([0, 6], dtype=torch.int32))
        with pytest.raises(ValueError, match=r"max_seqlen_q must be given .*where cu_seqlens_q has no data, got None"):
            flashattn.attention_varlen(x, x, x, starts, starts)
