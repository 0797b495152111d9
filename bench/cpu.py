"""The CPU engine against PyTorch's own calls, and against this machine's ceilings."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm, scaled_dot_product_attention

import flashattn

from .measure import Pair, compute_max_error, measure_pair

CPU = torch.device("cpu")


class Calls(NamedTuple):
    """The two calls of a case; `truth` is their result in float64."""

    ours: Callable[[], object]
    theirs: Callable[[], object]
    truth: Callable[[], list[Tensor]] | None = None
    extract: Callable[[object], list[Tensor]] = lambda result: [result]  # of a result, what is compared


class Case(NamedTuple):
    name: str
    dtype: str
    target: float  # minimum ratio
    work: float  # FLOPs or bytes of a call
    unit: str  # "GFLOP/s", compared with the FMA rate of the dtype, or "GB/s", with the read bandwidth
    prepare: Callable[[torch.dtype], Calls]


class Result(NamedTuple):
    case: Case
    times: Pair
    rate: float  # in the case's unit
    ceiling: float  # likewise
    error: float | None  # against float64; None where there is nothing to compare
    their_error: float | None
    correct: bool

    @property
    def roofline(self) -> float:
        """The ratio of a call that runs at the ceiling."""
        return self.ceiling / (self.case.work / self.times.theirs / 1e9)


# ------------------------------------------------------------------------------------------------ the ceilings


def measure_ceilings() -> dict[str, float]:
    """GFLOP/s of register-only FMAs by dtype, and GB/s of reading 256 MiB, on all threads: the best of 8."""
    ops = torch.ops.flashattn_cpu

    def best(run: Callable[[], int]) -> float:
        rates = []
        for _ in range(8):
            start = time.perf_counter()
            rates.append(run() / (time.perf_counter() - start) / 1e9)
        return max(rates)

    memory = torch.ones(64 * 2**20)
    float32, bfloat16 = (
        best(lambda d=d: ops.peak_fma_probe(torch.empty(0, dtype=d), 10**7)) for d in (torch.float32, torch.bfloat16)
    )
    return {
        "float32": float32, "bfloat16": bfloat16, "float16": float32,  # float16 goes through float32
        "GB/s": best(lambda: ops.read_bandwidth_probe(memory)),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ attention


def make_inputs(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def call_in_float64(call: Callable[..., object], *inputs: Tensor) -> object:
    with flashattn.use_backend("reference"):
        return call(*(x.double() for x in inputs))


def make_attention_calls(q: Tensor, k: Tensor, v: Tensor, theirs: Callable[[], Tensor], **options) -> Calls:
    return Calls(
        lambda: flashattn.attention(q, k, v, **options),
        theirs,
        lambda: [call_in_float64(lambda *x: flashattn.attention(*x, **options), q, k, v)],
    )


def make_forward_case(name: str, dtype: str, target: float, shape: tuple[int, ...], causal: bool = False) -> Case:
    def prepare(d: torch.dtype) -> Calls:
        q, k, v = make_inputs(d, shape, shape, shape)
        return make_attention_calls(
            q, k, v, lambda: scaled_dot_product_attention(q, k, v, is_causal=causal), causal=causal
        )

    return Case(f"forward {name}", dtype, target, count_attention_flops(shape, causal), "GFLOP/s", prepare)


def count_attention_flops(shape: tuple[int, ...], causal: bool) -> float:
    batch, heads, seq, head_dim = shape
    return 4 * batch * heads * seq**2 * head_dim * (0.5 if causal else 1)


def make_backward(call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = call(*inputs)
    return lambda: torch.autograd.grad(out, inputs, grad.to(out), retain_graph=True)


def make_gradient_calls(ours: Callable, theirs: Callable, inputs: list[Tensor], grad: Tensor) -> Calls:
    def truth():
        with flashattn.use_backend("reference"):
            return list(make_backward(ours, [x.double() for x in inputs], grad)())

    return Calls(make_backward(ours, inputs, grad), make_backward(theirs, inputs, grad), truth, list)


def make_backward_case(name: str, dtype: str, target: float, shape: tuple[int, ...], causal: bool = False) -> Case:
    def prepare(d: torch.dtype) -> Calls:
        *inputs, grad = make_inputs(d, shape, shape, shape, shape)
        return make_gradient_calls(
            lambda *x: flashattn.attention(*x, causal=causal),
            lambda *x: scaled_dot_product_attention(*x, is_causal=causal),
            inputs,
            grad,
        )

    return Case(f"backward {name}", dtype, target, 2.5 * count_attention_flops(shape, causal), "GFLOP/s", prepare)


def make_strided_case(dtype: str, shape: tuple[int, ...]) -> Case:
    """Ours on views of (batch, seq, heads, dim) memory against ours on contiguous tensors."""

    def prepare(d: torch.dtype) -> Calls:
        q, k, v = make_inputs(d, shape, shape, shape)
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        return make_attention_calls(*views, lambda: flashattn.attention(q, k, v))

    return Case("strided, to contiguous", dtype, 0.95, count_attention_flops(shape, False), "GFLOP/s", prepare)


def make_decode_case(dtype: str, target: float, seq: int, folded: bool = False) -> Case:
    """One new token of 32 query heads over 8 cached key/value heads."""
    heads, kv_heads, head_dim = 32, 8, 128

    def prepare(d: torch.dtype) -> Calls:
        q, k, v = make_inputs(d, (1, heads, 1, head_dim), *[(1, kv_heads, seq, head_dim)] * 2)
        if not folded:
            return make_attention_calls(q, k, v, lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True))
        rows = q.view(1, kv_heads, heads // kv_heads, head_dim)
        return make_attention_calls(q, k, v, lambda: scaled_dot_product_attention(rows, k, v).view(q.shape))

    size = 2 * kv_heads * seq * head_dim * getattr(torch, dtype).itemsize
    name = f"decode, {seq // 1024}k keys" + ", to folded" * folded
    return Case(name, dtype, target, size, "GB/s", prepare)


def make_window_case(dtype: str, target: float, shape: tuple[int, ...], left: int) -> Case:
    batch, heads, seq, head_dim = shape

    def prepare(d: torch.dtype) -> Calls:
        q, k, v = make_inputs(d, shape, shape, shape)
        i, j = torch.arange(seq)[:, None], torch.arange(seq)
        mask = (j <= i) & (j >= i - left)
        return make_attention_calls(
            q, k, v, lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask), window=(left, 0)
        )

    pairs = seq * (left + 1) - left * (left + 1) // 2
    return Case(f"window ({left}, 0) of {seq}", dtype, target, 4 * batch * heads * pairs * head_dim, "GFLOP/s", prepare)


LENGTHS = (64, 1024, 128, 512, 96, 768, 256, 384)


def make_mixed_lengths_case(dtype: str, target: float, packed: bool, heads: int = 8, head_dim: int = 64) -> Case:
    """Ours padded or packed; PyTorch gets the padded batch and a key mask."""
    shape = (len(LENGTHS), heads, max(LENGTHS), head_dim)

    def prepare(d: torch.dtype) -> Calls:
        q, k, v = make_inputs(d, shape, shape, shape)
        lengths = torch.tensor(LENGTHS)
        valid = torch.arange(shape[2]) < lengths[:, None]

        def theirs() -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])

        if not packed:
            calls = make_attention_calls(q, k, v, theirs, q_lengths=lengths, kv_lengths=lengths)
            return calls._replace(extract=lambda out: [out * valid[:, None, :, None]])
        rows = [x.transpose(1, 2)[valid] for x in (q, k, v)]
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()

        def ours(*x: Tensor) -> Tensor:
            return flashattn.attention_varlen(*x, starts, starts, shape[2], shape[2])

        def extract(out: Tensor) -> list[Tensor]:
            return [out if out.dim() == 3 else out.transpose(1, 2)[valid]]

        return Calls(lambda: ours(*rows), theirs, lambda: [call_in_float64(ours, *rows)], extract)

    work = 4 * heads * head_dim * sum(n * n for n in LENGTHS)
    return Case(f"lengths 64 to 1024, {'packed' if packed else 'padded'}", dtype, target, work, "GFLOP/s", prepare)


def make_paged_decode_case(dtype: str, target: float, seq: int, page_size: int) -> Case:
    """One new token against a cache in shuffled pages; PyTorch reads a contiguous one."""
    heads, kv_heads, head_dim = 32, 8, 128

    def prepare(d: torch.dtype) -> Calls:
        q, k, v = make_inputs(d, (1, heads, 1, head_dim), *[(1, kv_heads, seq, head_dim)] * 2)
        cache = flashattn.PagedKVCache(seq // page_size, page_size, kv_heads, head_dim, dtype=d)
        random.Random(0).shuffle(cache._free)
        batch = cache.select([cache.add()])
        with torch.no_grad():
            flashattn.decode(q.new_zeros(1, kv_heads, seq, head_dim), batch, k, v, window=(0, 0))

        def ours() -> Tensor:
            return flashattn.decode(q, batch)

        calls = make_attention_calls(q, k, v, lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True))
        return calls._replace(ours=ours)

    size = 2 * kv_heads * seq * head_dim * getattr(torch, dtype).itemsize
    return Case(f"decode, {seq // 1024}k keys, pages of {page_size}", dtype, target, size, "GB/s", prepare)


def make_threads_case(dtype: str, target: float, shape: tuple[int, ...]) -> Case:
    """All threads against one."""

    def prepare(d: torch.dtype) -> Calls:
        q, k, v = make_inputs(d, shape, shape, shape)
        every = torch.get_num_threads()

        def on(count: int) -> Tensor:
            torch.set_num_threads(count)
            try:
                return flashattn.attention(q, k, v)
            finally:
                torch.set_num_threads(every)

        return make_attention_calls(q, k, v, lambda: on(1))._replace(ours=lambda: on(every))

    name = f"{torch.get_num_threads()} threads, to one"
    return Case(name, dtype, target, count_attention_flops(shape, False), "GFLOP/s", prepare)


# ------------------------------------------------------------------------------------------------ norms


def make_norm_case(
    name: str, dtype: str, target: float, ours: Callable, theirs: Callable, inputs: int, moved: int
) -> Case:
    """`inputs` tensors of (4096, 1024), then weight and bias; `moved`: how many of that size are read or written."""
    rows, width = 4096, 1024

    def prepare(d: torch.dtype) -> Calls:
        x = make_inputs(d, *[(rows, width)] * inputs, (width,), (width,))
        as_list = lambda result: list(result) if isinstance(result, tuple) else [result]  # noqa: E731
        return Calls(lambda: ours(*x), lambda: theirs(*x), lambda: as_list(call_in_float64(ours, *x)), as_list)

    return Case(name, dtype, target, moved * rows * width * getattr(torch, dtype).itemsize, "GB/s", prepare)


def make_norm_backward_case(name: str, dtype: str, target: float, ours: Callable, theirs: Callable) -> Case:
    rows, width = 4096, 1024

    def prepare(d: torch.dtype) -> Calls:
        *inputs, grad = make_inputs(d, (rows, width), (width,), (width,), (rows, width))
        return make_gradient_calls(ours, theirs, inputs, grad)

    return Case(name, dtype, target, 3 * rows * width * getattr(torch, dtype).itemsize, "GB/s", prepare)


def torch_layer_norm(x, weight, bias):
    return layer_norm(x, x.shape[-1:], weight, bias)


def torch_rms_norm(x, weight, _):
    return rms_norm(x, x.shape[-1:], weight, 1e-6)


def our_rms_norm(x, weight, _):
    return flashattn.rms_norm(x, weight)


def torch_add_rms_norm(x, residual, weight, bias):
    hidden = x + residual
    return torch_rms_norm(hidden, weight, bias), hidden


def our_add_rms_norm(x, residual, weight, _):
    return flashattn.rms_norm(x, weight, residual=residual, prenorm=True)


# ------------------------------------------------------------------------------------------------ linear layers


def make_linear_case(dtype: str, target: float, rows: int, width: int, outputs: int) -> Case:
    """The product of a decode step, of one sequence or several."""

    def prepare(d: torch.dtype) -> Calls:
        x, weight = make_inputs(d, (rows, width), (outputs, width))
        return Calls(
            lambda: flashattn.linear(x, weight),
            lambda: linear(x, weight),
            lambda: [linear(x.double(), weight.double())],
        )

    size = width * outputs * getattr(torch, dtype).itemsize
    return Case(f"linear, {rows} x {width} to {outputs}", dtype, target, size, "GB/s", prepare)


# ------------------------------------------------------------------------------------------------ the list

BIG, WIDE, SHORT = (1, 8, 2048, 64), (1, 8, 2048, 128), (1, 8, 512, 64)

# The targets were set for a processor with 2 AVX-512 FMAs a cycle, on which torch's attention reaches a third of the
# peak. `Result.roofline` is the most that is possible on this machine.
CASES = [
    make_forward_case("2048, head_dim 64", "float32", 2.4, BIG),
    make_forward_case("2048, head_dim 128", "float32", 2.4, WIDE),
    make_forward_case("2048, head_dim 64", "bfloat16", 4.2, BIG),
    make_forward_case("2048, head_dim 128", "bfloat16", 4.2, WIDE),
    make_forward_case("2048, head_dim 64", "float16", 3.5, BIG),
    make_forward_case("2048, head_dim 128", "float16", 3.5, WIDE),
    make_forward_case("causal 2048", "float32", 2.5, BIG, causal=True),
    make_forward_case("causal 2048", "bfloat16", 5, BIG, causal=True),
    make_forward_case("causal 512", "float32", 3.5, SHORT, causal=True),
    make_forward_case("causal 512", "bfloat16", 6, SHORT, causal=True),
    make_forward_case("64 tokens, whole call", "float32", 2, (1, 8, 64, 64)),
    make_backward_case("2048", "float32", 2.4, BIG),
    make_backward_case("2048", "bfloat16", 2.8, BIG),
    make_backward_case("causal 2048", "float32", 2.9, BIG, causal=True),
    make_backward_case("causal 2048", "bfloat16", 3.3, BIG, causal=True),
    make_strided_case("float32", BIG),
    make_strided_case("bfloat16", BIG),
    make_decode_case("float32", 2.5, 8192),
    make_decode_case("bfloat16", 20, 8192),
    make_decode_case("bfloat16", 2.8, 32768, folded=True),
    make_paged_decode_case("float32", 2.5, 8192, 16),
    make_paged_decode_case("bfloat16", 20, 8192, 16),
    make_window_case("float32", 8, (1, 2, 8192, 64), 512),
    make_mixed_lengths_case("float32", 3, packed=False),
    make_mixed_lengths_case("float32", 3, packed=True),
    make_threads_case("float32", 1.85, BIG),
    make_norm_case("layer_norm", "float32", 1.6, flashattn.layer_norm, torch_layer_norm, 1, 2),
    make_norm_case("layer_norm", "bfloat16", 2.3, flashattn.layer_norm, torch_layer_norm, 1, 2),
    make_norm_case("rms_norm", "float32", 4, our_rms_norm, torch_rms_norm, 1, 2),
    make_norm_case("rms_norm", "bfloat16", 15, our_rms_norm, torch_rms_norm, 1, 2),
    make_norm_case("add + rms_norm", "bfloat16", 5, our_add_rms_norm, torch_add_rms_norm, 2, 4),
    make_norm_backward_case("layer_norm backward", "float32", 1.3, flashattn.layer_norm, torch_layer_norm),
    make_norm_backward_case("layer_norm backward", "bfloat16", 2.2, flashattn.layer_norm, torch_layer_norm),
    make_linear_case("float32", 1, 1, 576, 49152),  # SmolLM2's head
    make_linear_case("bfloat16", 1, 1, 576, 49152),
    make_linear_case("float32", 1, 16, 576, 49152),
    make_linear_case("bfloat16", 1, 16, 576, 49152),
]


def select(words: list[str]) -> list[Case]:
    """The cases whose name and dtype contain every word."""
    return [case for case in CASES if all(word in f"{case.name} {case.dtype}" for word in words)]


def run(case: Case, ceiling: dict[str, float], seconds: float) -> Result:
    dtype = getattr(torch, case.dtype)
    with torch.set_grad_enabled("backward" in case.name):
        calls = case.prepare(dtype)
        times = measure_pair(calls.ours, calls.theirs, CPU, seconds)
        truth = calls.truth()
        ours, theirs = (calls.extract(call()) for call in (calls.ours, calls.theirs))
    error, their_error = (max(map(compute_max_error, results, truth)) for results in (ours, theirs))
    last_place = torch.finfo(dtype).eps * max(t.abs().max().item() for t in truth)
    return Result(
        case, times, case.work / times.ours / 1e9, ceiling["GB/s" if case.unit == "GB/s" else case.dtype],
        error, their_error, error <= 2 * their_error + last_place,
    )  # fmt: skip
