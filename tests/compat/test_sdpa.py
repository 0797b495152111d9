"""The drop-in for scaled_dot_product_attention against PyTorch's own, gradients included."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import flashattn
from flashattn.compat import sdpa
from tests.compat.sdpa_cases import CASES, check, theirs


@pytest.mark.parametrize("name, kind", [(n, k) for n in CASES for k in ("bool", "float") if CASES[n][2] or k == "bool"])
def test_as_pytorch(name, kind):
    check(name, kind)


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 40, 50), (1, 1, 50), (2, 1, 1, 40, 50), (2, 3, 4, 40, 50), (4, 1, 50)])
def test_masks_are_not_expanded(shape, monkeypatch):
    given = []
    ours = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args, **options: (given.append(options), ours(*args, **options))[1])
    q, k, mask = torch.randn(2, 3, 4, 40, 16), torch.randn(2, 3, 4, 50, 16), torch.rand(shape) > 0.3
    out = sdpa.scaled_dot_product_attention(q, k, k, attn_mask=mask)
    assert given[0]["mask"].data_ptr() == mask.data_ptr()
    assert given[0]["mask"].untyped_storage().nbytes() == mask.numel()
    torch.testing.assert_close(out, theirs(q, k, k, attn_mask=mask.expand(2, 3, 4, 40, 50)), equal_nan=True)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("variant", ["causal_upper_left", "causal_lower_right"])
def test_causal_bias(variant, square):
    q, k = torch.randn(2, 4, 20, 16), torch.randn(2, 4, 20 if square else 33, 16)
    bias = getattr(torch.nn.attention.bias, variant)(20, k.shape[2])
    expected = theirs(q, k, k, attn_mask=bias._materialize())
    torch.testing.assert_close(sdpa.scaled_dot_product_attention(q, k, k, attn_mask=bias), expected)
    with sdpa.patch():
        torch.testing.assert_close(functional.scaled_dot_product_attention(q, k, k, attn_mask=bias), expected)


class Named(torch.Tensor):
    """A subclass in Tensor's own way."""


