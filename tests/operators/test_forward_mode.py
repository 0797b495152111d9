"""Forward-mode derivatives are not implemented, so they are refused wherever PyTorch would take them to be 0."""

import pytest
import torch
from torch.autograd import forward_ad

import flashattn
from flashattn.compat import flex, sdpa
from flashattn.compat.flash_attn import flash_attn_func, flash_attn_with_kvcache

Q = torch.linspace(-1, 1, 120).view(1, 2, 5, 12)
STARTS = torch.tensor([0, 2, 5], dtype=torch.int32)


def packed(x):
    x = x[0].transpose(0, 1)
    return flashattn.attention_varlen(x, x, x, STARTS, STARTS, 3, 3)


def decode(x):
    return flashattn.decode(x, flashattn.KVCache(1, 2, 8, 12), x, x)


def in_the_cache(cache):
    return flash_attn_with_kvcache(Q, cache, Q.clone(), cache_seqlens=2)


def rotated(x):
    cos, sin = x[0, 0, :, :6], x[0, 1, :, :6]
    return flashattn.decode(Q, flashattn.KVCache(1, 2, 8, 12), Q, Q, flashattn.Rotary(cos, sin))


MULTIHEAD = flashattn.MultiheadAttention(24, 2)
CALLS = {
    "q": lambda x: flashattn.attention(x, Q, Q),
    "k": lambda x: flashattn.attention(Q, x, Q),
    "v": lambda x: flashattn.attention(Q, Q, x, dropout_p=0.1, seed=1),
    "bias": lambda x: flashattn.attention(Q, Q, Q, bias=x[..., :5]),
    "sinks": lambda x: flashattn.attention(Q, Q, Q, sinks=x[0, :, 0, 0]),
    "slopes": lambda x: flashattn.attention(Q, Q, Q, alibi_slopes=x[0, :, 0, 0]),
    "lse": lambda x: flashattn.attention(x, Q, Q, return_lse=True)[1],
    "entropy": lambda x: flashattn.attention(x, Q, Q, return_aux=flashattn.AuxRequest(entropy=True))[1].entropy,
    "score_mod": lambda x: flashattn.attention(x, Q, Q, score_mod=lambda score, *_: score * 2),
    "captured": lambda x: flashattn.attention(Q, Q, Q, score_mod=lambda s, b, h, i, j: s + x[b, h, i, j]),
    "packed": packed,
    "decode": decode,
    "rotary": rotated,
    "cache": in_the_cache,
    "layer_norm": lambda x: flashattn.layer_norm(x),
    "weight": lambda x: flashattn.rms_norm(Q, x[0, 0, 0]),
    "residual": lambda x: flashattn.rms_norm(Q, residual=x),
    "module": lambda x: flashattn.LayerNorm(12)(x),
    "multihead": lambda x: MULTIHEAD(*[x.view(5, 24)] * 3, need_weights=False)[0],
    "sdpa": lambda x: sdpa.scaled_dot_product_attention(x, Q, Q),
    "flex": lambda x: flex.flex_attention(x, Q, Q),
    "flash_attn": lambda x: flash_attn_func(x, Q, Q),
}


def dual(call, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


MODES = {
    "dual": dual,
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda call, x: torch.func.jacfwd(call)(x),
    "compiled": lambda call, x: dual(torch.compile(call, backend="eager"), x),
}


@pytest.mark.parametrize("mode", ["dual", "jvp"])
@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_refused(name, mode):
    with pytest.raises(NotImplementedError, match="flashattn has no forward-mode derivatives"):
        MODES[mode](CALLS[name], Q)


@pytest.mark.parametrize("mode", ["jacfwd", "compiled"])
@pytest.mark.parametrize("name", ["q", "layer_norm"])
def test_a_tangent_is_refused_in_every_mode(name, mode):
    with pytest.raises(NotImplementedError, match="flashattn has no forward-mode derivatives"):
        MODES[mode](CALLS[name], Q)


def test_a_tangent_behind_vmap_is_refused():
    def call(x):
        return torch.vmap(CALLS["q"])(x)

    with pytest.raises(NotImplementedError, match="flashattn has no forward-mode derivatives"):
        MODES["jvp"](call, Q[None])


@pytest.mark.parametrize("name", ["q", "score_mod", "layer_norm"])
def test_the_tangent_of_a_gradient_is_refused(name):
    x = Q.clone().requires_grad_()
    y = CALLS[name](x)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="flashattn has no forward-mode derivatives"),
    ):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_what_has_no_tangent_is_computed():
    plain = flashattn.attention(Q, Q, Q)
    with forward_ad.dual_level():
        forward_ad.make_dual(Q, Q)
        assert torch.equal(flashattn.attention(Q, Q, Q), plain)
        assert torch.equal(torch.compile(lambda x: flashattn.attention(x, x, x), backend="eager")(Q), plain)


@pytest.mark.parametrize("mode", ["dual", "jvp"])
@pytest.mark.parametrize("call", ["linear", "weights"])
def test_what_pytorch_computes_has_its_tangents(call, mode):
    """Few rows go to the engine, but not those that carry tangents; weights written out are PyTorch's operations."""
    weight = torch.linspace(-1, 1, 72).view(6, 12)
    calls = {"linear": lambda x: flashattn.linear(x, weight), "weights": lambda x: MULTIHEAD(*[x.view(5, 24)] * 3)[0]}
    theirs = torch.nn.MultiheadAttention(24, 2)
    theirs.load_state_dict(MULTIHEAD.state_dict())
    expected = {"linear": lambda x: x @ weight.T, "weights": lambda x: theirs(*[x.view(5, 24)] * 3)[0]}
    results = [MODES[mode](f[call], Q) for f in (calls, expected)]
    ours, truth = (x[1] if mode == "jvp" else x for x in results)
    assert truth.abs().max() > 0
    torch.testing.assert_close(ours, truth)
