"""The warp-specialised kernels on the PTX machine: sizes with full tiles in every loop, each way to divide the work,
what packed sequences must not see of each other, and slots given up too early."""

import pytest
import torch

from tests.common import INTERPRETED
from tests.planting import plant

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import flashattn
from bench import ptx
from bench.ptx import Fault
from flashattn.backends import triton_hopper
from flashattn.kernels import configs, hopper_backward, hopper_forward
from flashattn.kernels.configs import Roles
from tests.attention import cases
from tests.attention.truth import Case
from tests.ptx.run_text import STRICT

PASSES = {"attention_forward_hopper", "attention_backward_q_hopper", "attention_backward_kv_hopper"}


@pytest.fixture
def gpu():
    with ptx.device("sm_90", on_fault=STRICT) as device:
        yield device


LONG = [
    (Case("causal, grouped", 1, 2, 1, 300, 300, 64, 64, causal=True), torch.bfloat16),
    (Case("head_dim 256", 1, 2, 1, 80, 150, 256, 256, causal=True), torch.bfloat16),
    (
        Case("window, softcap, q_lengths", 1, 1, 1, 300, 300, 64, 64, window=(140, 0), q_lengths=(270,), softcap=3.0),
        torch.bfloat16,
    ),
]


@pytest.mark.parametrize("case, dtype", LONG, ids=lambda x: getattr(x, "name", str(x)))
def test_whole_tiles(gpu, case, dtype):
    cases.check(case, dtype, "triton")
    assert {launch.kernel for launch in gpu.launches} == PASSES


SHARED_OUT = {
    "three stages": ("forward", Roles(2, 128, 3, 240, True, False)),
    "persistent": ("forward", Roles(2, 128, 2, 240, True, True)),
    "three consumers, backward": ("backward_q", Roles(3, 64, 3, 160, False, False)),
    "the same keys for both consumers": ("backward_kv", Roles(2, 32, 3, 240, False, False, shared=True)),
}


@pytest.mark.parametrize("name", SHARED_OUT)
def test_ways_to_share_the_work_out(gpu, name, monkeypatch):
    direction, row = SHARED_OUT[name]
    monkeypatch.setitem(configs.HOPPER[direction], 64, row)
    monkeypatch.setattr(configs, "count_multiprocessors", lambda device: 2)  # fewer programs than there are work items
    case = Case("", 1, 2, 1, 250, 250, 64, 64, causal=True, scale=0.2)
    cases.check(case, torch.bfloat16, "triton")


SEQUENCES = slice(0, 70), slice(70, 140)


@pytest.mark.parametrize("seen, spoilt", [SEQUENCES, SEQUENCES[::-1]], ids=["the first", "the second"])
def test_a_sequence_sees_no_other(seen, spoilt):
    """Tiles reach into the next sequence: its NaN must not spread."""
    starts = torch.tensor([0, 70, 140], dtype=torch.int32)
    tensors = [torch.randn(140, 2, 64, dtype=torch.bfloat16) for _ in range(4)]  # q, k, v and the gradient of out
    clean = compute_gradients(tensors, starts)
    beside_nan = compute_gradients([x.index_fill(0, torch.arange(140)[spoilt], torch.nan) for x in tensors], starts)
    assert all(torch.equal(x[seen], y[seen]) for x, y in zip(clean, beside_nan, strict=True))


def compute_gradients(tensors: list[torch.Tensor], starts: torch.Tensor) -> list[torch.Tensor]:
    """out and the gradients of q, k and v."""
    *inputs, grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    with ptx.device("sm_90", on_fault=STRICT) as device, flashattn.use_backend("triton"):
        out = flashattn.attention_varlen(*leaves, starts, starts, 70, 70, causal=True)
        gradients = torch.autograd.grad(out, leaves, grad)
    assert {launch.kernel for launch in device.launches} == PASSES
    return [out, *gradients]


EARLY = {
    "k": (hopper_backward, "    release(rings.k, number)\n    return acc", "    return acc", (
        "    release(rings.v, number)\n", "    release(rings.v, number)\n    release(rings.k, number)\n",
    )),
    "v": (hopper_forward, "    release(rings.v, number - 1)\n    return ForwardState", "    return ForwardState", (
        "    wait_full(rings.v, number)\n    acc, p, weights",
        "    wait_full(rings.v, number)\n    release(rings.v, number - 1)\n    acc, p, weights",
    )),
    "q": (hopper_backward, "    release(rings.q, number)\n    return KeyGradients", "    return KeyGradients", (
        "    release(rings.do, number)\n", "    release(rings.do, number)\n    release(rings.q, number)\n",
    )),
}  # fmt: skip


@pytest.mark.parametrize("tile", EARLY)
def test_a_slot_given_up_early_is_found(tile, monkeypatch, tmp_path):
    module, late, gone, early = EARLY[tile]
    monkeypatch.setattr(triton_hopper, module.__name__.rpartition(".")[2], plant(module, tmp_path, (late, gone), early))
    q = torch.randn(1, 1, 400, 64, dtype=torch.bfloat16, requires_grad=True)

    def call():
        torch.autograd.grad(flashattn.attention(q, q, q).sum(), q)

    with ptx.device("sm_90", on_fault=STRICT), flashattn.use_backend("triton"), pytest.raises(Fault, match="race"):
        call()


def test_statistics_between_pieces_of_16_bytes_are_found(monkeypatch, tmp_path):
    """An H200 stopped at the second sequence's, which began where its queries do."""
    change = ("rings.rows, loaded, rows, line, column + start_m)", "rings.rows, loaded, rows, line, row)")
    monkeypatch.setattr(triton_hopper, "hopper_backward", plant(hopper_backward, tmp_path, change))
    starts = torch.tensor([0, 70, 140], dtype=torch.int32)
    q = torch.randn(140, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    with (
        ptx.device("sm_90", on_fault=STRICT),
        flashattn.use_backend("triton"),
        pytest.raises(Fault, match="misaligned"),
    ):
        torch.autograd.grad(flashattn.attention_varlen(q, q, q, starts, starts, 70, 70).sum(), q)
