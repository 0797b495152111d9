"""Every kernel on a GPU: the case tables of the other backends on CUDA tensors, forward and backward, under the same
error rule; and what only a GPU has: streams, several devices, memory, and the same bits in every run.

`pytest tests/gpu -n 16 --dist worksteal` on a GPU: nearly all of the time is compilation. With
`--rehearse-gpu sm_90` the PTX machine executes the launches.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashattn
from flashattn.compat import flash_attn
from tests.attention import cases, decode_cases, multihead_cases, packed_cases
from tests.common import DTYPES, assert_as_exact_as_torch
from tests.compat import flash_attn_cases, flex_cases, sdpa_cases
from tests.gpu.calls import assert_same, make_tensors, run_attention, run_norm, run_packed
from tests.norm import cases as norm_cases
from tests.norm import module_cases

pytestmark = pytest.mark.gpu


def alternate_dtypes(cases, everywhere=()) -> list:
    """Each case in one dtype, the dtypes in turn, and those whose names are in `everywhere` in each: a kernel takes
    seconds to compile."""
    chosen = [
        (case, dtype)
        for number, case in enumerate(cases)
        for place, dtype in enumerate(DTYPES)
        if case.name in everywhere or place == number % len(DTYPES)
    ]
    return [pytest.param(case, dtype, id=f"{case.name}-{str(dtype)[6:]}") for case, dtype in chosen]


# ------------------------------------------------------------------------------------------------ every case

PAIRS = cases.pairwise()
HEAD_DIMS = ["one_query_one_key", "wider_v", "head_dim_64", "head_dim_128", "head_dim_256", "everything", "long"]


@pytest.mark.parametrize(
    "case, dtype", alternate_dtypes([*cases.CASES, *PAIRS], [*HEAD_DIMS, *(case.name for case in PAIRS)])
)
def test_attention_cases(case, dtype):
    cases.check(case, dtype, "triton")


@pytest.mark.parametrize("case, dtype", alternate_dtypes(packed_cases.CASES, ["everything", "causal"]))
def test_packed_cases(case, dtype):
    packed_cases.check(case, *packed_cases.LENGTHS, dtype, "triton")


@pytest.mark.parametrize(
    "step, dtype", alternate_dtypes([*decode_cases.STEPS, *decode_cases.LONG], ["everything", "pages"])
)
def test_decode_steps(step, dtype):
    decode_cases.check(step, dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", norm_cases.CASES, ids=lambda case: case.name)
def test_norm_cases(case, dtype):
    if case.name == "width_1" and dtype == torch.float32:
        pytest.skip("the truth is 0, and a fused multiply-add leaves the rounding of a product (test_norm_of_width_1)")
    norm_cases.check(case, dtype, "triton")


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("width", [16384, 70001])
def test_norms_of_wide_rows(width, center):
    norm_cases.check(norm_cases.Case("", (2, width), center, bias=center), torch.bfloat16, "triton")


@pytest.mark.parametrize(
    "mod, block_mask, dtype",
    [
        ("identity", None, torch.float32),
        ("alibi", "documents", torch.bfloat16),
        ("relative_bias", None, torch.bfloat16),
        ("relative_bias", "by_head", torch.float32),
        ("softcap_and_scale", "nothing_in_some_rows", torch.bfloat16),
    ],
)
def test_callables(gpu, mod, block_mask, dtype):
    torch.use_deterministic_algorithms(False)
    with torch.device(gpu.device):
        flex_cases.check_gradients(dtype, mod, block_mask, "triton")


def test_callables_with_every_feature(gpu):
    torch.use_deterministic_algorithms(False)
    with torch.device(gpu.device):
        flex_cases.check_with_every_other_feature("triton", True)


def test_every_operation_of_callables(gpu):
    with torch.device(gpu.device):
        flex_cases.check_every_operation("triton")


@pytest.mark.parametrize("view", cases.VIEWS)
def test_views(view):
    """Bit for bit: transposed, sliced so that nothing is aligned, strided."""
    cases.check_strides(view, "triton")


@pytest.mark.parametrize("view", norm_cases.VIEWS)
def test_views_of_norms(view):
    norm_cases.check_strides(view, "triton")


def test_nested_tensors():
    packed_cases.check_nested_tensors("triton")


def test_the_batch_and_the_pages_change_no_bit():
    decode_cases.check_bits_of_batch_and_pages((1, 1, 1), "triton")
    decode_cases.check_bits_of_longest_row_and_capacity("triton")


def test_dropout_drops_what_the_other_backends_drop():
    norm_cases.check_dropout("triton")
    packed_cases.check_dropout_of_padded_batch("triton")


# ------------------------------------------------------------------------------------------------ drop-ins


@pytest.mark.parametrize("name", ["causal_more_keys", "grouped", "five_dimensions_masked", "broadcast"])
def test_sdpa_drop_in(gpu, name):
    with torch.device(gpu.device), sdpa_kernel(SDPBackend.MATH):
        sdpa_cases.check(name, "float")


def test_provider_of_pytorchs_flash_attention(gpu):
    """PyTorch's own call, on our kernels, dropout and gradients too."""
    q, k, v = (torch.randn(2, 4, 70, 32, device=gpu.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def call(function, x, **options):
        out = function(*x, is_causal=True, **options)
        return [out, *torch.autograd.grad(out, x, torch.ones_like(out))]

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        truth, by_torch = call(sdpa, exact), call(sdpa, (q, k, v))
    torch.nn.attention.activate_flash_attention_impl("flashattn")
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            results = call(sdpa, (q, k, v))
            dropped = None if gpu.rehearsed else call(sdpa, (q, k, v), dropout_p=0.5)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    for name, x, y, t in zip(("out", "grad_q", "grad_k", "grad_v"), results, by_torch, truth, strict=True):
        assert_as_exact_as_torch(x, y, t, name)
    assert torch.equal(results[0], flashattn.attention(q, k, v, causal=True))
    if dropped is not None:  # PyTorch's operator for the CPU keeps no seed
        assert all(x.isfinite().all() for x in dropped)
        assert not torch.equal(dropped[0], results[0])


@pytest.mark.parametrize("name", ["window_causal", "softcap"])
def test_flash_attn_drop_in(gpu, name):
    with torch.device(gpu.device):
        flash_attn_cases.check_as_attention(name)


@pytest.mark.parametrize("lies", ["rows", "pages", "chosen"])
def test_flash_attn_with_kvcache(gpu, lies):
    with torch.device(gpu.device):
        flash_attn_cases.check_kvcache(lies, "causal")
        flash_attn_cases.check_kvcache_rotates(True, True)


def test_flash_attn_varlen_of_pages(gpu, monkeypatch):
    for name in ("STARTS_Q", "STARTS_K"):
        monkeypatch.setattr(flash_attn_cases, name, getattr(flash_attn_cases, name).to(gpu.device))
    with torch.device(gpu.device):
        flash_attn_cases.check_varlen_of_pages()


def test_flex_attention(gpu):
    torch.use_deterministic_algorithms(False)
    with torch.device(gpu.device):
        flex_cases.check_as_flex_attention("alibi", "causal", "triton")


def test_modules_as_in_torch(gpu):
    with torch.device(gpu.device), sdpa_kernel(SDPBackend.MATH):
        multihead_cases.check("everything", "both_float", False)
        module_cases.check_layer_norm({})
        module_cases.check_rms_norm({"eps": 1e-6})


# ------------------------------------------------------------------------------------------------ what only a GPU has


def test_a_call_waits_for_what_its_stream_does(gpu):
    """A launch on another stream would read memory before this stream has written it."""
    sizes = (1, 2, 70, 64) if gpu.rehearsed else (2, 8, 512, 64)
    inputs, width = make_tensors(gpu.device, *sizes), sizes[-1]
    weight = torch.randn(width, device=gpu.device)
    expected = run_attention(*inputs) + run_norm(inputs[0], weight)
    late = [torch.full_like(x, torch.nan) for x in inputs]
    gpu.synchronize()
    stream = gpu.stream()
    with gpu.use_stream(stream):
        gpu.sleep()
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y)
        results = run_attention(*late) + run_norm(late[0], weight)
    gpu.synchronize()
    assert_same(results, expected)


def test_two_streams_at_once(gpu):
    sizes = (1, 2, 70, 64) if gpu.rehearsed else (1, 4, 1024, 64)
    both = [make_tensors(gpu.device, *sizes) for _ in range(2)]
    expected = [run_attention(*inputs) for inputs in both]
    gpu.synchronize()
    streams, results = [gpu.stream() for _ in both], ([], [])
    for _ in range(gpu.runs // 2):
        for stream, inputs, kept in zip(streams, both, results, strict=True):
            with gpu.use_stream(stream):
                kept.append(run_attention(*inputs))
    gpu.synchronize()
    for kept, wanted in zip(results, expected, strict=True):
        for result in kept:
            assert_same(result, wanted)


def test_threads_that_compile_at_once(gpu):
    """Each thread calls a kernel that is not compiled yet."""
    if gpu.rehearsed:
        pytest.skip("needs a GPU: the PTX machine runs one launch at a time")
    every = [make_tensors(gpu.device, 1, 2, 70, dim) for dim in (24, 40, 56, 24)]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda inputs: run_attention(*inputs), every))
    for inputs, result in zip(every, results, strict=True):
        assert_same(result, run_attention(*inputs))


