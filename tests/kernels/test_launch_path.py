"""What a GPU meets on the way from a call to a kernel's launch, as far as it shows without one: devices, captures of
CUDA graphs, numbers on the wrong device, sizes past a limit. test_gpu.py has the rest."""

import pytest
import torch

import flashattn
from flashattn import arguments, auxiliary, backends, tracing
from flashattn.backends import triton
from flashattn.compat import flash_attn
from flashattn.score import Score
from tests.compat.flex_cases import create_block_mask

META = torch.device("meta")


def test_gpus_of_a_machine_are_told_apart(monkeypatch):
    """One too old beside one that is not."""
    capabilities = {0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    triton.unavailable_reason.cache_clear()
    backends._choose_once.cache_clear()
    pytest.importorskip("triton")
    chosen = [backends.choose(torch.device("cuda", index), torch.float16) for index in (0, 1)]
    triton.unavailable_reason.cache_clear()
    backends._choose_once.cache_clear()
    assert chosen == ["reference", "triton"]
    assert "8.0 or later" in backends.unavailable_reason("triton", "cuda:0")


@pytest.fixture
def default_device():
    """Another device than the one of the tensors, as in a program that calls torch.set_default_device("cuda")."""
    yield lambda: torch.set_default_device(META)
    torch.set_default_device(None)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_default_device_does_not_matter(backend, default_device):
    q, k, v = (torch.randn(2, heads, 40, 16) for heads in (4, 2, 2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    x, table = torch.randn(5, 16), torch.randn(4, 100)
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 40, 40, 16)
    starts = torch.tensor([0, 15, 40], dtype=torch.int32)

    def calls():
        cache = flashattn.PagedKVCache(16, 8, 2, 16)
        chosen = cache.select([cache.add(), cache.add()])
        plain = [x.detach() for x in inputs]
        outs = [
            flashattn.attention(*inputs, causal=True, dropout_p=0.2, seed=3),
            flashattn.attention(*inputs, block_mask=block_mask),
            flashattn.attention(*inputs, score_mod=lambda score, b, h, i, j: score + table[h, i - j + 40]),
            flashattn.attention_varlen(*(x[0].transpose(0, 1) for x in inputs), starts, starts),
        ]
        return [
            *(x.detach() for x in outs), *torch.autograd.grad(sum(x.sum() for x in outs), inputs),
            flashattn.layer_norm(x, dropout_p=0.5, seed=4), flashattn.decode(plain[0], chosen, *plain[1:]),
            flash_attn.flash_attn_with_kvcache(
                *(x.transpose(1, 2) for x in plain), cache_seqlens=20, rotary_cos=None
            ),
        ]  # fmt: skip

    with flashattn.use_backend(backend):
        expected = calls()
        default_device()
        results = calls()
    torch.set_default_device(None)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


def test_a_derivative_is_traced_whatever_the_default_device(default_device):
    codegen = pytest.importorskip("flashattn.kernels.codegen")
    table = torch.randn(4, 100)
    default_device()
    traced = flashattn.score_mod.trace(
        "score_mod", lambda score, b, h, i, j: torch.where(i >= j, score * table[h, j], -1.0), 1
    )
    derivative = str(codegen.derive(traced.graph, traced.captured))
    assert "captured_0" in derivative
    assert "meta" not in str(traced.graph.graph) + derivative


def test_numbers_that_a_callable_captured_go_to_q():
    """A kernel cannot read them elsewhere; their gradient comes back."""
    factor = torch.tensor(0.5, requires_grad=True)
    q, shape = torch.empty(1, 1, 4, 8, device=META), (1, 1, 4, 4)
    score = arguments.build_score(q, shape, score_mod=lambda s, b, h, i, j: s * factor)
    (moved,) = score.score_mod.captured
    assert moved.device == META
    assert moved.grad_fn is not None
    table = torch.ones(3)
    with pytest.raises(ValueError, match="score_mod must capture tensors on q's device meta, got one on cpu"):
        arguments.build_score(q, shape, score_mod=lambda s, b, h, i, j: s * table[h])


def test_rows_far_apart_are_copied():
    """Offsets inside a tile are 32-bit, and 128 rows of 2**25 elements pass them."""
    near, far, alone = (
        torch.empty_strided((1, 1, seq, 8), (8, 8, stride, 1), device=META)
        for seq, stride in ((100, 2**23), (100, 2**23 + 1), (1, 2**30))
    )
    assert triton.make_readable(near) is near
    assert triton.make_readable(alone) is alone
    assert triton.make_readable(far).stride() == (800, 800, 8, 1)


def test_a_grid_of_more_heads_than_there_are_is_refused():
    pytest.importorskip("triton")
    x, weight = torch.empty(1, 65536, 8, device=META), torch.empty(65536, 8, device=META)
    norm = flashattn.score.Norm(False, 1e-6)
    with pytest.raises(ValueError, match="of at most 65,535 heads on the triton backend, got 65536"):
        triton.norm_forward(x, None, weight, None, torch.float32, False, norm)


Q, K = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
FLAT, STARTS = torch.randn(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
CACHES = torch.zeros(2, 1, 16, 2, 8)
NESTED = torch.nested.nested_tensor([torch.zeros(3, 2, 8)], layout=torch.jagged).transpose(1, 2)


def nothing_masked():
    return flashattn.attention(Q, K, K, block_mask=create_block_mask(lambda b, h, i, j: i >= j, None, None, 5, 5))


REFUSED = {
    "cache": lambda: flashattn.decode(Q, flashattn.KVCache(1, 2, 8, 8), K, K),
    "kv_lengths": lambda: arguments.check_lengths("kv_lengths", torch.tensor([3]), 1, 5, META),
    "score_mod": lambda: flashattn.attention(Q, K, K, score_mod=lambda score, b, h, i, j: score * 7.5),
    "q": lambda: flashattn.attention(NESTED, NESTED, NESTED),
    "cu_seqlens": lambda: flashattn.attention_varlen(FLAT, FLAT, FLAT, STARTS, STARTS, 5, 5),
    "cache_seqlens": lambda: flash_attn.flash_attn_with_kvcache(Q.transpose(1, 2)[:, :1], *CACHES),
    "block_table": lambda: flash_attn.flash_attn_varlen_func(
        FLAT, CACHES[0], CACHES[1], STARTS, STARTS, 5, 5, block_table=torch.zeros(1, 1, dtype=torch.int32)
    ),
    "block_mask": nothing_masked,
    "return_aux": lambda: auxiliary.compute(
        flashattn.AuxRequest(entropy=True), Q, K, Q[..., 0], Score(1.0, block_mask=()), "reference"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_said(name, monkeypatch):
    """By name, where CUDA would break off the capture without one."""
    with flashattn.use_backend("reference"):
        if name == "block_mask":
            REFUSED[name]()  # traced
        monkeypatch.setattr(tracing, "is_capturing", lambda: True)
        with pytest.raises(ValueError, match=f"^{name} cannot be captured in a CUDA graph: "):
            REFUSED[name]()


def test_a_number_on_another_device_cannot_be_captured(monkeypatch):
    factor = torch.tensor(0.5)
    traced = flashattn.score_mod.trace("score_mod", lambda score, b, h, i, j: score * factor, 1)
    monkeypatch.setattr(tracing, "is_capturing", lambda: True)
    with pytest.raises(ValueError, match="score_mod cannot be captured in a CUDA graph: it captured a number on cpu"):
        flashattn.score_mod.move_numbers("score_mod", traced, META)


def test_lengths_of_a_cache_are_clamped_in_a_capture(monkeypatch):
    """They are not read, so the longest is the capacity, and a replay with too many tokens writes over the last."""
    monkeypatch.setattr(tracing, "is_capturing", lambda: True)
    starts, longest = flash_attn._read_lengths(torch.tensor([3, 0, 16]), 3, 16, 2, torch.device("cpu"))
    assert (starts.tolist(), longest) == ([3, 0, 14], 16)


def test_a_mask_is_not_asked_in_a_capture(monkeypatch):
    transformers = pytest.importorskip("flashattn.compat.transformers")
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert not transformers.is_padded(mask)
    monkeypatch.setattr(tracing, "is_capturing", lambda: True)
    assert transformers.is_padded(mask)
    assert not transformers.is_padded(None)


def test_nothing_is_being_captured_without_a_gpu():
    assert tracing.is_capturing() is False
