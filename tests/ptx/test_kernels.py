"""Ordinary Triton kernels, compiled for a GPU and executed by the PTX machine, against NumPy and PyTorch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.common import INTERPRETED
from tests.ptx import kernels

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from bench import ptx

ARCHITECTURES = ["sm_80", "sm_90"]
FLOAT8 = (torch.float8_e5m2, torch.float8_e4m3fn)


@pytest.fixture(params=ARCHITECTURES)
def gpu(request):
    torch.manual_seed(0)
    with ptx.device(request.param) as device:
        yield device


def test_softmax(gpu):
    x, out = torch.randn(4, 1000), torch.empty(4, 1000)
    kernels.softmax[(4,)](x, out, 1000, BLOCK=1024)
    torch.testing.assert_close(out, x.softmax(-1), rtol=1e-5, atol=1e-8)


# (input, output, accumulator, tolerance of sums of K = 100 products, relative to the sum of their magnitudes)
PRODUCTS = [
    (torch.float16, torch.float32, tl.float32, 2.0**-22),
    (torch.float16, torch.float16, tl.float16, 2.0**-8),
    (torch.bfloat16, torch.float32, tl.float32, 2.0**-22),
    (torch.float32, torch.float32, tl.float32, 2.0**-9),  # tf32 keeps 10 bits of each factor
    (torch.float64, torch.float64, tl.float64, 2.0**-50),
    (torch.int8, torch.int32, tl.int32, 0),
    (torch.float8_e5m2, torch.float32, tl.float32, 2.0**-11),
    (torch.float8_e4m3fn, torch.float32, tl.float32, 2.0**-11),
]


@pytest.mark.parametrize("tiles", [(64, 64, 4), (128, 128, 8)], ids=str)
@pytest.mark.parametrize("dtypes", PRODUCTS, ids=lambda x: f"{x[0]}-{x[2]}")
def test_matmul(gpu, dtypes, tiles):
    dtype, out_dtype, accumulator, error = dtypes
    if dtype == torch.float8_e4m3fn and gpu.architecture == "sm_80":
        pytest.skip("Triton has no e4m3 on sm_80")
    M, N, K = 150, 136, 112
    a, b = ((torch.randn(*shape) * (20 if dtype == torch.int8 else 1)).to(dtype) for shape in ((M, K), (K, N)))
    c = torch.zeros(M, N, dtype=out_dtype)
    BLOCK_M, BLOCK_N, num_warps = tiles
    grid = triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N)
    block_k = 32 if dtype != torch.float64 else 16
    tiles = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=block_k, ACC=accumulator, num_warps=num_warps)
    kernels.matmul[grid](a, b, c, M, N, K, K, N, N, **tiles)
    exact = a.double() @ b.double()
    bound = error * (a.double().abs() @ b.double().abs())
    assert ((c.double() - exact).abs() <= bound).all()
    assert gpu.launches[-1].counts.total("flops") >= 2 * M * N * K
    # Triton 3.7.1 packs float16 accumulators anew in every turn, before the wait: the assembler waits in its place.
    packed = accumulator == tl.float16 and gpu.architecture == "sm_90"
    assert {note.kind for note in gpu.notes} == ({"pending wgmma"} if packed else set())


@pytest.mark.parametrize("dtypes", PRODUCTS[-2:], ids=lambda x: str(x[0]))
def test_matmul_of_8_bits_on_sm_89(dtypes):
    """mma.sync of fp8: sm_90 has wgmma for it, sm_80 neither."""
    with ptx.device("sm_89") as device:
        test_matmul(device, dtypes, (64, 64, 4))
    assert any("m16n8k32" in op for op in device.launches[0].counts.sum_by_opcode())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("made", [False, True], ids=["host", "device"])
def test_tensor_descriptors(gpu, dtype, made):
    """Bulk copies with swizzles on sm_90, plain loads on sm_80; the last tiles hang over the edge."""
    M, N, K = 96, 80, 64
    a, b, c = torch.randn(M, K, dtype=dtype), torch.randn(K, N, dtype=dtype), torch.zeros(M, N, dtype=dtype)
    tiles = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
    if made:
        kernels.matmul_made_descriptors[(2, 2)](a, b, c, M, N, K, **tiles)
    else:
        blocks = ([64, 32], [32, 64], [64, 64])
        a_, b_, c_ = (TensorDescriptor.from_tensor(x, block) for x, block in zip((a, b, c), blocks, strict=True))
        kernels.matmul_descriptors[(2, 2)](a_, b_, c_, K, **tiles)
    torch.testing.assert_close(c, (a.double() @ b.double()).to(dtype), rtol=2e-3, atol=0.02)


def test_specialised_warps():
    a, b, c = torch.randn(128, 128).half(), torch.randn(128, 128).half(), torch.zeros(128, 128).half()
    blocks = ([64, 64], [64, 64], [64, 64])
    with ptx.device("sm_90") as gpu:
        maps = [TensorDescriptor.from_tensor(x, block) for x, block in zip((a, b, c), blocks, strict=True)]
        kernels.matmul_specialised[(2, 2)](*maps, 128, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4)
    torch.testing.assert_close(c, (a.double() @ b.double()).half(), rtol=2e-3, atol=0.02)
    assert gpu.launches[0].threads == 384
    assert any(op.startswith("setmaxnreg") for op in gpu.launches[0].counts.sum_by_opcode())


def test_box_of_three_dimensions(gpu):
    x, out = torch.randn(4, 20, 32), torch.zeros(2, 16, 16)
    maps = [TensorDescriptor.from_tensor(t, [2, 16, 16]) for t in (x, out)]
    kernels.copy_box[(1,)](*maps)
    assert torch.equal(out, x[1:3, 2:18, 4:20])


def test_dependent_launch():
    x, out = torch.randn(128), torch.zeros(128)
    with ptx.device("sm_90"):
        kernels.copy_after_another_launch[(1,)](x, out, BLOCK=128, launch_pdl=True)
    assert torch.equal(out, x)


def test_histogram(gpu):
    x = torch.randint(0, 100, (1000,), dtype=torch.int32)
    expected = torch.bincount(x, minlength=128).int()
    bins = torch.zeros(128, dtype=torch.int32)
    kernels.histogram[(4,)](x, bins, 1000, BLOCK=256)
    assert torch.equal(bins, expected)
    bins.zero_()
    kernels.histogram_shared[(4,)](x, bins, 1000, BLOCK=256, BINS=128)
    assert torch.equal(bins, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_scan_sort_argmax(gpu, dtype):
    x = (torch.randn(4, 512) * 100).to(dtype)
    out = torch.empty_like(x)
    kernels.scan[(4,)](x, out, BLOCK=512)
    torch.testing.assert_close(out.double(), x.double().cumsum(1), rtol=1e-5, atol=1e-2)
    kernels.sort[(4,)](x, out, BLOCK=512)
    assert torch.equal(out, x.sort(1).values)
    best = torch.empty(4, dtype=torch.int32)
    kernels.argmax[(4,)](x, best, BLOCK=512)
    assert torch.equal(x.gather(1, best.long()[:, None])[:, 0], x.amax(1))


def test_dropout(gpu):
    x, out = torch.randn(1000), torch.empty(1000)
    kernels.dropout[(4,)](x, out, 1000, 0.25, 7, BLOCK=256)
    kept = out != 0
    assert 0.68 < kept.float().mean() < 0.82
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    uniform = philox_uniform(7, np.arange(1000, dtype=np.uint32))
    assert np.array_equal(kept.numpy(), uniform > np.float32(0.25))


def philox_uniform(seed: int, offset: np.ndarray) -> np.ndarray:
    """Philox 4x32 with 10 rounds (Salmon et al., 2011), the first word as a float in [0, 1), as tl.rand has it."""
    c = [offset.astype(np.uint64), *(np.zeros(len(offset), np.uint64) for _ in range(3))]
    k, low = [seed & 0xFFFFFFFF, seed >> 32], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            a & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    x = c[0].astype(np.uint32).view(np.int32)
    return np.where(x < 0, -x - 1, x).astype(np.float32) * np.float32(4.6566127342e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_transpose(gpu, dtype):
    x = (torch.randn(128, 128) * 50).to(dtype)
    out = torch.empty_like(x)
    kernels.transpose[(2, 2)](x, out, 128, BLOCK=64)
    assert torch.equal(out, x.T)


def test_reduction_and_gather(gpu):
    x, out = torch.randn(64, 64), torch.empty(64)
    kernels.sum_columns[(1,)](x, out, 64, ROWS=64, COLS=64)
    torch.testing.assert_close(out, x.double().sum(0).float(), rtol=1e-5, atol=1e-5)
    values, index, out = torch.randn(1024), torch.randint(0, 1024, (128,), dtype=torch.int32), torch.empty(128)
    kernels.gather[(1,)](values, index, out, BLOCK=1024, N=128)
    assert torch.equal(out, values[index.long()])


NUMBERS = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


@pytest.mark.parametrize("to", [*NUMBERS, *FLOAT8], ids=str)
@pytest.mark.parametrize("source", [*NUMBERS, *FLOAT8], ids=str)
def test_cast(gpu, source, to):
    """As PyTorch casts. Float to integer stays in range: outside it C++ leaves the result open."""
    if gpu.architecture == "sm_80" and torch.float8_e4m3fn in (source, to):
        pytest.skip("Triton has no e4m3 on sm_80")
    if {source, to} == set(FLOAT8) or (torch.float64 in (source, to) and {source, to} & set(FLOAT8)):
        pytest.skip("Triton has no such cast")
    if (to in FLOAT8 and not source.is_floating_point) or (source in FLOAT8 and not to.is_floating_point):
        pytest.skip("by way of float32 in Triton, which rounds twice in other places than PyTorch")
    if gpu.architecture == "sm_80" and source in (torch.float16, torch.bfloat16) and to in FLOAT8:
        pytest.skip("Triton's own code for sm_80 truncates")
    x = (torch.randn(1000) * 30).to(torch.float32).to(source)
    out = torch.zeros(1000, dtype=to)
    kernels.cast[(1,)](x, out, 1000, BLOCK=1024)
    expected = x.to(to)
    if to in FLOAT8:
        out, expected = out.float(), expected.float()
    assert torch.equal(out, expected)


APPLIED = {
    "sin_cos": lambda x: np.sin(x) + 2 * np.cos(x),
    "exponentials": lambda x: np.exp(x) + np.exp2(x) + np.expm1(x),
    "logarithms": lambda x: sum(f(np.abs(x) + 0.01) for f in (np.log, np.log2, np.log1p)),
    "roots": lambda x: 2 * np.sqrt(np.abs(x)) + 1 / np.sqrt(np.abs(x) + 1) + np.abs(x) / 3,
    "error_function": lambda x: torch.erf(torch.from_numpy(x)).numpy() + np.tanh(x) + np.abs(x) ** 1.5,
    "roundings": lambda x: np.floor(x) + 2 * np.ceil(x) + 4 * np.rint(x) + np.copysign(np.floor(np.abs(x) + 0.5), x),
}


@pytest.mark.parametrize("name", APPLIED)
def test_mathematics(gpu, name):
    x = torch.cat([torch.randn(990) * 5, torch.tensor([0.0, 0.5, 1.5, -0.5, 2.5, 1e5, 3e-5, -1e-3, 7.0, 12.0])])
    if name == "exponentials":
        x = x.clamp(-30, 30)
    out = torch.empty(1000)
    kernels.apply[(4,)](x, out, 1000, FUNCTION=getattr(kernels, name), BLOCK=256)
    torch.testing.assert_close(out.double(), torch.from_numpy(APPLIED[name](x.double().numpy())), rtol=2e-6, atol=2e-6)


def test_double_mathematics(gpu):
    """sin of large numbers takes a called function with local memory (Payne and Hanek's reduction)."""
    x = torch.cat([torch.randn(998).double() * 3, torch.tensor([1e10, -3e22], dtype=torch.float64)])
    x[-2:] = torch.tensor([700.0, -1e12])
    out = torch.empty_like(x)
    kernels.apply[(4,)](x, out, 1000, FUNCTION=kernels.double_mathematics, BLOCK=256)
    x = x.numpy()
    expected = np.sin(x) + np.exp(x) + np.sqrt(np.abs(x)) + np.floor(x) + x / 3
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-14, atol=1e-14)


