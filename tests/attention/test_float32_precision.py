"""float32 on tensor cores, as `torch.set_float32_matmul_precision` asks for it: which products kernels are compiled
with, and their errors, held to PyTorch's own operations on factors represented as the format has them."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.attention.truth import (
    Case,
    list_inputs,
    make_gradients,
    make_inputs,
    ours,
    run,
    sum_magnitudes,
    torch_attention,
)
from tests.common import INTERPRETED, assert_as_exact_as_torch

pytest.importorskip("triton")

import flashattn
from flashattn.kernels import precision, tune
from flashattn.protocol import Saved
from flashattn.score import Score

if not INTERPRETED:
    from bench import compiled, ptx, sass
    from bench.descriptors import find_lost_descriptors
    from flashattn.backends import triton as backend
    from tests.attention import decode_cases
    from tests.ptx import kernels as ptx_kernels

compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
SETTINGS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


@pytest.fixture(autouse=True)
def settings_as_before():
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


# --------------------------------------------------------------------------------------------- the setting


@pytest.fixture
def on(monkeypatch):
    return lambda architecture: monkeypatch.setattr(precision, "find_architecture", lambda: architecture)


def asked(dtype: torch.dtype = torch.float32, head_dim: int = 64, head_dim_v: int = 64) -> str:
    q, v = (torch.empty(1, 1, 1, n, dtype=dtype) for n in (head_dim, head_dim_v))
    return precision.choose_input_precision(q, v)


def test_the_setting_is_followed(on):
    on("sm_90")
    for setting, expected in SETTINGS.items():
        torch.set_float32_matmul_precision(setting)
        assert asked() == expected
        assert asked(torch.bfloat16) == asked(torch.float16) == "ieee"


def test_wide_heads_are_not_split(on):
    """They would not fit; "ieee" is no less exact."""
    on("sm_90")
    for setting, expected in (("high", "ieee"), ("medium", "tf32")):
        torch.set_float32_matmul_precision(setting)
        assert asked(head_dim=200) == asked(head_dim_v=129) == expected


@pytest.mark.parametrize("architecture", ["sm_100", "sm_103", "sm_110"])
def test_tensor_memory_has_room_for_what_is_multiplied(on, architecture, monkeypatch):
    on(architecture)
    for setting, wasted, expected in (("high", True, "ieee"), ("high", False, "tf32x3"), ("medium", True, "tf32")):
        torch.set_float32_matmul_precision(setting)
        monkeypatch.setattr(precision, "WASTES_TENSOR_MEMORY", wasted)
        assert asked() == expected


def test_the_newer_setting_is_followed(on):
    """And either wins that was made last, as for PyTorch's own products."""
    on("sm_80")
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "tf32"
    assert asked() == "tf32"
    torch.set_float32_matmul_precision("high")
    matmul.fp32_precision = "ieee"
    assert asked() == "ieee"
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # of CPUs
    assert asked() == "ieee"
    matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"  # of all devices
    assert asked() == "tf32"


@pytest.mark.parametrize("architecture", ["gfx942", "gfx1201", "interpreter"])
def test_others_than_nvidia_keep_float32(on, architecture):
    on(architecture)
    torch.set_float32_matmul_precision("medium")
    assert asked() == "ieee"


def test_tiles_are_searched_for_each_precision(on):
    on("sm_90")
    q, kinds = torch.empty(1, 1, 8, 16), set()
    for setting in SETTINGS:
        torch.set_float32_matmul_precision(setting)
        kinds.add(tune.make_kind("forward", q, q, Score(1.0)))
    assert len(kinds) == 3


# --------------------------------------------------------------------------------------------- the format


def cut(x: torch.Tensor) -> torch.Tensor:
    """float32 without the lower 13 bits, which tensor cores do not read."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest number of TF32, halves away from zero: cvt.rna.tf32."""
    return cut((x.view(torch.int32) + 0x1000).view(torch.float32))


def tf32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(cut(a), cut(b))


