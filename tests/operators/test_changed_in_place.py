"""A tensor that backward reads and that was changed since forward is an error, as it is in PyTorch's own operations."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashattn
from tests.common import BACKENDS, find_device

SEQ = 20
ROWS = torch.arange(SEQ)
TENSORS = {
    "mask": lambda: torch.ones(SEQ, SEQ).bool(),
    "kv_lengths": lambda: torch.tensor([SEQ], dtype=torch.int32),
    "q_lengths": lambda: torch.tensor([SEQ], dtype=torch.int32),
    "alibi_slopes": lambda: torch.ones(2),
    "seed": lambda: torch.tensor(1),
    "bias": lambda: torch.zeros(SEQ, SEQ),
    "sinks": lambda: torch.zeros(2),
}


def attention(q, **options):
    return flashattn.attention(q, q, q, dropout_p=0.1 if "seed" in options else 0, **options)


def score_mod(q, table):
    return attention(q, score_mod=lambda score, b, h, i, j: score + table[i])


def mask_mod(q, table):
    block_mask = create_block_mask(lambda b, h, i, j: table[i] <= j, None, None, SEQ, SEQ, q.device, BLOCK_SIZE=16)
    return attention(q, block_mask=block_mask)


def norm(q, seed):
    return flashattn.rms_norm(q, dropout_p=0.1, seed=seed)


CALLS = {name: (lambda q, x, name=name: attention(q, **{name: x}), make) for name, make in TENSORS.items()}
CALLS["score_mod"] = score_mod, lambda: torch.zeros(SEQ)
CALLS["mask_mod"] = mask_mod, lambda: torch.zeros(SEQ, dtype=torch.int32)
CALLS["norm"] = norm, lambda: torch.tensor(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_change_before_backward_is_noticed(name, backend):
    call, make = CALLS[name]
    device = find_device(backend)
    q, x = torch.randn(1, 2, SEQ, 8).to(device).requires_grad_(), make().to(device)
    with flashattn.use_backend(backend):
        call(q, x).sum().backward()  # nothing was changed
        y = call(q, x)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["kv_lengths", "cu_seqlens"])
def test_what_was_copied_may_change(name, backend):
    """int64 lengths and cu_seqlens reach the kernels as a copy: gradients are those of the forward pass."""
    device = find_device(backend)
    q = torch.randn(SEQ, 2, 8).to(device).requires_grad_()

    def call(x):
        if name == "cu_seqlens":
            return flashattn.attention_varlen(q, q, q, x, x, SEQ, SEQ)
        return attention(q.transpose(0, 1)[None], kv_lengths=x)

    def ends():
        return torch.tensor([0, 9, SEQ], dtype=torch.int32) if name == "cu_seqlens" else torch.tensor([9])

    with flashattn.use_backend(backend):
        (expected,) = torch.autograd.grad(call(ends().to(device)).sum(), q)
        x = ends().to(device)
        y = call(x)
        x.zero_()
        (found,) = torch.autograd.grad(y.sum(), q)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["mask", "kv_lengths"])
def test_tensors_of_inference_mode(name):
    """They have no version to save, and nothing changes them."""
    with torch.inference_mode():
        x = TENSORS[name]()
    q = torch.randn(1, 2, SEQ, 8, requires_grad=True)
    attention(q, **{name: x}).sum().backward()
    assert q.grad.isfinite().all()
