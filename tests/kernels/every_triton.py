"""What holds on every Triton that is named as supported: each kernel compiles for sm_80, sm_90 and gfx942, fits in
shared memory and, on the PTX machine, gives right results without a race: all for sm_90, the plain ones for sm_80.
`make matrix` runs this file once for each version (`matrix.py`). pytest does not find it by its name:
`test_compiled.py` and `test_on_ptx.py` hold all of this and more for one version."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashattn
from bench import ptx
from bench.ptx import Fault
from flashattn.backends import triton_hopper
from flashattn.kernels import compiler, configs, dropout, forward
from flashattn.score_mod import read_block_mask, trace
from tests.attention import cases, decode_cases, packed_cases
from tests.attention.truth import Case
from tests.compat import flex_cases
from tests.derivatives import norm_cases as norm_derivative_cases
from tests.kernels import compile_cases, derivative_cases
from tests.norm import cases as norm_cases
from tests.planting import plant
from tests.ptx import rings as ptx_rings
from tests.ptx.run_text import STRICT

BF16 = torch.bfloat16
SIZES = dict(head_dim=32, head_dim_v=32)
KEYS = {"sm_80": 170, "sm_90": 300}  # enough for a tile of each loop that is pipelined: of 64, of 128 keys
# All fields of Score are in these.
PLAIN = Case("plain", seq_q=130, head_dim=64, head_dim_v=64)
LENGTHS = Case(
    "lengths", heads=2, kv_heads=1, seq_q=40, seq_k=170, **SIZES, causal=True, softcap=3.0, bias="qk", sinks=True,
    kv_lengths=(165,), q_lengths=(30,),
)  # fmt: skip
PACKED = Case("packed", heads=1, kv_heads=1, **SIZES, window=(309, 9), mask="qk", slopes="h", dropout_p=0.2, scale=0.2)
# On the small tiles: a byte and a join in the computation of an operand, along 16 keys or queries.
BYTES_AND_JOINS = Case("bytes_and_joins", heads=1, kv_heads=1, seq_q=40, seq_k=50, **SIZES, mask="qk", dropout_p=0.2)


ONLY_COMPILED = pytest.mark.parametrize("architecture", ["sm_80", "gfx942"])
ON_SM_90 = pytest.mark.parametrize("gpu", ["sm_90"], indirect=True)


@pytest.fixture(params=["sm_80", "sm_90"])
def gpu(request):
    with ptx.device(request.param, on_fault=STRICT) as device:
        yield device
    for launch in device.launches:
        assert launch.shared_bytes <= configs.SHARED_MEMORY[launch.architecture], launch.kernel


def test_dense(gpu):
    cases.check(PLAIN._replace(seq_k=KEYS[gpu.architecture]), BF16, "triton")


@ON_SM_90
def test_lengths_and_features(gpu):
    cases.check(LENGTHS, BF16, "triton")


@ON_SM_90
def test_packed_sequences(gpu):
    packed_cases.check(PACKED, (20, 9), (330, 20), BF16, "triton")


@ON_SM_90
def test_score_mod_and_block_mask(gpu):
    flex_cases.check_gradients(BF16, "relative_bias", "documents", "triton")


@pytest.mark.parametrize("gpu", ["sm_89"], indirect=True)
def test_dropout_and_masks_on_small_tiles(gpu):
    cases.check(BYTES_AND_JOINS, BF16, "triton")
    derivative_cases.check_hvp(BYTES_AND_JOINS, BF16)


def test_second_derivatives(gpu):
    derivative_cases.check_hvp(LENGTHS if gpu.architecture == "sm_90" else PLAIN._replace(seq_k=90), BF16)


def test_compile_callables_that_capture_nothing_for_sm_90():
    score_mod = trace("score_mod", lambda score, b, h, i, j: score * 0.5, 1)
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, 512, 512, "cpu")
    block_mask = read_block_mask(causal, 2, 4, 512, 512, torch.device("cpu"))
    compile_cases.check(compile_cases.compile_attention("sm_90", 32, score_mod=score_mod, block_mask=block_mask))


def test_compile_narrow_values_for_sm_90():
    """Where the assembler of older versions loses the address of v."""
    compile_cases.check(compile_cases.compile_attention("sm_90", 64, head_dim_v=16))


def test_compile_float32_in_tensor_memory_for_sm_100():
    compile_cases.check_float32_on_tensor_cores("high", "sm_100", 64)


def test_descriptors_made_in_a_kernel():
    with ptx.device("sm_90", on_fault=STRICT):
        out, right = ptx_rings.run_made(queries=200, keys=150)
    assert torch.equal(out, right)


def test_decoding(gpu):
    (step,) = (s for s in decode_cases.STEPS if s.name == "everything")
    decode_cases.check(step, BF16, "triton")
    assert {launch.kernel for launch in gpu.launches} == {"rotate_and_store", "attention_decode", "attention_merge"}


@ON_SM_90
def test_norms(gpu):
    norm_cases.check(norm_cases.Case("", (2, 9000), residual="same", dropout_p=0.1, prenorm=True), BF16, "triton")
    norm_cases.check(norm_cases.Case("", (5, 3, 40), False, bias=False, per_head=True), BF16, "triton")


@ON_SM_90
def test_norms_second_derivatives(gpu):
    norm_derivative_cases.check(norm_cases.Case("", (2, 9000), residual="same", prenorm=True), BF16, "triton")


@ONLY_COMPILED
def test_compile_attention(architecture):
    every = {name: value for options in compile_cases.FEATURES.values() for name, value in options.items()}
    kernels = compile_cases.compile_attention(architecture, 32, lengths=True, window=100, **every)
    compile_cases.check(kernels)
    compile_cases.check(compile_cases.compile_derivatives(architecture, 32, given="qkvbs", **every))


@ONLY_COMPILED
def test_compile_callables(architecture):
    compile_cases.check_score_mod_and_block_mask(architecture, "both")


def test_compile_packed_sequences_for_sm_80():
    compile_cases.check_packed_sequences("sm_80", 128)


@ONLY_COMPILED
def test_compile_norms(architecture):
    compile_cases.check_norms(architecture, 40000)


@pytest.mark.parametrize("architecture", ["gfx942"])
def test_compile_decoding(architecture):
    compile_cases.check_decoding(architecture, "modified", BF16, True)


@pytest.mark.skipif(not compiler.LACKS_FENCES, reason="this Triton puts its own fences")
def test_the_fault_is_there_without_fences(monkeypatch):
    """Else the way round it could go, or proves nothing."""
    monkeypatch.setattr(compiler, "ADDS_FENCES", False)
    monkeypatch.setattr(
        forward, "attention_forward", compiler.kernel(forward.NO_SPECIALIZE)(forward.attention_forward.fn)
    )
    q, k, v = (torch.randn(1, 1, seq, 64, dtype=BF16) for seq in (130, 300, 300))
    with (
        ptx.device("sm_90", on_fault=STRICT),
        flashattn.use_backend("triton"),
        triton_hopper.use_plain_kernels(),
        pytest.raises(Fault, match=r"no fence.proxy.async since the write"),
    ):
        flashattn.attention(q, k, v)


@pytest.mark.skipif(not compiler.WIDENS_JOINS, reason="this Triton lays operands out right")
def test_the_fault_is_there_where_the_join_shows(monkeypatch, tmp_path):
    shown = plant(dropout, tmp_path, ("multipliers = hide_join(multipliers)", "pass"))
    imported = f"from .{shown.__name__.rpartition('.')[2]} import dropout_multipliers"
    planted = plant(forward, tmp_path, ("from .dropout import dropout_multipliers", imported))
    monkeypatch.setattr(forward, "attention_forward", planted.attention_forward)
    with ptx.device("sm_89"), pytest.raises(AssertionError, match=r"out: .* error"):
        cases.check(BYTES_AND_JOINS, BF16, "triton")


def test_no_launch_warns(gpu, recwarn):
    """Triton 3.9 warns where a launch does not say whether multiply-adds are fused."""
    x = torch.randn(3, 77, dtype=BF16)
    with flashattn.use_backend("triton"):
        flashattn.rms_norm(x)
    assert not recwarn.list
