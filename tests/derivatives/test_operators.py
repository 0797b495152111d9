"""The operators of derivatives by themselves: schema, fakes, registration, and what graphs make of them."""

import pytest
import torch

from flashattn.ops import attention
from flashattn.score import Score

OPS = torch.ops.flashattn


def make_settings(bias, sinks) -> tuple:
    score = Score(0.3, right=0, softcap=2.0, bias=bias, sinks=sinks)
    return *attention.flatten(score, "cpu"), *attention.flatten_mods(score)


def make_tensors(requires_grad: bool):
    shapes = (1, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), (1, 4, 5, 7), (4,)
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_attention_jvp(requires_grad):
    *qkv, bias, sinks = make_tensors(requires_grad)
    arguments = *qkv, *make_tensors(requires_grad), [], *make_settings(bias, sinks)
    torch.library.opcheck(OPS.attention_jvp.default, arguments)


def test_attention_hvp():
    *qkv, bias, sinks = make_tensors(False)
    settings, tangents = make_settings(bias, sinks), make_tensors(False)
    out, lse, rest, *moved = OPS.attention_jvp.default(*qkv, *tangents, [], *settings)
    arguments = torch.randn_like(out), None, *qkv, out, lse, rest, True, [], *tangents, [], *moved, *settings
    torch.library.opcheck(OPS.attention_hvp.default, arguments)
