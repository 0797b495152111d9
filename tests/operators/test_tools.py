"""What PyTorch's tools make of calls: its FLOP counter, its tracer, and the export to ONNX."""

import io

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as theirs
from torch.utils.flop_counter import FlopCounterMode

import flashattn
from flashattn.compat.flash_attn import flash_attn_func
from flashattn.compat.sdpa import scaled_dot_product_attention


def flops(call, q, k, v) -> tuple[int, int]:
    """(forward, backward)."""
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with FlopCounterMode(display=False) as forward:
        out = call(q, k, v)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def inputs(seq_q=9, seq_k=12):
    return torch.randn(2, 4, seq_q, 16), torch.randn(2, 2, seq_k, 16), torch.randn(2, 2, seq_k, 8)


@pytest.mark.parametrize(
    "call",
    [
        flashattn.attention,
        lambda q, k, v: flashattn.attention(q, k, v, causal=True, bias=torch.zeros(9, 12)),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))),
    ],
)
def test_flops_as_pytorch_counts(call):
    """The backward computes the scores again, which PyTorch's mathematics keeps, and its kernels do not."""
    x = inputs()
    forward, backward = flops(call, *x)
    with sdpa_kernel(SDPBackend.MATH):
        expected, kept = flops(lambda q, k, v: theirs(q, k, v, enable_gqa=True), *inputs())
    assert forward == expected
    assert backward == kept + 2 * 2 * 4 * 9 * 12 * 16


def test_flops_of_packed_sequences():
    """Of each, not of all pairs."""
    starts = torch.tensor([0, 2, 9], dtype=torch.int32)
    q, k, v = (x[0].transpose(0, 1) for x in inputs(9, 9))
    forward, backward = flops(lambda q, k, v: flashattn.attention_varlen(q, k, v, starts, starts), q, k, v)
    pairs = 4 * (2 * 2 + 7 * 7)
    assert forward == 2 * pairs * (16 + 8)
    assert backward == 2 * pairs * (3 * 16 + 2 * 8)


class Call(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


CALLS = {
    "attention": lambda x: flashattn.attention(x, x, x, causal=True),
    "layer_norm": lambda x: flashattn.layer_norm(x, torch.ones(16)),
}


@pytest.mark.parametrize("name", CALLS)
def test_traced(name):
    x = torch.randn(2, 4, 9, 16)
    traced = torch.jit.trace(CALLS[name], x)
    assert "flashattn::" in str(traced.graph)  # the operator, whatever the backend calls
    x = torch.randn(2, 4, 9, 16)
    assert torch.equal(traced(x), CALLS[name](x))


def export(call):
    torch.onnx.export(Call(call), (torch.randn(2, 4, 9, 16),), io.BytesIO(), dynamo=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_onnx_is_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=f"flashattn::{name.split('_')[-1]}_forward has no form in ONNX"):
        export(CALLS[name])


@pytest.mark.filterwarnings("ignore")
def test_sdpa_is_exported_as_pytorchs_own():
    pytest.importorskip("onnx")
    export(lambda x: scaled_dot_product_attention(x, x, x, is_causal=True))