def test_a_second_device(gpu):
    """While the first is the current device."""
    if gpu.rehearsed or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, weight = make_tensors(gpu.device, 2, 4, 111, 64), torch.randn(64, device=gpu.device)
    expected = run_attention(*inputs, dropout_p=0.2, seed=3) + run_norm(inputs[0], weight)
    other = torch.device("cuda", 1 - gpu.device.index)
    results = run_attention(*(x.to(other) for x in inputs), dropout_p=0.2, seed=3)
    results += run_norm(inputs[0].to(other), weight.to(other))
    assert all(x.device == other for x in results)
    assert torch.cuda.current_device() == gpu.device.index
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x.cpu(), y.cpu(), rtol=2e-2, atol=2e-2)  # the cards may differ
    cache = flashattn.KVCache(2, 2, 128, 64, dtype=torch.bfloat16, device=other)
    q, k, v = (x.to(other) for x in inputs)
    out = flashattn.decode(q, cache, k, v)
    torch.testing.assert_close(out.cpu(), flashattn.attention(*inputs, causal=True).cpu(), rtol=2e-2, atol=2e-2)


def test_nothing_waits_for_the_gpu(gpu):
    q, k, v = make_tensors(gpu.device, 2, 4, 63, 64)
    starts = torch.tensor([0, 30, 63], dtype=torch.int32, device=gpu.device)
    weight, lengths = torch.randn(64, device=gpu.device), torch.tensor([20, 63])
    kinds = dict(dtype=torch.bfloat16, device=gpu.device)
    cache, pages = flashattn.KVCache(2, 2, 64, 64, **kinds), flashattn.PagedKVCache(16, 8, 2, 64, **kinds)
    both = [pages.add(), pages.add()]
    rotary = flashattn.Rotary(*torch.randn(2, 64, 32, device=gpu.device))
    whole = torch.zeros(2, 2, 80, 2, 64, **kinds)

    def call():
        run_attention(q, k, v, dropout_p=0.1)
        flashattn.attention(q, k, v, kv_lengths=lengths)
        run_packed(*(x[0].transpose(0, 1) for x in (q, k, v)), starts, 33)
        run_norm(q, weight)
        flashattn.decode(q[:, :, :1], cache, k[:, :, :1], v[:, :, :1], rotary)
        flashattn.decode(q[:, :, :1], pages.select(both), k[:, :, :1], v[:, :, :1], rotary)
        flash_attn.flash_attn_with_kvcache(q[:, :, :3].transpose(1, 2), *whole, cache_seqlens=50)

    call()  # compiles
    with gpu.forbid_waiting():
        call()


