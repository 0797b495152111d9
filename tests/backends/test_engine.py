"""The native engine itself: its operators, exponential, long sums, threads and processes, compilers and processors."""

import concurrent.futures
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import flashattn
from flashattn import backends
from flashattn.score import SCORE_FIELDS, Norm, Score

ROOT = Path(__file__).parents[2]
KERNELS = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if not path.name.startswith("bindings")]


@pytest.fixture(autouse=True)
def on_the_engine():
    with flashattn.use_backend("cpu"):
        yield


# ------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize(
    "operator, fields",
    [(f"attention_{name}", Score._fields[:SCORE_FIELDS]) for name in ("forward", "backward", "decode")]
    + [(f"norm_{name}", Norm._fields) for name in ("forward", "backward")],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_fields(operator, fields):
    """The lists of fields in csrc/ have the names and the order of Score and Norm."""
    names = [argument.name for argument in getattr(backends.cpu.ops, operator).default._schema.arguments]
    first = names.index(fields[0])
    assert names[first : first + len(fields)] == list(fields)


# ------------------------------------------------------------------------------------------------ the exponential


def run_exp2(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty_like(x)
    backends.cpu.ops.exp2.default(x, y, dtype)
    return y


# Weights kept as bfloat16 take a shorter polynomial where the processor has a dot instruction for them.
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1.2e-7), (torch.bfloat16, 3e-6)], ids=str)
def test_exp2(dtype, allowed):
    """The stated error over the whole range, every exponent of x and both signs; and the points that must be exact."""
    bits = torch.arange(0, 2**31, 1021, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([bits, -bits])
    x = x[(x >= -126) & (x < 128)]
    truth = torch.exp2(x.double())
    assert ((run_exp2(x, dtype).double() - truth) / truth).abs().max() < allowed

    integers = torch.arange(-126, 128, dtype=torch.float32)
    assert torch.equal(run_exp2(integers, dtype), torch.ldexp(torch.ones(254), integers.int()))  # 2^0 = 1 among them
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30])
    assert torch.equal(run_exp2(tiny, dtype), torch.ones(6))
    assert torch.equal(run_exp2(torch.tensor([-126.001, -1e30, -torch.inf]), dtype), torch.zeros(3))
    assert run_exp2(torch.tensor([torch.nan]), dtype).isnan().all()


def test_every_float16():
    """Read as float32 and written back, every finite number of the 2^16 is itself: with one key, out is v."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    v = every[every.isfinite()].view(-1, 1, 1, 64)
    q = torch.zeros_like(v)
    assert torch.equal(flashattn.attention(q, q, v), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_the_error_does_not_grow_with_length(dtype, queries):
    """While the maximum stays the same, earlier sums are rescaled by exactly 1. Equal scores over equal values give
    that value at any length; a factor off by one unit in the last place would add up to 2^-24 * 65536 / 64."""
    seq = 65536
    q, k, v = torch.zeros(1, 1, queries, 16), torch.ones(1, 1, seq, 16), torch.full((1, 1, seq, 16), 0.75)
    out, lse = flashattn.attention(q.to(dtype), k.to(dtype), v.to(dtype), return_lse=True)
    assert (out.float() - 0.75).abs().max() <= 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(lse, torch.full_like(lse, seq).log(), rtol=2e-7, atol=0)


# ------------------------------------------------------------------------------------------------ threads, processes


def run_step(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 4, 150, 32, generator=generator).requires_grad_() for _ in range(3))
    out = flashattn.attention(q, k, v, causal=True)
    out = flashattn.rms_norm(out, torch.ones(32))
    return [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]


def test_several_python_threads_at_once():
    expected = [run_step(seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for ours, alone in zip(pool.map(run_step, range(4)), expected, strict=True):
                assert all(map(torch.equal, ours, alone))


class Steps(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return run_step(i)[0]


def test_after_fork_in_a_worker():
    """The parent has used its threads; the workers, forked from it, compute the same."""
    expected = [run_step(seed)[0] for seed in range(4)]
    loader = torch.utils.data.DataLoader(
        Steps(), num_workers=2, batch_size=None, timeout=60, multiprocessing_context="fork"
    )
    for ours, alone in zip(loader, expected, strict=True):
        assert torch.equal(ours, alone)


@pytest.mark.parametrize("backward", [False, True])
def test_layouts(backward):
    """(batch, seq, heads, dim) memory, and slices of a joint projection, give the same bits as contiguous tensors."""
    joint = torch.randn(2, 100, 3, 4, 32)
    views = [joint[:, :, i].transpose(1, 2) for i in range(3)]

    def run(tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = flashattn.attention(*tensors, causal=True)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)] if backward else [out]

    assert all(map(torch.equal, run(views), run([x.contiguous() for x in views])))


# ------------------------------------------------------------------------------------------------ compilers


@pytest.mark.parametrize(
    "compiler, flags",
    [
        ("clang++", ["-DFLASHATTN_ISA=portable"]),
        ("clang++", ["-DFLASHATTN_ISA=avx2", "-march=x86-64-v3"]),
        ("clang++", ["-DFLASHATTN_ISA=avx512bf16", "-march=x86-64-v4", "-mavx512bf16"]),
        ("aarch64-linux-gnu-g++", ["-DFLASHATTN_ISA=portable"]),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0].partition("=")[2],
)
def test_compilers(compiler, flags, tmp_path):
    """The kernels build with clang, and for aarch64, without a warning."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    options = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-Wno-psabi",
        "-Wno-unused-function",
        "-Wno-uninitialized",
    ]
    for source in KERNELS:
        done = subprocess.run(
            [compiler, *options, *flags, "-c", str(source), "-o", str(tmp_path / "kernel.o")],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]


def test_softcap_keeps_small_scores():
    """Near 0 tanh is no difference of nearly equal numbers: its relative error is 3e-7 (`csrc/simd.h`), and the product
    with the softcap rounds. The lse of one key is its score."""
    q, k = torch.linspace(-9, 9, 20_000).view(1, 1, -1, 1), torch.ones(1, 1, 1, 1)
    with flashattn.use_backend("cpu"):
        _, lse = flashattn.attention(q, k, k, scale=1.0, softcap=3.0, return_lse=True)
    torch.testing.assert_close(lse.double(), 3 * torch.tanh(q.squeeze(-1).double() / 3), rtol=3e-7 + 2**-23, atol=0)
