"""The norm modules against torch.nn's."""

import pytest
import torch
from common import DTYPES
from torch import nn

import flashattn


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-12}])
def test_layer_norm_is_a_drop_in(options):
    theirs, ours = nn.LayerNorm(63, **options), flashattn.LayerNorm(63, **options)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 63)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("options", [{}, {"eps": 1e-6}, {"elementwise_affine": False}])
def test_rms_norm_is_a_drop_in(options):
    theirs, ours = nn.RMSNorm(63, **options), flashattn.RMSNorm(63, **options)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 63) * 1e-3  # small, so that eps shows
    torch.testing.assert_close(ours(x), theirs(x))


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


def test_only_the_last_dimension():
    with pytest.raises(ValueError, match="normalized_shape must be the width"):
        flashattn.LayerNorm((3, 8))