def test_same_bits_in_every_run(gpu):
    """Each kernel with many programs: a race would change bits."""
    batch, heads, seq = (1, 2, 130) if gpu.rehearsed else (2, 8, 1111)
    q, k, v = make_tensors(gpu.device, batch, heads, seq, 64)
    wide = make_tensors(gpu.device, 1, 2, seq, 128, dtype=torch.float16)
    starts = torch.tensor([0, 40, 41, seq], dtype=torch.int32, device=gpu.device)
    bias = torch.randn(1, q.shape[1], 1, seq, device=gpu.device, dtype=q.dtype, requires_grad=True)
    weight = torch.randn(64, device=gpu.device)
    cache = flashattn.KVCache(*k.shape[:2], seq, 64, dtype=k.dtype, device=gpu.device)
    flashattn.decode(q, cache, k, v)

    def call():
        out = flashattn.attention(q, k, v, bias=bias, softcap=5.0, dropout_p=0.1, seed=7)
        results = [*torch.autograd.grad(out, bias, out.detach())]
        results += run_attention(q, k, v) + run_attention(*wide)
        results += run_packed(*(x[0].transpose(0, 1) for x in (q, k, v)), starts, seq - 41)
        results += [flashattn.decode(q[:, :, -1:], cache)]
        return results + run_norm(q, weight)

    first = call()
    for _ in range(gpu.runs - 1):
        assert_same(call(), first)