def tf32x3(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    big_a, big_b = rounded(a), rounded(b)
    small_a, small_b = cut(a - big_a), cut(b - big_b)
    return torch.matmul(small_a, big_b) + torch.matmul(big_a, small_b) + torch.matmul(big_a, big_b)


PRODUCTS = {"highest": torch.matmul, "high": tf32x3, "medium": tf32}


class Product(torch.autograd.Function):
    """a @ b by `multiply`, and so both products of its backward."""

    @staticmethod
    def forward(ctx, multiply, a, b):
        ctx.multiply = multiply
        ctx.save_for_backward(a, b)
        return multiply(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return None, ctx.multiply(grad, b.mT), ctx.multiply(a.mT, grad)


class Multiplied(TorchFunctionMode):
    """Within the block `@` of float32, a Tensor's matmul, is the product of a setting. torch.matmul is as ever."""

    def __init__(self, setting: str):
        self.multiply = PRODUCTS[setting]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.matmul and args[0].dtype == torch.float32:
            return Product.apply(self.multiply, *args)
        return function(*args, **(kwargs or {}))


def test_the_format_is_that_of_the_conversion():
    """What `rounded` and `cut` make, in fractions of 2^-10 of numbers in [1, 2)."""
    unit = 2.0**-10
    x = torch.tensor([1 + 0.5 * unit, 1 + 0.4999 * unit, -1 - 1.5 * unit, 2 - 0.25 * unit, 1 + 0.9999 * unit, -0.0])
    assert rounded(x).tolist() == [1 + unit, 1, -1 - 2 * unit, 2, 1 + unit, 0]
    assert cut(x).tolist() == [1, 1, -1 - unit, 2 - unit, 1, 0]


# --------------------------------------------------------------------------------------------- the machine


@pytest.fixture(params=["sm_80", "sm_90"])
def gpu(request):
    with ptx.device(request.param) as device:
        yield device


@compiles
def test_tensor_cores_read_the_upper_19_bits(gpu):
    """Each of them, and none of the others: sums of factors of 11 bits are exact whatever stands in the lower 13."""
    wide = torch.randint(1024, 2048, (64, 64)).float()  # 11 bits: all that tf32 has
    narrow = torch.randint(-8, 9, (64, 64)).float()
    noise = torch.randint(0, 1 << 13, (64, 64), dtype=torch.int32)
    dirty, c = (wide.view(torch.int32) | noise).view(torch.float32), torch.zeros(64, 64)
    for a, b, exact in ((dirty, narrow, wide @ narrow), (narrow, dirty, narrow @ wide)):
        ptx_kernels.matmul[(1, 1)](a, b, c, 64, 64, 64, 64, 64, 64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
        assert torch.equal(c, exact)
    assert gpu.launches[-1].counts.total("flops") == 2 * 64**3


def check(case: Case, setting: str) -> None:
    """The error rule, where PyTorch's operations multiply as the setting has it."""
    inputs, options = make_inputs(case, torch.float32, "cpu")
    gradients = make_gradients(case, options, torch.float32, "cpu")

    def theirs(*x):
        with Multiplied(setting):
            return torch_attention(case, options, *x)

    truth = run(theirs, [x.double() for x in inputs], *gradients)
    represented = run(theirs, inputs, *gradients)
    terms = sum_magnitudes(case, options, inputs, *gradients)
    torch.set_float32_matmul_precision(setting)  # only now: PyTorch's products on a CPU may follow it too
    with flashattn.use_backend("triton"):
        results = run(ours(case, options), inputs, *gradients)
    names = ("out", "lse", *(f"grad_{name}" for name in list_inputs(case)))
    for name, x, y, t, summed in zip(names, results, represented, truth, terms, strict=True):
        assert_as_exact_as_torch(x, y, t, name, summed)


SEVERAL_TILES = Case("several_tiles", 1, 1, 1, 40, 140, 32, 32, causal=True)
FEATURES = Case(
    "features", 1, 2, 1, 40, 35, 24, 9, softcap=3.0, bias="hqk", sinks=True, kv_lengths=(33,), dropout_p=0.2
)


IN_TURN = pytest.mark.parametrize("gpu, setting", [("sm_80", "medium"), ("sm_90", "high")], indirect=["gpu"])


@compiles
@IN_TURN
def test_attention(gpu, setting):
    check(SEVERAL_TILES, setting)
    assert all(launch.counts.total("flops") for launch in gpu.launches)


@compiles
@pytest.mark.parametrize("gpu, setting", [("sm_80", "high"), ("sm_90", "medium")], indirect=["gpu"])
def test_features(gpu, setting):
    check(FEATURES, setting)
    assert all(launch.counts.total("flops") for launch in gpu.launches)


@compiles
@IN_TURN
def test_decoding(gpu, setting):
    (step,) = (step for step in decode_cases.STEPS if step.name == "window_sinks")
    q, k, v, options, others, table = decode_cases.make_inputs(step, torch.float32, "cpu")
    exact_table = None if table is None else [x.double() for x in table]
    truth = decode_cases.compute_expected(step, options, others, exact_table, q.double(), k.double(), v.double())
    with Multiplied(setting):
        theirs = decode_cases.compute_expected(step, options, others, table, q, k, v)
    torch.set_float32_matmul_precision(setting)
    cache = decode_cases.make_cache(step, torch.float32, "cpu")
    results = decode_cases.run_decode(step, cache, options, others, table, q, k, v, "triton")
    for name, x, y, t in zip(("out", "lse"), results, theirs, truth, strict=True):
        assert_as_exact_as_torch(x, y, t, name)


# --------------------------------------------------------------------------------------------- the machine code


@compiles
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_loops_over_whole_tiles_keep_out_of_local_memory(architecture):
    torch.set_float32_matmul_precision("high")  # which needs the most registers
    q, k, score = torch.empty(1, 1, 40, 64), torch.empty(1, 1, 200, 64), Score(0.125, right=0)
    with compiled.compile_for(architecture) as kernels:
        out, lse, rest = backend.forward(q, k, k, score)
        backend.backward(out, lse, Saved(q, k, k, out, lse, rest), score, False, [])
    assert len(kernels) == 3
    for kernel in kernels:
        assert all("local" not in loop.mix for loop in sass.find_full_tile_loops(kernel.code)), kernel
        assert not find_lost_descriptors(kernel.code), kernel