class Asked(torch.Tensor):
    """A subclass with a way of its own, which knows PyTorch's function."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return (
            ("asked", args, kwargs) if func is theirs else super().__torch_function__(func, types, args, kwargs or {})
        )


def test_subclasses(monkeypatch):
    q, mask = torch.randn(2, 4, 20, 16), torch.rand(20, 20) > 0.3
    calls = []
    ours = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args, **options: (calls.append(args), ours(*args, **options))[1])
    out = sdpa.scaled_dot_product_attention(q.as_subclass(Named), q, q, is_causal=True)
    assert type(out) is Named
    assert len(calls) == 1
    assert torch.equal(out.as_subclass(torch.Tensor), sdpa.scaled_dot_product_attention(q, q, q, is_causal=True))
    asked, args, options = sdpa.scaled_dot_product_attention(q, q, q, mask.as_subclass(Asked), scale=0.3)
    assert asked == "asked"
    assert args[0] is q
    assert options["scale"] == 0.3


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested(layout):
    parts = [torch.randn(n, 4, 16) for n in (5, 1, 9)]
    nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    q = nested.transpose(1, 2)
    for is_causal in (False, True):
        out = sdpa.scaled_dot_product_attention(q, q, q, is_causal=is_causal)
        assert out.layout == layout
        for x, part in zip(out.unbind(), parts, strict=True):
            alone = part.transpose(0, 1)[None]
            torch.testing.assert_close(x, theirs(alone, alone, alone, is_causal=is_causal)[0], rtol=1e-5, atol=1e-5)
        gradient = torch.autograd.grad(sum(x.square().sum() for x in out.unbind()), nested)[0]
        assert all(x.isfinite().all() and x.abs().sum() > 0 for x in gradient.unbind()[2:])


def test_nested_with_gaps():
    """Rows between its sequences, which belong to none."""
    values, offsets, lengths = torch.randn(20, 4, 16), torch.tensor([0, 7, 9, 20]), torch.tensor([4, 2, 10])
    values[4:7] = values[19:] = torch.nan
    q = torch.nested.nested_tensor_from_jagged(values, offsets, lengths).transpose(1, 2)
    out = sdpa.scaled_dot_product_attention(q, q, q)
    for x, start, length in zip(out.unbind(), (0, 7, 9), (4, 2, 10), strict=True):
        alone = values[start : start + length].transpose(0, 1)[None]
        torch.testing.assert_close(x, theirs(alone, alone, alone)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_of_other_lengths(layout):
    q, k = (
        torch.nested.nested_tensor([torch.randn(n, 4, 16) for n in lengths], layout=layout).transpose(1, 2)
        for lengths in ((5, 1, 9), (3, 8, 9))
    )
    out = sdpa.scaled_dot_product_attention(q, k, k)
    for x, a, b in zip(out.unbind(), q.unbind(), k.unbind(), strict=True):
        torch.testing.assert_close(x, theirs(a[None], b[None], b[None])[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="key must have query's lengths where is_causal is True"):
        sdpa.scaled_dot_product_attention(q, k, k, is_causal=True)


def test_signature():
    names = [*inspect.signature(sdpa.scaled_dot_product_attention).parameters]
    assert theirs.__doc__.lstrip().startswith("scaled_dot_product_attention(" + ", ".join(names[:3]))
    q = torch.randn(1, 2, 5, 8)
    every = dict(attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)
    assert names[3:] == [*every]
    torch.testing.assert_close(sdpa.scaled_dot_product_attention(q, q, q, **every), theirs(q, q, q, **every))


def test_patch_serves_multihead_attention(monkeypatch):
    calls = []
    ours = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args, **options: (calls.append(options), ours(*args, **options))[1])
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 7, 32)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    expected = layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    with sdpa.patch():
        out = layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(out, expected)
    assert len(calls) == 1
    assert functional.scaled_dot_product_attention is theirs


def test_patch_comes_off_after_an_error():
    with pytest.raises(ZeroDivisionError), sdpa.patch():
        raise ZeroDivisionError
    assert functional.scaled_dot_product_attention is theirs


def test_a_row_with_nothing_to_attend_to():
    q = torch.randn(1, 1, 3, 8, requires_grad=True)
    out = sdpa.scaled_dot_product_attention(q, q, q, attn_mask=torch.tensor([True, False, True])[:, None])
    out.sum().backward()
    assert (out[0, 0, 1] == 0).all()
    assert q.grad.isfinite().all()


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 3, 5, 8),
    "by_token": lambda: torch.randn(2, 5, 3, 8).transpose(1, 2),
    "sequence_first": lambda: torch.randn(5, 2, 3, 8).permute(1, 2, 0, 3),
    "heads_first": lambda: torch.randn(3, 2, 5, 8).transpose(0, 1),
    "of_packed": lambda: torch.randn(2, 5, 3, 3, 8)[:, :, 0].transpose(1, 2),
    "sliced": lambda: torch.randn(2, 3, 5, 16)[..., :8],
    "expanded": lambda: torch.randn(2, 1, 5, 8).expand(-1, 3, -1, -1),
    "last_not_contiguous": lambda: torch.randn(2, 3, 8, 5).mT,
    "one_sequence": lambda: torch.randn(1, 5, 3, 8).transpose(1, 2),
    "three_dimensions": lambda: torch.randn(5, 3, 8).transpose(0, 1),
    "five_dimensions": lambda: torch.randn(2, 5, 2, 3, 8).permute(0, 2, 3, 1, 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_as_pytorch(name):
    q = LAYOUTS[name]()
    for options in ({}, dict(is_causal=True), dict(attn_mask=torch.ones(5, 5).bool())):
        ours, expected = (f(q, q, q, **options) for f in (sdpa.scaled_dot_product_attention, theirs))
        torch.testing.assert_close(ours, expected, check_stride=True)


def test_tokens_can_be_viewed():
    """Of another head_dim of v too, as PyTorch's kernels for GPUs have it."""
    q, k = (torch.randn(2, 5, 3, 8).transpose(1, 2).requires_grad_() for _ in range(2))
    out = sdpa.scaled_dot_product_attention(q, k, k[..., :4])
    out.transpose(1, 2).view(2, 5, 12).square().sum().backward()
    assert q.grad.isfinite().all()


def test_dropout():
    q = torch.randn(2, 4, 60, 16)
    torch.manual_seed(1)
    first = sdpa.scaled_dot_product_attention(q, q, q, dropout_p=0.3)
    torch.manual_seed(1)
    assert torch.equal(first, sdpa.scaled_dot_product_attention(q, q, q, dropout_p=0.3))
    assert not torch.equal(first, sdpa.scaled_dot_product_attention(q, q, q, dropout_p=0.3))


def test_dropout_of_all():
    q = torch.randn(2, 4, 6, 16, requires_grad=True)
    out = sdpa.scaled_dot_product_attention(q, q, q, dropout_p=1.0)
    out.sum().backward()
    assert not out.any()
    assert not q.grad.any()


def test_compile():
    compiled = torch.compile(sdpa.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    q, k = torch.randn(2, 4, 20, 16), torch.randn(2, 4, 33, 16)
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.rand(20, 33) > 0.2}):
        assert torch.equal(compiled(q, k, k, **options), sdpa.scaled_dot_product_attention(q, k, k, **options))