# ------------------------------------------------------------------------------------------------ memory


def spread(gpu, dim: int, stride: int, *like: torch.Tensor) -> list[torch.Tensor]:
    """Views with the numbers of `like`, all of one shape, whose dimension `dim` has this stride, in elements."""
    stacked = torch.stack([x.detach() for x in like])
    strides = list(stacked.stride())
    strides[dim + 1] = stride
    elements = 1 + sum((size - 1) * step for size, step in zip(stacked.shape, strides, strict=True))
    assert elements > 2**31
    return list(gpu.allocate(elements, stacked.dtype).as_strided(stacked.shape, strides).copy_(stacked))


@pytest.mark.parametrize("dim, stride", [(0, 2**31), (1, 2**31), (2, 2**25)], ids=["batch", "heads", "seq"])
def test_offsets_past_2_31_elements(gpu, dim, stride):
    inputs = [torch.randn(2, 2, 65, 32, device=gpu.device).bfloat16() for _ in range(3)]
    assert_same(run_attention(*spread(gpu, dim, stride, *inputs)), run_attention(*inputs))


@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_offsets_past_2_31_elements_of_planes(gpu, kind):
    inputs = make_tensors(gpu.device, 1, 2, 70, 32)
    plane = torch.randn(1, 1, 70, 70, device=gpu.device).bfloat16()
    plane = plane > 0 if kind == "mask" else plane
    (far,) = spread(gpu, 2, 2**25, plane)
    assert_same(run_attention(*inputs, **{kind: far}), run_attention(*inputs, **{kind: plane}))


def test_offsets_past_2_31_elements_of_norms(gpu):
    x, weight = torch.randn(40, 64, device=gpu.device).bfloat16(), torch.randn(64, device=gpu.device)
    assert_same(run_norm(*spread(gpu, 0, 2**26, x), weight), run_norm(x, weight))


