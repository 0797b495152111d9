"""The norm modules against torch.nn's."""

import pytest
import torch
from torch import nn

import flashattn
from tests.common import DTYPES
from tests.norm.module_cases import check_layer_norm, check_rms_norm


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-12}])
def test_layer_norm_is_a_drop_in(options):
    check_layer_norm(options)


@pytest.mark.parametrize("options", [{}, {"eps": 1e-6}, {"elementwise_affine": False}])
def test_rms_norm_is_a_drop_in(options):
    check_rms_norm(options)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_the_epsilon_of_rms_norm_is_that_of_the_installed_pytorch(dtype, eps):
    """Rows so small that eps outweighs them: each place of y is x / sqrt(eps), and says which eps it was."""
    x, settings = torch.full((1, 64), 2.0**-14, dtype=dtype), {"eps": eps, "dtype": dtype}
    torch.testing.assert_close(flashattn.RMSNorm(64, **settings)(x), nn.RMSNorm(64, **settings)(x))


def test_residual_and_prenorm():
    norm, x, residual = flashattn.RMSNorm(64), torch.randn(3, 64), torch.randn(3, 64)
    y, hidden = norm(x, residual, prenorm=True)
    torch.testing.assert_close(hidden, x + residual)
    torch.testing.assert_close(y, nn.RMSNorm(64)(x + residual))


def test_per_head_and_offset():
    norm = flashattn.RMSNorm(8, heads=3, weight_offset=1.0)
    assert norm.weight.shape == (3, 8)
    assert (norm.weight == 0).all()  # stored around zero
    x = torch.randn(2, 5, 3, 8)
    torch.testing.assert_close(norm(x), nn.RMSNorm(8)(x))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5)])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_several_dimensions_as_torch_nn(name, shape):
    ours, theirs = getattr(flashattn, name)(shape, eps=1e-5), getattr(torch.nn, name)(shape, eps=1e-5)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 5, 4).transpose(2, 3)
    residual = torch.randn_like(x)
    y, hidden = ours(x, residual, prenorm=True)
    torch.testing.assert_close(hidden, x + residual)
    torch.testing.assert_close(y, theirs(x + residual))
    gradients = [torch.autograd.grad(layer(x).square().sum(), [*layer.parameters()]) for layer in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_what_torch_nn_refuses(name):
    """By an error of both kinds; a width of its own without parameters too."""
    with pytest.raises(ValueError, match=r"normalized_shape must have at least one dimension, got \(\)"):
        getattr(flashattn, name)(())
    for kind in ((8,), (2, 4)):
        ours, theirs = (getattr(m, name)(kind, elementwise_affine=False) for m in (flashattn, torch.nn))
        x = torch.randn(3, 2, 5)
        with pytest.raises(RuntimeError):
            theirs(x)
        with pytest.raises(RuntimeError, match="x must end in normalized_shape") as caught:
            ours(x)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_nested(name, layout):
    layer = getattr(flashattn, name)(8)
    parts, residuals = ([torch.randn(n, 8) for n in (3, 1, 4)] for _ in range(2))
    x, residual = (torch.nested.nested_tensor(p, layout=layout, requires_grad=True) for p in (parts, residuals))
    out, hidden = layer(x, residual, prenorm=True)
    assert out.layout == hidden.layout == layout
    for y, h, part, other in zip(out.unbind(), hidden.unbind(), parts, residuals, strict=True):
        torch.testing.assert_close(y, layer(part + other))
        torch.testing.assert_close(h, part + other)
    sum(y.square().sum() for y in out.unbind()).backward()
    assert all(g.isfinite().all() for g in x.grad.unbind())
