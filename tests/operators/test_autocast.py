"""Under autocast each call casts as PyTorch's own does, and no kernel computes in fewer bits than without it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import flex_attention as flex

import flashattn
from flashattn.compat import flash_attn
from flashattn.compat.flex import flex_attention
from flashattn.compat.sdpa import scaled_dot_product_attention
from tests.common import BACKENDS, find_device, skip_if_wrong_there

STARTS = torch.tensor([0, 4, 9], dtype=torch.int32)
STEP = torch.arange(4.0)


def packed(q, k, v):
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    starts = STARTS.to(q.device)
    return flashattn.attention_varlen(q, k, v, starts, starts, 5, 5, causal=True)


ATTENTIONS = {
    "attention": lambda q, k, v: flashattn.attention(q, k, v, causal=True),
    "aux": lambda q, k, v: flashattn.attention(q, k, v, return_aux=flashattn.AuxRequest(entropy=True))[1].entropy,
    "bias": lambda q, k, v: flashattn.attention(q, k, v, bias=STEP[:2, None, None].to(q.device).half()),
    "score_mod": lambda q, k, v: flashattn.attention(q, k, v, score_mod=lambda s, b, h, i, j: s * 0.5),
    "block_mask": lambda q, k, v: flashattn.attention(
        q, k, v, block_mask=flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 9, 9, q.device, 16)
    ),
    "packed": packed,
    "sdpa": scaled_dot_product_attention,
    "flex": flex_attention,
}
DTYPES = (torch.float32, torch.float32, torch.float16)  # a rotation in float32, a projection in 16 bits


def inputs(device, dtypes=DTYPES):
    torch.manual_seed(0)
    return [torch.randn(1, 2, 9, 16).to(device, dtype).requires_grad_() for dtype in dtypes]


def results(call, x):
    """What a call gives, and its gradients, which are those of autocast too where backward runs in it."""
    out = call(*x)
    if not out.requires_grad:
        return [out]
    return [out, *torch.autograd.grad(out, x, torch.ones_like(out))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_casts(name, backend):
    """Inputs of different dtypes, as one that cast them itself."""
    device, dtype = find_device(backend), torch.float16
    skip_if_wrong_there(backend, dtype)
    with flashattn.use_backend(backend), torch.autocast(device.type, dtype):
        ours = results(ATTENTIONS[name], inputs(device))
    with flashattn.use_backend(backend):
        cast = [x.to(dtype) for x in inputs(device)]
        expected = results(ATTENTIONS[name], cast)
    assert ours[0].dtype == expected[0].dtype
    for x, given in zip(ours[1:], DTYPES, strict=len(ours) > 1):
        assert x.dtype == given
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(x, y.to(x.dtype))


@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_as_pytorchs_own(name, monkeypatch):
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    theirs = functional.scaled_dot_product_attention if name == "sdpa" else flex.flex_attention
    x = [t.detach() for t in inputs("cpu", (torch.float32,) * 3)]
    double = [t.double() for t in x]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert ATTENTIONS[name](*x).dtype == theirs(*x).dtype == dtype
            assert ATTENTIONS[name](*double).dtype == theirs(*double).dtype == torch.float64


def test_a_mask_of_sdpa_is_cast():
    q = torch.randn(1, 2, 9, 16, dtype=torch.bfloat16)
    mask = torch.randn(9, 9)
    with torch.autocast("cpu"):
        ours = scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert torch.equal(ours, scaled_dot_product_attention(q, q, q, attn_mask=mask.bfloat16()))


@pytest.mark.parametrize("name", ["attention", "aux", "score_mod", "block_mask", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_reference_computes_as_without(name, dtype):
    with flashattn.use_backend("reference"):
        with torch.autocast("cpu"):
            ours = results(ATTENTIONS[name], inputs("cpu", (dtype,) * 3))
        expected = results(ATTENTIONS[name], inputs("cpu", (dtype,) * 3))
    assert all(map(torch.equal, ours, expected))


def test_a_mod_computes_as_without():
    """What it computes of captured tensors alone, and its trace, which both calls share."""
    table = torch.randn(2, 4)
    q, _, _ = inputs("cpu", (torch.bfloat16,) * 3)

    def mod(score, b, h, i, j):
        return score + (table @ STEP)[h]

    with torch.autocast("cpu"):
        ours = flex_attention(q, q, q, score_mod=mod)
    assert torch.equal(ours, flex_attention(q, q, q, score_mod=mod))


FLASH_ATTN = {
    "dense": lambda q: flash_attn.flash_attn_func(q, q, q),
    "packed": lambda q: flash_attn.flash_attn_varlen_func(*[q.flatten(0, 1)] * 3, STARTS, STARTS, 5, 5),
    "cache": lambda q: flash_attn.flash_attn_with_kvcache(q.detach(), *[q.detach().clone()] * 2, cache_seqlens=9),
}


@pytest.mark.parametrize("name", FLASH_ATTN)
def test_flash_attn_does_not_cast(name):
    q = torch.randn(1, 9, 2, 16, requires_grad=True)
    with torch.autocast("cpu"):
        ours = FLASH_ATTN[name](q)
    assert torch.equal(ours, FLASH_ATTN[name](q))


def test_decode_casts_to_its_cache():
    x = [t.detach() for t in inputs("cpu")]
    caches = [flashattn.KVCache(1, 2, 16, 16, dtype=torch.bfloat16) for _ in range(2)]
    with torch.autocast("cpu", torch.float16):
        ours = flashattn.decode(x[0], caches[0], *x[1:])
    cast = [t.bfloat16() for t in x]
    assert torch.equal(ours, flashattn.decode(cast[0], caches[1], *cast[1:]))


NORMS = {
    "layer_norm": (flashattn.layer_norm, lambda x, w, b: functional.layer_norm(x, (16,), w, b)),
    "rms_norm": (lambda x, w, b: flashattn.rms_norm(x, w), lambda x, w, b: functional.rms_norm(x, (16,), w)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms_as_pytorchs_own(name, dtype):
    """On the CPU they are on none of autocast's lists, on a GPU on that of float32."""
    ours, theirs = NORMS[name]
    with torch.autocast("cpu"):
        x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((3, 16), (16,), (16,)))
        assert ours(x, weight, bias).dtype == theirs(x, weight, bias).dtype == dtype
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            x, weight, bias = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((3, 16), (16,), (16,)))
            expected = torch.float64 if dtype == torch.float64 else torch.float32
            assert ours(x, weight, bias).dtype == theirs(x, weight, bias).dtype == expected
            half = x.half() if dtype != torch.float64 else x
            y, hidden = flashattn.rms_norm(x, weight, residual=half, prenorm=True)
            assert y.dtype == hidden.dtype == expected
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_as_torch_nn(need_weights):
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    ours = flashattn.MultiheadAttention(16, 2, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x, added = torch.randn(2, 5, 16), torch.randn(5, 5)
    for dtype in (torch.float32, torch.bfloat16):
        for mask in (None, added, added > 0.5):
            with torch.autocast("cpu"):
                a, b = (
                    layer(*[x.to(dtype)] * 3, need_weights=need_weights, attn_mask=mask) for layer in (ours, theirs)
                )
            for of_ours, of_theirs in zip(a, b, strict=True):
                if of_theirs is not None:
                    torch.testing.assert_close(of_ours, of_theirs, rtol=2e-2, atol=2e-2)


def test_linear_as_pytorchs_own():
    x, weight = torch.randn(2, 16), torch.randn(8, 16)
    with torch.autocast("cpu"):
        assert torch.equal(flashattn.linear(x, weight), functional.linear(x, weight))
        assert torch.equal(flashattn.linear(x.bfloat16(), weight), functional.linear(x.bfloat16(), weight))


def test_compiled():
    """A graph holds for one state of autocast."""
    compiled = torch.compile(flashattn.attention, fullgraph=True, backend="aot_eager")
    norm = torch.compile(flashattn.layer_norm, fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 2, 9, 16)
    for on in (False, True, False):
        with torch.autocast("cpu", enabled=on):
            assert torch.equal(compiled(q, q, q), flashattn.attention(q, q, q))
            assert torch.equal(norm(q), flashattn.layer_norm(q))


def test_on_no_device_of_autocast():
    """Whether autocast is on is not asked of tensors it knows nothing of."""
    q = torch.empty(1, 2, 9, 16, device="meta")
    with torch.autocast("cpu"):
        assert flashattn.attention(q, q, q).dtype == torch.float32
