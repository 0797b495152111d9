"""PyTorch's own samples of SDPA, layer_norm and rms_norm through the drop-ins: its checks of every derivative, in
float64. Of SDPA along random directions, as its test suite runs them: every entry of its Jacobians takes half an
hour."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.operators.opinfo_samples import OURS, samples, theirs


def list_checked(name: str):
    """(function of the tensors that have a derivative, these, whether it drops weights) of each sample."""
    for args, options in samples(name, torch.float64):
        flat, structure = tree_flatten((args, options))
        at = [n for n, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.is_floating_point()]

        def make(function, flat=flat, structure=structure, at=at):
            def call(*tensors):
                own = list(flat)
                for n, x in zip(at, tensors, strict=True):
                    own[n] = x
                args, options = tree_unflatten(own, structure)
                torch.manual_seed(42)  # the same weights are dropped
                return function(*args, **options)

            return call

        inputs = [flat[n].detach().clone().requires_grad_() for n in at]
        yield make(OURS[name]), make(theirs(name)), inputs, options.get("dropout_p", 0) > 0


FAST = {"scaled_dot_product_attention"}


@pytest.mark.parametrize("name", OURS)
def test_first_derivatives(name):
    for call, _, inputs, drops in list_checked(name):
        # PyTorch draws no random numbers in a batch.
        options = dict(check_batched_grad=True, check_batched_forward_grad=not drops)
        assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=name in FAST, **options)


@pytest.mark.parametrize("name", OURS)
def test_second_derivatives(name):
    for call, _, inputs, drops in list_checked(name):
        options = dict(check_batched_grad=not drops, check_fwd_over_rev=True, check_rev_over_rev=True)
        assert gradgradcheck(call, inputs, fast_mode=name in FAST, **options)


@pytest.mark.parametrize("name", OURS)
def test_jvp(name):
    for ours, by_torch, inputs, drops in list_checked(name):
        if drops:  # which weights are dropped is each library's own
            continue
        inputs = tuple(x.detach() for x in inputs)
        tangents = tuple(torch.cos(x) for x in inputs)
        with sdpa_kernel(SDPBackend.MATH):
            expected = torch.func.jvp(by_torch, inputs, tangents)
        torch.testing.assert_close(torch.func.jvp(ours, inputs, tangents), expected)
