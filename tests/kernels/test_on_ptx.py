"""Every Triton kernel of the project, as the compiler made it, executed by the PTX machine: the same cases and the same
error rule as on the other backends, bfloat16 included, which the interpreter cannot do. Each run is checked for races,
accesses outside tensors, reads of memory that nothing wrote and copies that nothing waited for."""

import pytest
import torch

from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from torch.nn.attention.flex_attention import BlockMask

import flashattn
from bench import ptx
from flashattn.kernels import norm_configs
from tests.attention import cases, decode_cases, extreme_cases, packed_cases
from tests.compat import flex_cases
from tests.norm import cases as norm_cases
from tests.ptx.run_text import STRICT

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["sm_80", "sm_90"])
def gpu(request):
    with ptx.device(request.param, on_fault=STRICT) as device:
        yield device


def in_turn(cases, dtypes, architectures=("sm_80", "sm_90")) -> pytest.MarkDecorator:
    """Each case in each dtype on one of the architectures, the next one on the next. `make roles` has attention's
    tables in full."""
    rows = [
        (architectures[(n + m) % len(architectures)], case, dtype)
        for n, case in enumerate(cases) for m, dtype in enumerate(dtypes)
    ]  # fmt: skip
    names = [f"{architecture}-{case.name}-{dtype}" for architecture, case, dtype in rows]
    return pytest.mark.parametrize("gpu, case, dtype", rows, indirect=["gpu"], ids=names)


def ran(gpu: ptx.Device) -> set[str]:
    """The kernels by their passes; on Hopper some have two."""
    return {launch.kernel.removesuffix("_hopper") for launch in gpu.launches}


def in_roles(gpu: ptx.Device) -> set[str]:
    return {launch.kernel.removesuffix("_hopper") for launch in gpu.launches if launch.kernel.endswith("_hopper")}


def named(cases, *names: str) -> list:
    by_name = {case.name: case for case in cases}
    return [by_name[name] for name in names]