@pytest.mark.parametrize("page_size", [None, 16])
def test_offsets_past_2_31_elements_of_caches(gpu, page_size):
    q, k, v = make_tensors(gpu.device, 2, 4, 40, 32)
    sizes, kinds = (2, 48, 32), dict(dtype=q.dtype, device=gpu.device)
    results = []
    for far in (False, True):
        if page_size is None:
            cache = selected = flashattn.KVCache(2, *sizes, **kinds)
        else:
            cache = flashattn.PagedKVCache(6, page_size, 2, 32, **kinds)
            selected = cache.select([cache.add(), cache.add()])
        if far:
            zeros = torch.zeros_like(cache.k)
            cache.k, cache.v = spread(gpu, 0, 2**31 // (cache.k.shape[0] - 1) + 2**20, zeros, zeros)
        results.append([flashattn.decode(q, selected, k, v), flashattn.decode(q[:, :, -1:], selected)])
    assert_same(*results)


def test_results_of_more_than_2_31_elements(gpu):
    """With few keys, to be quick. Rows are independent: the last of them alone give the same bits."""
    if gpu.rehearsed:
        pytest.skip("needs a GPU: 20 GiB and as many bytes of work")
    seq, last = 2**21 + 128, slice(-128, None)
    memory = gpu.allocate(5 * 8 * seq * 128, torch.bfloat16)  # the room for all that follows
    del memory
    q = torch.empty(1, 8, seq, 128, dtype=torch.bfloat16, device=gpu.device).normal_()
    k, v = (torch.randn(1, 8, 16, 128, device=gpu.device).bfloat16() for _ in range(2))
    q.requires_grad_()
    out, lse = flashattn.attention(q, k, v, return_lse=True)
    (grad,) = torch.autograd.grad(out, q, q.detach())
    tail = q[:, -1:, last].detach().requires_grad_()
    expected, expected_lse = flashattn.attention(tail, k[:, -1:], v[:, -1:], return_lse=True)
    (expected_grad,) = torch.autograd.grad(expected, tail, tail.detach())
    assert_same([out[:, -1:, last], lse[:, -1:, last], grad[:, -1:, last]], [expected, expected_lse, expected_grad])
    del out, lse, grad
    flat = q.detach().view(-1, 128)
    weight = torch.randn(128, device=gpu.device)
    assert torch.equal(flashattn.rms_norm(flat, weight)[last], flashattn.rms_norm(flat[last], weight))


def make_calls(seq: int, device) -> dict:
    """Calls on this many tokens."""
    q, k, v = make_tensors(device, 1, 4, seq, 64)
    flat, starts = [x[0].transpose(0, 1) for x in (q, k, v)], torch.tensor([0, seq], dtype=torch.int32, device=device)
    bias = torch.randn(1, 1, 1, seq, device=device).bfloat16().requires_grad_()
    cache = flashattn.KVCache(1, 2, seq, 64, dtype=q.dtype, device=device)
    table = torch.randn(4, 2 * seq, device=device)

    def mod(score, b, h, i, j):
        return score + table[h, i - j + seq]

    def decode():
        cache.truncate([0])
        return flashattn.decode(q, cache, k, v)

    return {
        "attention": lambda: run_attention(q, k, v, dropout_p=0.1),
        "bias": lambda: torch.autograd.grad(flashattn.attention(q, k, v, bias=bias).sum(), bias),
        "packed": lambda: run_packed(*flat, starts, seq),
        "decode": decode,
        "norm": lambda: run_norm(q, torch.ones(64, device=device)),
        "score_mod": lambda: run_attention(q, k, v, score_mod=mod),
    }


def test_memory_is_linear(gpu):
    """One matrix of the scores of 8,192 tokens would be 512 MiB."""
    small, large = (make_calls(seq, gpu.device) for seq in ((17, 34) if gpu.rehearsed else (4096, 8192)))
    for name in small:
        small[name](), large[name]()  # compiles
    if gpu.rehearsed:
        pytest.skip("needs a GPU: its allocator counts the memory")
    for name in small:
        some, more = gpu.measure_peak(small[name]), gpu.measure_peak(large[name])
        assert more <= 2.1 * some + 2**20, f"{name}: {some >> 20} MiB for 4,096 tokens, {more >> 20} for 8,192"
        assert more < 128 << 20, f"{name}: {more >> 20} MiB for 8,192 tokens"
