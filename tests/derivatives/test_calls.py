"""The derivatives of every call and drop-in, by PyTorch's own checks in float64; and what has none, which is refused
wherever PyTorch would take it to be 0."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import flashattn
from flashattn.compat import flex, sdpa
from flashattn.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

X = torch.linspace(-1, 1, 60, dtype=torch.float64).sin().view(1, 2, 5, 6)
STARTS = torch.tensor([0, 2, 5], dtype=torch.int32)
MULTIHEAD = flashattn.MultiheadAttention(12, 2).double()
LAYER = flashattn.LayerNorm(6).double()


def pack(x):
    return x[0].transpose(0, 1)


def nest(x):
    return torch.nested.nested_tensor_from_jagged(pack(x), STARTS.long()).transpose(1, 2)


def transformers_layer(x):
    from flashattn.compat.transformers import attention_forward

    class Module(torch.nn.Module):
        is_causal = True

    return attention_forward(Module(), x, X, X, None, scaling=0.4)[0]


CALLS = {
    "q": lambda x: flashattn.attention(x, X, X),
    "k": lambda x: flashattn.attention(X, x, X, causal=True),
    "v": lambda x: flashattn.attention(X, X, x, dropout_p=0.3, seed=1),
    "self": lambda x: flashattn.attention(x, x, x, softcap=2.0),
    "bias": lambda x: flashattn.attention(X, X, X, bias=x[..., :5]),
    "sinks": lambda x: flashattn.attention(X, X, X, sinks=x[0, :, 0, 0]),
    "slopes": lambda x: flashattn.attention(x, X, x, alibi_slopes=torch.tensor([0.5, 0.25])),
    "lse": lambda x: flashattn.attention(x, X, X, return_lse=True)[1],
    "aux": lambda x: flashattn.attention(x, X, X, return_aux=flashattn.AuxRequest(lse=True))[1].lse,
    "lengths": lambda x: flashattn.attention(x, x, x, kv_lengths=torch.tensor([3])),
    "score_mod": lambda x: flashattn.attention(x, X, x, score_mod=lambda s, b, h, i, j: s * s + 0.1 * (i - j)),
    "packed": lambda x: flashattn.attention_varlen(*[pack(x)] * 3, STARTS, STARTS, 3, 3, causal=True),
    "packed_lse": lambda x: flashattn.attention_varlen(*[pack(x)] * 3, STARTS, STARTS, 3, 3, return_lse=True)[1],
    "layer_norm": lambda x: flashattn.layer_norm(x, x[0, 0, 0], x[0, 1, 0], residual=x * x),
    "rms_norm": lambda x: flashattn.rms_norm(x, x[0, 0, 0], weight_offset=1.0),
    "dropout": lambda x: flashattn.rms_norm(x, X[0, 0, 0], residual=x, dropout_p=0.4, seed=3, prenorm=True),
    "module": LAYER,
    "multihead": lambda x: MULTIHEAD(*[x.reshape(5, 12)] * 3, need_weights=False)[0],
    "weights": lambda x: MULTIHEAD(*[x.reshape(5, 12)] * 3)[1],
    "sdpa": lambda x: sdpa.scaled_dot_product_attention(x, X, x, is_causal=True),
    "flex": lambda x: flex.flex_attention(x, X, x, score_mod=lambda s, b, h, i, j: torch.tanh(s)),
    "flash_attn": lambda x: flash_attn_func(x, X, x, softcap=3.0),
    "flash_attn_varlen": lambda x: flash_attn_varlen_func(*[pack(x)] * 3, STARTS, STARTS, 3, 3),
    "transformers": transformers_layer,
}


@pytest.mark.parametrize("name", CALLS)
def test_first_derivatives(name):
    x = X.clone().requires_grad_()
    options = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradcheck(CALLS[name], x, **options)


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives(name):
    x = X.clone().requires_grad_()
    assert gradgradcheck(CALLS[name], x, check_fwd_over_rev=True, check_batched_grad=True)


def test_captured_tensors():
    """A callable captures the tensor itself, so it is made in the function that is differentiated."""

    def call(x, c):
        return flashattn.attention(x, X, x, score_mod=lambda s, b, h, i, j: torch.sin(s * c[h]) + c[h] * c[h])

    inputs = [x.clone().requires_grad_() for x in (X, X[0, :, 0, 0])]
    assert gradcheck(call, inputs, check_forward_ad=True)
    assert gradgradcheck(call, inputs, check_fwd_over_rev=True)


# ------------------------------------------------------------------------------------------------ refused

Q = X.float()


def rotated(x):
    cos, sin = x[0, 0, :, :3], x[0, 1, :, :3]
    return flashattn.decode(Q, flashattn.KVCache(1, 2, 8, 6), Q, Q, flashattn.Rotary(cos, sin))


REFUSED = {
    "alibi_slopes": lambda x: flashattn.attention(Q, Q, Q, alibi_slopes=x[0, :, 0, 0]),
    "return_aux": lambda x: flashattn.attention(x, Q, Q, return_aux=flashattn.AuxRequest(entropy=True))[1].entropy,
    "decode": lambda x: flashattn.decode(x, flashattn.KVCache(1, 2, 8, 6), x, x),
    "decode with rotary": rotated,
    "decode into the cache": lambda x: flash_attn_with_kvcache(Q, x, Q.clone(), cache_seqlens=2),
}


def take_dual(call, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


MODES = {
    "dual": take_dual,
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (torch.ones_like(x),)),
    "vmap": lambda call, x: torch.func.jvp(torch.vmap(call), (x[None],), (torch.ones_like(x[None]),)),
    "compiled": lambda call, x: take_dual(torch.compile(call, backend="eager"), x),
}


@pytest.mark.parametrize("mode", ["dual", "jvp"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_tangent_is_refused(name, mode):
    with pytest.raises(NotImplementedError, match=f"{name.split()[0]} has no derivative, in forward mode either"):
        MODES[mode](REFUSED[name], Q)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["q", "layer_norm"])
def test_every_way_to_a_tangent(name, mode):
    found = MODES[mode](CALLS[name], X)
    found = found if isinstance(found, torch.Tensor) else found[1].view(X.shape)
    x = X.clone().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(CALLS[name], x)
    torch.testing.assert_close(found, jacobian.sum((4, 5, 6, 7)))


@pytest.mark.parametrize("name", ["q", "layer_norm"])
def test_a_tangent_can_be_differentiated(name):
    """Of dual numbers, where tangents and gradients are at one level."""

    def change(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(CALLS[name](forward_ad.make_dual(x, torch.cos(X)))).tangent

    assert gradcheck(change, X.clone().requires_grad_())


@pytest.mark.parametrize("name", ["q", "layer_norm"])
def test_a_third_derivative(name):
    """Norms have all; attention has two, and refuses the third."""
    x = X.clone().requires_grad_()

    def second(x):
        (first,) = torch.autograd.grad(CALLS[name](x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)[0]

    if name == "layer_norm":
        assert gradcheck(second, x, fast_mode=True)
    else:
        with pytest.raises(NotImplementedError, match="a third derivative"):
            second(x).sum().backward()


def test_forward_mode_of_forward_mode_is_refused():
    with pytest.raises(NotImplementedError, match="forward mode of forward mode"):
        torch.func.jvp(lambda x: torch.func.jvp(CALLS["q"], (x,), (X,))[1], (X,), (X,))


def test_what_has_no_tangent_is_computed():
    plain = flashattn.attention(Q, Q, Q)
    with forward_ad.dual_level():
        forward_ad.make_dual(Q, Q)
        assert torch.equal(flashattn.attention(Q, Q, Q), plain)
        assert torch.equal(torch.compile(lambda x: flashattn.attention(x, x, x), backend="eager")(Q), plain)
