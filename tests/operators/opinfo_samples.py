"""PyTorch's own samples of SDPA, layer_norm and rms_norm (the OpInfos of its test suite), and the drop-ins for them."""

import functools
import sys
import types
import unittest

import torch

import flashattn
from flashattn.compat.sdpa import scaled_dot_product_attention


@functools.cache
def op_infos() -> dict:
    """By name. The import leaves no trace: it needs a package that only its own tests use, and freezes flags."""
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    from torch.testing._internal.common_methods_invocations import op_db

    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
    return {op.name.removeprefix("nn.functional."): op for op in op_db}


def over_last_dimensions(module: type):
    """The function that a module is the drop-in for."""

    def norm(x, normalized_shape, weight=None, bias=None, eps=None):
        layer = module(normalized_shape, 1e-5 if eps is None and bias is not None else eps, elementwise_affine=False)
        layer._parameters |= dict(weight=weight, bias=bias)
        return layer(x)

    return norm


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    return over_last_dimensions(flashattn.LayerNorm)(x, normalized_shape, weight, bias, eps)


def rms_norm(x, normalized_shape, weight=None, eps=None):
    return over_last_dimensions(flashattn.RMSNorm)(x, normalized_shape, weight, eps=eps)


OURS = dict(scaled_dot_product_attention=scaled_dot_product_attention, layer_norm=layer_norm, rms_norm=rms_norm)


def samples(name: str, dtype: torch.dtype = torch.float32, noncontiguous: bool = False) -> list[tuple]:
    """(args, options) of each."""
    found = []
    for sample in op_infos()[name].sample_inputs("cpu", dtype):
        sample = sample.noncontiguous() if noncontiguous else sample
        found.append(((sample.input, *sample.args), sample.kwargs))
    return found


def theirs(name: str):
    return getattr(torch.nn.functional, name)