INTEGER_TYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint32)


@pytest.mark.parametrize("dtype", INTEGER_TYPES, ids=str)
def test_integers(gpu, dtype):
    limits = torch.iinfo(dtype)
    random = np.random.default_rng(0)
    kind = getattr(np, str(dtype).removeprefix("torch."))
    x, y = (random.integers(limits.min, limits.max, 1000, kind, endpoint=True) for _ in range(2))
    out = torch.empty(1000, dtype=dtype)
    arguments = (torch.from_numpy(x), torch.from_numpy(y), out, 1000)
    kernels.apply_two[(4,)](*arguments, FUNCTION=kernels.integers, BLOCK=256)
    d = y | kind(1)
    q = [math.trunc(Fraction(a, b)) for a, b in zip(x.tolist(), d.tolist(), strict=True)]  # towards zero, as in C
    with np.errstate(all="ignore"):
        q = np.array(q, dtype=object).astype(np.int64 if limits.min else np.uint64).astype(kind)
        expected = x * y + q + (x - q * d) + (x >> kind(3)) + (x << kind(2)) + (x ^ y) + (x & y)
        expected = expected + np.minimum(x, y) + np.maximum(x, y)
    assert np.array_equal(out.numpy(), expected)


@pytest.mark.parametrize("bits", [32, 64])
def test_high_product(gpu, bits):
    kind, dtype = getattr(np, f"uint{bits}"), getattr(torch, f"uint{bits}")
    random = np.random.default_rng(0)
    x, y = (random.integers(0, 1 << bits, 1000, kind) for _ in range(2))
    out = torch.empty(1000, dtype=dtype)
    kernels.apply_two[(4,)](
        torch.from_numpy(x), torch.from_numpy(y), out, 1000, FUNCTION=kernels.high_product, BLOCK=256
    )
    assert out.numpy().tolist() == [a * b >> bits for a, b in zip(x.tolist(), y.tolist(), strict=True)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=str)
