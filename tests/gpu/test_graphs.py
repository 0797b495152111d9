"""CUDA graphs: calls that are captured once and replayed on new data, and calls that cannot be captured."""

import pytest
import torch

import flashattn
from flashattn.compat import flash_attn
from tests.gpu.calls import GRAPH_CASES, assert_same, make_tensors

pytestmark = pytest.mark.gpu


def refill(x: torch.Tensor, most: int) -> None:
    """Write new random numbers into the same memory."""
    x.copy_(torch.randint(1, most, x.shape)) if x.dtype == torch.int32 else x.copy_(torch.randn(x.shape))


@pytest.mark.parametrize("name", GRAPH_CASES)
def test_graphs(gpu, name):
    """Forward and backward, captured once, replayed on new data, lengths too."""
    torch.use_deterministic_algorithms(name != "callables")
    inputs, function = GRAPH_CASES[name](gpu.device)
    results, replay = gpu.capture(function)
    for most in (100, 30)[: gpu.replays]:
        for x in inputs:
            refill(x, most)
        expected = [x.clone() for x in function()]
        replay()
        assert_same(results, expected)


def test_a_captured_step_follows_lengths_that_grow(gpu):
    """From one split of the keys to more splits than the capture needed."""
    q, k, v = (torch.randn(2, 1, heads, 64, device=gpu.device).bfloat16() for heads in (4, 2, 2))
    caches = torch.randn(2, 2, 1000, 2, 64, device=gpu.device).bfloat16()
    lengths = torch.tensor([20, 7], dtype=torch.int32, device=gpu.device)

    def step():
        here = caches.clone()
        return [flash_attn.flash_attn_with_kvcache(q, *here, k, v, cache_seqlens=lengths, causal=True), here]

    results, replay = gpu.capture(step)
    for grown in ([300, 8], [999, 640]):
        lengths.copy_(torch.tensor(grown))
        expected = step()
        replay()
        assert_same(results, expected)


def test_a_graph_draws_new_seeds(gpu):
    x = torch.ones(64, 128, device=gpu.device)
    (y,), replay = gpu.capture(lambda: [flashattn.rms_norm(x, dropout_p=0.5, prenorm=True)[1]])
    drawn = []
    for _ in range(2):
        replay()
        drawn.append(y.clone())
    assert not torch.equal(*drawn)


def test_what_cannot_be_captured_is_said(gpu):
    q, k, v = make_tensors(gpu.device, 2, 4, 20, 32)
    cache = flashattn.KVCache(2, 2, 64, 32, dtype=q.dtype, device=gpu.device)
    flat, starts = [x[0].transpose(0, 1) for x in (q, k, v)], torch.tensor([0, 20], dtype=torch.int32).to(gpu.device)
    refused = {
        "cache": lambda: flashattn.decode(q, cache, k, v),
        "score_mod": lambda: flashattn.attention(q, k, v, score_mod=lambda score, b, h, i, j: score * 0.123),
        "block_table": lambda: flash_attn.flash_attn_varlen_func(
            flat[0], q, q, starts, starts, 20, 20, block_table=torch.zeros(1, 3, dtype=torch.int32)
        ),
    }
    if not gpu.rehearsed:  # tensors on the CPU, or read back from the GPU
        refused |= {
            "kv_lengths": lambda: flashattn.attention(q, k, v, kv_lengths=torch.tensor([3, 4])),
            "max_seqlen_q": lambda: flashattn.attention_varlen(*flat, starts, starts),
        }
    for x in refused:
        with gpu.capturing(), pytest.raises(ValueError, match=f"{x} (cannot be captured|must be given)"):
            refused[x]()
    with gpu.capturing(), flashattn.use_backend("reference"), pytest.raises(ValueError, match="cu_seqlens cannot be"):
        flashattn.attention_varlen(*flat, starts, starts, 20, 20)
