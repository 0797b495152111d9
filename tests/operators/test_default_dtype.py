"""Results do not depend on `torch.set_default_dtype`: what is allocated or converted names its dtype."""

import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashattn
from tests.common import find_device

FLOAT = dict(dtype=torch.float32)
CAUSAL = create_block_mask(lambda b, h, i, j: i >= j, None, None, 24, 24, device="cpu", BLOCK_SIZE=16)
ALPHA = torch.tensor(0.5, **FLOAT)
OPTIONS = {
    "plain": {},
    "features": dict(softcap=3.0, bias=torch.ones(24, 24, **FLOAT), sinks=torch.ones(2, **FLOAT)),
    "lengths": dict(kv_lengths=torch.tensor([24]), alibi_slopes=torch.ones(2, **FLOAT)),
    "dropout": dict(dropout_p=0.3, seed=1),
    "block_mask": dict(block_mask=CAUSAL),
    "block_mask_and_dropout": dict(block_mask=CAUSAL, dropout_p=0.3, seed=1),
    "score_mod": dict(score_mod=lambda score, b, h, i, j: score * ALPHA + (i - j)),
}


def attention(q, **options):
    return flashattn.attention(q, q, q, return_lse=True, **options)


def packed(q):
    x, starts = q[0].transpose(0, 1), torch.tensor([0, 9, 24], dtype=torch.int32, device=q.device)
    return flashattn.attention_varlen(x, x, x, starts, starts, causal=True, dropout_p=0.3, seed=1, return_lse=True)


def decode(q):
    with torch.no_grad():
        cache = flashattn.KVCache(1, 2, 24, 16, dtype=q.dtype, device=q.device)
        return flashattn.decode(q, cache, q, q, flashattn.Rotary(q[0, 0, :, :8], q[0, 1, :, :8]), return_lse=True)


def norm(q):
    weight = torch.ones(16, dtype=q.dtype, device=q.device)
    return flashattn.layer_norm(q, weight, residual=q, dropout_p=0.3, seed=1, prenorm=True)


CALLS = {name: lambda q, o=o: attention(q, **o) for name, o in OPTIONS.items()}
CALLS |= {"packed": packed, "decode": decode, "norm": norm}


def results(name, backend, dtype):
    q = torch.linspace(-2, 2, 2 * 24 * 16, **FLOAT).view(1, 2, 24, 16)
    q = q.to(find_device(backend), dtype).requires_grad_(name != "decode")
    with flashattn.use_backend(backend):
        outputs = CALLS[name](q)
    if name == "decode":
        return outputs
    return *outputs, *torch.autograd.grad([x.float().square().sum() for x in outputs], [q])


def calls_and_defaults():
    """In the interpreter, which is slow, each call under one of the two."""
    defaults = torch.float64, torch.bfloat16
    for number, name in enumerate(CALLS):
        yield pytest.param(name, "triton", defaults[number % 2], marks=pytest.mark.interpreter)
        yield from itertools.product([name], ("cpu", "reference"), defaults)


@pytest.mark.parametrize("name, backend, default", [*calls_and_defaults()], ids=str)
def test_the_default_dtype_changes_nothing(name, backend, default):
    dtype = torch.float16  # which neither default is, and the interpreter computes rightly
    expected = results(name, backend, dtype)
    torch.set_default_dtype(default)
    try:
        found = results(name, backend, dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