Q = torch.zeros(2, 4, 5, 8)
WRONG = {
    "mask_and_causal": (dict(attn_mask=torch.ones(5, 5).bool(), is_causal=True), "attn_mask must be None"),
    "heads": (dict(key=Q[:, :2], value=Q[:, :2]), "key must have query's 4 heads without enable_gqa, got 2"),
    "one_dimension": (dict(key=Q[0, 0, 0]), r"key must be a tensor \(..., seq, head_dim\), got shape \(8,\)"),
    "mask_dimensions": (dict(attn_mask=torch.ones(1, 2, 4, 5, 5).bool()), "mask must be broadcastable"),
    "mask_shape": (dict(attn_mask=torch.ones(5, 4).bool()), "mask must be broadcastable"),
}


WRONG_TYPES = {
    "nothing": (dict(query=None), "query must be a tensor, got NoneType"),
    "mixed": (dict(key=Q.half()), "k must have q's dtype torch.float32, got torch.float16"),
    "integers": (dict(query=Q.int()), "q must be float32, bfloat16, float16 or float64, got torch.int32"),
    "mask_of_integers": (dict(attn_mask=torch.ones(5, 5).int()), "must be float32, .*got torch.int32"),
    "mask_dtype": (dict(attn_mask=torch.ones(5, 5).double()), "must be torch.float32, as q, .*got torch.float64"),
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_TYPES])
def test_wrong_arguments_are_named(name):
    """By an error that is ours, and one that PyTorch raises."""
    options, message = (WRONG | WRONG_TYPES)[name]
    options = {"query": Q, "key": Q, "value": Q, **options}
    with pytest.raises(ValueError if name in WRONG else TypeError, match=message) as caught:
        sdpa.scaled_dot_product_attention(**options)
    if name != "mask_and_causal":  # of which the documentation alone says that it raises
        with pytest.raises((RuntimeError, TypeError)) as expected:
            theirs(**options)
        assert isinstance(caught.value, expected.type)


def test_import_of_the_package_patches_nothing():
    assert flashattn.compat.sdpa is sdpa
    assert functional.scaled_dot_product_attention is theirs


PROVIDER = """
import sys, torch, flashattn, flashattn.compat.sdpa
from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls
from torch.nn.functional import scaled_dot_product_attention
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3))
mask = torch.rand(2, 1, 33, 33) > 0.2

def call():
    options = dict(is_causal=True), dict(attn_mask=mask), dict(scale=0.3)
    outs = [scaled_dot_product_attention(q, k, v, **o) for o in options]
    outs.append(scaled_dot_product_attention(q[:, :, :20], k, v, is_causal=True))
    outs.append(scaled_dot_product_attention(q, k[:, :, :20], v[:, :, :20], is_causal=True))
    return [*outs, *torch.autograd.grad(sum(x.square().sum() for x in outs), (q, k, v))]

def strides():  # of the result, and of the operators, which compiled graphs know
    sizes = (2, 4, 5, 8), (2, 5, 4, 8), (5, 2, 4, 8)
    orders = (0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3)
    found = []
    for size, order in zip(sizes, orders):
        x = torch.randn(size).permute(order)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found += [out, lse, *backward(out, x, x, x, out, lse, 0.0, False), scaled_dot_product_attention(x, x, x)]
    return [x.stride() for x in found]

before, strides_before = call(), strides()
assert "flashattn" in list_flash_attention_impls()
activate_flash_attention_impl("flashattn")
calls = []
forward = flashattn.backends.cpu.forward
flashattn.backends.cpu.forward = lambda *x: calls.append(1) or forward(*x)
during = call()
assert len(calls) == 5, calls
assert strides() == strides_before
assert torch.equal(during[0], flashattn.attention(q, k, v, causal=True))
counted = len(calls)
out = scaled_dot_product_attention(q, k, v, attn_mask=torch.full((33, 33), -1e9))  # the mean of v
torch.testing.assert_close(torch.autograd.grad(out.sum(), v)[0], torch.ones_like(v))
del calls[counted:]
for a, b in zip(before, during):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
if hasattr(torch.nn.attention, "restore_flash_attention_impl"):  # PyTorch 2.10 has no way back
    torch.nn.attention.restore_flash_attention_impl()
    after = call()
    assert len(calls) == 12, calls
    assert all(map(torch.equal, before, after))
"""


def test_provider_is_activated_only_when_asked():
    """In a process of its own: the dispatcher is the process's."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROVIDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_beside_a_subclass(bias):
    class Subclass(torch.Tensor):
        pass

    q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias(4, 6)._materialize())
    for inputs in ((q.as_subclass(Subclass), k, v), (q, k, v.as_subclass(Subclass))):
        found = sdpa.scaled_dot_product_attention(*inputs, bias(4, 6))
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