def half_the_heads(case: cases.Case) -> cases.Case:
    """The machine's time is in proportion. "grouped" has several key/value heads of several queries each."""
    return case._replace(heads=case.heads // 2, kv_heads=case.kv_heads // 2)


BACKWARD = {"attention_forward", "attention_backward_q", "attention_backward_kv"}


@pytest.mark.parametrize("gpu, number", [("sm_89", number) for number in range(7)], indirect=["gpu"])
def test_attention_features(gpu, number):
    """Every two features together, and each without the other, on the small tiles of consumer GPUs."""
    case = half_the_heads(cases.pairwise()[number])
    cases.check(case, HALF[number % 2], "triton")
    assert ran(gpu) == BACKWARD | ({"attention_backward_bias"} if case.bias else set())


SHAPES = named(
    cases.CASES, "one_query_one_key", "grouped", "more_queries_than_keys", "decode", "wider_v", "head_dim_64",
    "head_dim_128", "head_dim_256", "both_lengths", "head_dim_200", "window_causal", "window_of_everything",
    "bias_of_keys",
)  # fmt: skip
(EVERYTHING,) = named(cases.CASES, "everything")
EVERYTHING = half_the_heads(EVERYTHING)._replace(batch=2, kv_lengths=(130, 77), q_lengths=(50, 111))
SHAPES += [EVERYTHING, EVERYTHING, EVERYTHING]  # on each


@in_turn(SHAPES, (torch.bfloat16,), ("sm_80", "sm_89", "sm_90"))
def test_attention_shapes(gpu, case, dtype):
    cases.check(case, dtype, "triton")


FLOAT32 = [*named(cases.CASES, "head_dim_64"), cases.Case("two_widths", 1, 2, 1, 70, 90, 24, 40)]  # the first is causal


@in_turn(FLOAT32, (torch.float32,))
def test_attention_float32(gpu, case, dtype):
    """Without tensor cores: tf32 would not be float32."""
    cases.check(case, dtype, "triton")


@pytest.mark.parametrize("gpu", ["sm_89"], indirect=True)
def test_packed_sequences(gpu):
    """One without keys, one without queries, one of few and one of several tiles with a rest. `every_triton.py` and
    `test_roles.py` have some on sm_90."""
    (case,) = named(packed_cases.CASES, "everything")
    packed_cases.check(half_the_heads(case), (0, 20, 1, 130), (33, 0, 9, 111), torch.bfloat16, "triton")


DECODED = named(
    decode_cases.STEPS,
    "one_token",
    "pages_of_seven",
    "several_tokens",
    "rotary_partial",
    "rotary_interleaved",
    "everything",
)


@in_turn(DECODED, (torch.bfloat16, torch.float32))
def test_decoding(gpu, case, dtype):
    decode_cases.check(case, dtype, "triton")
    assert "attention_decode" in ran(gpu)
    assert "rotate_and_store" in ran(gpu)


@pytest.mark.parametrize("gpu", ["sm_80"], indirect=True)
def test_decoding_long_caches(gpu):
    """Five splits of the keys, merged."""
    features = decode_cases.make_case(heads=2, kv_heads=1, window=(540, None), sinks=True)
    decode_cases.check(decode_cases.Step("", (550, 3), (1, 1), features), torch.bfloat16, "triton")
    assert "attention_merge" in ran(gpu)


@pytest.mark.parametrize("gpu", ["sm_90"], indirect=True)
def test_the_grid_of_decoding_changes_no_bit(gpu):
    decode_cases.check_bits_of_longest_row_and_capacity("triton")


@pytest.mark.parametrize("gpu", ["sm_89"], indirect=True)
def test_a_window_is_split_as_its_keys_alone(gpu):
    decode_cases.check_bits_of_a_window("triton")


@pytest.mark.parametrize("gpu", ["sm_80"], indirect=True)
def test_a_step_of_decoding_is_three_launches(gpu):
    """With new keys and values and a rotary embedding of q and k."""
    (step,) = named(decode_cases.STEPS, "rotary")
    decode_cases.check(step, torch.bfloat16, "triton")
    kernels = ["rotate_and_store", "attention_decode", "attention_merge"]
    assert [launch.kernel for launch in gpu.launches] == kernels * 2  # the tokens before and the new ones


IN_FLOAT32_TOO = named(
    norm_cases.CASES, "layer", "rms", "plain", "wide", "rms_wide", "residual_prenorm", "per_head", "dropout_residual",
)  # fmt: skip


@in_turn(norm_cases.CASES, (torch.bfloat16,))
def test_norms(gpu, case, dtype):
    norm_cases.check(case, dtype, "triton")


@in_turn(IN_FLOAT32_TOO, (torch.float32,))
def test_norms_float32(gpu, case, dtype):
    norm_cases.check(case, dtype, "triton")


def test_norm_of_width_1(gpu):
    """grad_x is rstd (g w - mean(g w)), here of one number: 0, or what rounding g w loses, times rstd = eps ** -0.5."""
    x, weight, grad = torch.randn(9, 1, requires_grad=True), torch.randn(1), torch.randn(9, 1)
    with flashattn.use_backend("triton"):
        y = flashattn.layer_norm(x, weight)
        (grad_x,) = torch.autograd.grad(y, x, grad)
    assert (y == 0).all()
    assert (grad_x.abs() <= 2.0**-24 * (grad * weight).abs() * 1e-5**-0.5).all()


@pytest.mark.parametrize("center", [True, False])
def test_norm_of_very_wide_rows(gpu, center, monkeypatch):
    monkeypatch.setattr(norm_configs, "NORM_COLS", {"forward": 4096, "backward": 4096})
    norm_cases.check(norm_cases.Case("", (2, 9000), center, bias=center), torch.bfloat16, "triton")
    kernels = {"norm_forward", "norm_backward_means", "norm_backward", "norm_backward_parameters"}
    assert ran(gpu) == kernels


@pytest.mark.parametrize("gpu", ["sm_89"], indirect=True)
def test_score_mod_and_block_mask(gpu):
    """`every_triton.py` has them on sm_90."""
    flex_cases.check_gradients(torch.bfloat16, "relative_bias", "documents", "triton")
    assert ran(gpu) >= BACKWARD


@pytest.mark.parametrize("gpu", ["sm_90"], indirect=True)
@pytest.mark.parametrize("options", [dict(scale=-0.25), dict(softcap=2.0)], ids=str)
def test_queries_whose_blocks_are_all_hidden(gpu, options):
    """By the list of blocks alone; warp-specialised kernels begin with a tile even there."""
    counts, indices = torch.tensor([[[0, 1]]], dtype=torch.int32), torch.tensor([[[[0, 1]] * 2]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128)
    q, k, v = (torch.randn(1, 1, 256, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    ours, reference = (
        (out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
        for out in (attend_on(backend, q, k, v, block_mask=block_mask, **options) for backend in ("triton", "cpu"))
    )
    assert in_roles(gpu) == BACKWARD
    assert not any(x[:, :, :128].any() for x in ours[:2])
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02)


def attend_on(backend: str, *args, **options):
    with flashattn.use_backend(backend):
        return flashattn.attention(*args, **options)


@pytest.mark.parametrize("gpu", ["sm_89"], indirect=True)
def test_hidden_pairs_read_nothing_outside_of_what_is_captured(gpu):
    flex_cases.check_hidden_pairs(flex_cases.short_table, "triton")


EXTREME = (
    "some_least", "largest_apart", "largest_softcap", "minus_1e9", "thousands_causal", "thousands_and_sinks",
    "minus_1e9_and_sinks", "ten_thousand_millions", "slopes",
)  # fmt: skip


@pytest.mark.parametrize(
    "gpu, name", [(("sm_89", "sm_90")[n % 3 == 2], x) for n, x in enumerate(EXTREME)], indirect=["gpu"]
)
def test_weights_of_extreme_scores(gpu, name):
    extreme_cases.check_weights(name, "triton")


@pytest.mark.parametrize("gpu", ["sm_90"], indirect=True)
def test_extreme_scores_in_roles(gpu):
    extreme_cases.check_least_number_as_mask(torch.bfloat16, "triton")
    assert in_roles(gpu) == BACKWARD


@pytest.mark.parametrize("gpu, size", [("sm_80", 1), ("sm_90", 90)], indirect=["gpu"])
def test_decoding_extreme_scores(gpu, size):
    extreme_cases.check_decoding("triton", size)


def test_scores_that_no_exponent_has_room_for_are_nan(gpu):
    """Raw ones, from 2^26 on: float32 and scores that something changes are exact there."""
    q, k = torch.empty(1, 1, 64, 16).uniform_(2e4, 6e4).half(), torch.full((1, 1, 1, 16), 6e4).half()
    with flashattn.use_backend("triton"):
        out = flashattn.attention(q, k, torch.ones_like(k), scale=1.0)
    assert out.isnan().any()
    assert (out.isnan() | (out == 1)).all()


def test_gradients_of_scores_that_lse_is_too_coarse_for_are_nan(gpu):
    q, k, v = (torch.randn(1, 1, 8, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    found = attend_on("triton", q, k, v, scale=1e6)
    torch.testing.assert_close(found, attend_on("reference", q, k, v, scale=1e6))
    gradients = torch.autograd.grad(found.sum(), (q, k, v))
    assert all(x.isnan().all() for x in gradients)


def test_nan_beside_sinks(gpu):
    """A maximum leaves NaN out; a sink that is larger than all scores can be."""
    q = torch.randn(1, 2, 16, 16, dtype=torch.bfloat16)
    q[0, 0, 3] = torch.nan
    sinks = torch.tensor([0.0, 1e8])
    for options in (dict(sinks=sinks), {}):
        found, expected = (
            attend_on(backend, q, q[:, :, :9], q[:, :, :9].nan_to_num(), return_lse=True, **options)
            for backend in ("triton", "reference")
        )
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0.02, atol=0.02, equal_nan=True)


@pytest.mark.parametrize("gpu", ["sm_80"], indirect=True)
def test_usual_sizes(gpu):
    """The tiles of a usual model: several blocks, several tiles in each, and full tiles in all loops. On sm_90 it is
    the first case of `test_roles.py`."""
    case = cases.Case("", 1, 2, 1, 300, 300, 64, 64, causal=True)
    cases.check(case, torch.bfloat16, "triton")


@pytest.mark.parametrize("gpu", ["sm_90"], indirect=True)
def test_same_bits_every_run(gpu):
    q, k, v = (torch.randn(1, 2, 130, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with flashattn.use_backend("triton"):
        first, second = (
            (out, *torch.autograd.grad(out.sum(), (q, k, v)))
            for out in (flashattn.attention(q, k, v, causal=True) for _ in range(2))
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gpu, width", [("sm_80", 3), ("sm_90", 8)], indirect=["gpu"])
def test_lanes_that_hold_the_same_sum_hold_the_same_bits(gpu, width):
    """One element a thread: its bare product, contracted into the addition of another lane's, gave each lane last bits
    of its own, and chance which of them were stored."""
    x, weight = torch.randn(40, width, requires_grad=True), torch.randn(width, requires_grad=True)
    q, v = torch.randn(1, 1, 40, 2 * width, requires_grad=True), torch.randn(1, 1, 40, 3 * width, requires_grad=True)
    with flashattn.use_backend("triton"):
        torch.autograd.grad(flashattn.layer_norm(x, weight).square().sum(), (x, weight))
        torch.autograd.grad(flashattn.rms_norm(x, weight).square().sum(), (x, weight))
        torch.autograd.grad(flashattn.attention(q, q, v).square().sum(), (q, v))