def test_atomics(gpu, dtype):
    x = torch.randint(-1000, 1000, (1000,)).to(dtype)
    highest, lowest, total = (
        torch.full((8,), -2000).to(dtype),
        torch.full((8,), 2000).to(dtype),
        torch.zeros(8, dtype=dtype),
    )
    kernels.atomics[(4,)](x, highest, lowest, total, 1000, BLOCK=256)
    columns = x.double().reshape(-1, 8)
    assert torch.equal(highest.double(), columns.amax(0))
    assert torch.equal(lowest.double(), columns.amin(0))
    assert torch.equal(total.double(), columns.sum(0))


def test_lock(gpu):
    """Acquire and release order the blocks: their plain accesses are no race."""
    lock, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    kernels.count_under_lock[(20,)](lock, out)
    assert (lock.item(), out.item()) == (0, 20)


@pytest.mark.parametrize("blocks", [[128], [64, 256]], ids=str)
def test_autotuned_kernels(gpu, blocks):
    """Of several configurations the one with the least bound is taken."""
    tuned = triton.autotune([triton.Config({"BLOCK": n}) for n in blocks], key=["n"])(kernels.copy)
    x, out = torch.randn(300), torch.empty(300)
    tuned[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, out, 300, OFFSET=0, STRIDE=1)
    assert torch.equal(x, out)
