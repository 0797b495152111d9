"""Every Triton kernel compiled ahead of time, without a GPU: it compiles, fits in shared memory (which Triton does not
check), uses the matrix instructions, and at the usual head dimensions spills no register."""

import itertools

import pytest
import torch

from tests.common import INTERPRETED

compiled = pytest.importorskip("bench.compiled")

from bench.descriptors import find_lost_descriptors  # noqa: E402
from flashattn.backends import triton as backend  # noqa: E402
from flashattn.backends.triton_hopper import choose_roles, use_plain_kernels  # noqa: E402
from flashattn.kernels import compiler, configs, norm_configs  # noqa: E402
from flashattn.protocol import Saved, SavedNorm  # noqa: E402
from flashattn.score import Norm, Score  # noqa: E402
from tests.kernels.compile_cases import (  # noqa: E402
    ARCHITECTURES,
    ATTENTION_KERNELS,
    DECODING,
    FEATURES,
    check,
    check_decoding,
    check_float32_on_tensor_cores,
    check_norms,
    check_packed_sequences,
    check_score_mod_and_block_mask,
    compile_attention,
)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


SPILLS_COUNT = ("sm_80", "sm_90")


def in_roles(kernels) -> list[str]:
    return [kernel.name.removesuffix("_hopper") for kernel in kernels if kernel.name.endswith("_hopper")]


# Those whose spills count at every head_dim, the others at some of them.
HEAD_DIMS = {
    "sm_80": (16, 64, 128, 256), "sm_90": (64, 128, 256), "sm_100": (128,), "sm_120": (64, 256), "gfx942": (64, 256),
    "gfx950": (16,),
}  # fmt: skip


def each_with_its(table: dict[str, tuple]) -> list[tuple]:
    return [(architecture, value) for architecture, values in table.items() for value in values]


@pytest.mark.parametrize("architecture, head_dim", each_with_its(HEAD_DIMS))
def test_attention(architecture, head_dim):
    usual = head_dim in (64, 128) and architecture in ("sm_80", "sm_90")
    check(compile_attention(architecture, head_dim), spills=not usual)


def test_who_serves_hopper():
    """16 bits, and head dimensions that are multiples of 16 bytes."""

    def serves(architecture: str, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> set[bool]:
        q = torch.empty(1, 2, 100, head_dim, dtype=dtype)
        with compiled.use_driver(compiled.NoDriver(architecture)):
            passes = "forward", "backward_q", "backward_kv"
            return {choose_roles(direction, q, q, q, Score(1.0)) is not None for direction in passes}

    for head_dim in (8, 16, 40, 136, 256):
        assert serves("sm_90", head_dim) == {True}
    assert serves("sm_90", 44) == serves("sm_90", 64, torch.float32) == serves("sm_100", 64) == {False}


@pytest.mark.parametrize("shape, lengths", [((1, 1, 1, 1, 1), True), ((2, 2, 2, 100, 1), False)], ids=str)
def test_sizes_of_one(shape, lengths):
    """Triton folds a constant 1 into the kernel, unless told not to; the assembler crashed on what came of it."""
    torch.use_deterministic_algorithms(False)
    batch, heads, kv_heads, seq_q, seq_k = shape
    q = torch.empty(batch, heads, seq_q, 64, dtype=torch.float16)
    k = torch.empty(batch, kv_heads, seq_k, 64, dtype=torch.float16)
    some = torch.ones(batch, dtype=torch.int32) if lengths else None
    with compiled.compile_for("sm_90") as kernels, use_plain_kernels():
        out, lse, rest = backend.forward(q, k, k, Score(0.125, None, None, some, some))
        saved = Saved(q, k, k, out, lse, rest)
        backend.backward(out, None, saved, Score(0.125, None, None, some, some), False, [])
    check(kernels)


@pytest.mark.parametrize(
    "head_dim, head_dim_v, features",
    [(64, 16, FEATURES["dropout"]), (24, 9, FEATURES["dropout"]), (128, 32, {})],
    ids=str,
)
def test_narrow_values(head_dim, head_dim_v, features):
    check(compile_attention("sm_90", head_dim, head_dim_v=head_dim_v, **features))


def test_the_assemblers_fault_is_there_without_wider_tiles(monkeypatch):
    """Else the way round it could go, or `find_lost_descriptors` finds nothing."""
    monkeypatch.setattr(configs, "has_descriptor_bug", lambda: False)
    forward = compile_attention("sm_90", 64, causal=False, head_dim_v=16)[0]
    assert bool(find_lost_descriptors(forward.code)) == compiler.has_descriptor_bug()


def test_faults_of_the_compiler_are_told(monkeypatch):
    for fences, descriptors in ((True, True), (True, False), (False, True), (False, False)):
        monkeypatch.setattr(compiler, "LACKS_FENCES", fences)
        monkeypatch.setattr(compiler, "has_descriptor_bug", lambda lost=descriptors: lost)
        told = " ".join(compiler.list_bugs())
        assert ("memory fences" in told, "loses addresses" in told) == (fences, descriptors)


def test_a_length_compiles_nothing_new():
    torch.use_deterministic_algorithms(False)
    cached = []
    for seq in (1, 16, 17, 512):
        q = torch.empty(1, 1, seq, 32, dtype=torch.float16)
        with compiled.compile_for("sm_80") as kernels:
            backend.forward(q, q, q, Score(0.125, None, 0))
        cached += kernels
    assert len(set(cached)) == 1


@pytest.mark.parametrize(
    "options, head_dims",
    [({"lengths": True}, (128, 64)), ({"window": 512}, (64, 128)), ({"dtype": torch.float16}, (128, 64))],
    ids=str,
)
@pytest.mark.parametrize("architecture", SPILLS_COUNT)
def test_attention_spills_nothing(architecture, head_dims, options):
    head_dim = head_dims[SPILLS_COUNT.index(architecture)]
    check(compile_attention(architecture, head_dim, **options), spills=False)


@pytest.mark.parametrize("architecture, feature", list(zip(["sm_80", "gfx942"] * 3, FEATURES, strict=True)))
def test_features(architecture, feature):
    """On sm_90 they are in roles."""
    check(compile_attention(architecture, 64, **FEATURES[feature]))


@pytest.mark.parametrize("feature", ["softcap", "mask", "bias", "dropout"])  # the PTX machine runs all together
def test_features_in_roles(feature):
    kernels = compile_attention("sm_90", 64, plain=False, **FEATURES[feature])
    assert in_roles(kernels) == ATTENTION_KERNELS
    check(kernels[:3], spills=False)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100", "sm_120", "gfx942"])
def test_all_features_at_once(architecture):
    """With a bias of float64, which takes most shared memory."""
    every = {name: value for options in FEATURES.values() for name, value in options.items()}
    every["bias"] = every["bias"].double()
    check(compile_attention(architecture, 128, lengths=True, window=100, **every))


def test_rows_of_a_bias_and_a_mask():
    features = dict(bias=torch.ones(512).view(1, 1, 1, 512), mask=torch.ones(1, 1, 512, 512) > 0)
    check(compile_attention("sm_90", 256, **features))


@pytest.mark.parametrize("architecture, head_dim", [("sm_80", 128), ("sm_90", 64), ("gfx942", 64)])
def test_packed_sequences(architecture, head_dim):
    check_packed_sequences(architecture, head_dim)


@pytest.mark.parametrize(
    "architecture, what",
    [("sm_80", "score_mod"), ("sm_90", "score_mod"), ("sm_80", "block_mask"), ("gfx942", "both")],
)
def test_score_mod_and_block_mask(architecture, what):
    check_score_mod_and_block_mask(architecture, what)


def decoded() -> list[tuple]:
    """For GPUs whose spills count, every feature in bfloat16, with pages or rows in turn. For the others, and in
    float32, a feature on each GPU."""
    rows = []
    for n, (architecture, features) in enumerate(itertools.product(ARCHITECTURES, DECODING)):
        number, place = divmod(n, len(DECODING))
        if architecture in SPILLS_COUNT:
            rows.append((architecture, features, torch.bfloat16, bool((number + place) % 2)))
        if place == number % len(DECODING):
            dtype = torch.float32 if architecture in SPILLS_COUNT or number % 2 else torch.bfloat16
            rows.append((architecture, features, dtype, bool(number // 2 % 2)))
    return rows


@pytest.mark.parametrize("architecture, features, dtype, paged", decoded(), ids=str)
def test_decoding(architecture, features, dtype, paged):
    check_decoding(architecture, features, dtype, paged)


@pytest.mark.parametrize("architecture", ["sm_89", "gfx1100", "gfx1201"])
def test_attention_on_smaller_gpus(architecture):
    check(compile_attention(architecture, 128))


@pytest.mark.parametrize("architecture", ["sm_120", "gfx942"])  # on others the PTX machine runs them
def test_attention_padded_head_dims(architecture):
    check(compile_attention(architecture, 40, head_dim_v=72))


@pytest.mark.parametrize("architecture, head_dim", [("sm_80", 64), ("sm_90", 128)])
def test_attention_float32_spills_nothing(architecture, head_dim):
    """Full float32 has no matrix instruction on NVIDIA GPUs (tf32 keeps 10 bits of the fraction)."""
    check(compile_attention(architecture, head_dim, torch.float32), tensor_cores=False, spills=False)


@pytest.mark.parametrize(
    "architecture, head_dim, features",
    [("sm_89", 128, FEATURES["bias"]), ("gfx942", 256, {})],
    ids=["sm_89 with a bias", "gfx942"],
)
def test_attention_float32_fits(architecture, head_dim, features):
    check(compile_attention(architecture, head_dim, torch.float32, **features), tensor_cores=False)


@pytest.mark.parametrize(
    "setting, architecture, head_dim, features",
    [("medium", "sm_90", 256, {}), ("high", "sm_90", 64, FEATURES["bias"]), ("high", "sm_100", 64, {})],
    ids=["medium", "high with a bias", "high on sm_100"],
)
def test_attention_float32_on_tensor_cores_fits(setting, architecture, head_dim, features):
    check_float32_on_tensor_cores(setting, architecture, head_dim, **features)


WIDTHS = {  # of which sm_80 and sm_90 must spill at none
    "sm_80": (64, 4096, 40000), "sm_90": (1000, 40000), "sm_120": (4096,), "gfx942": (1000,), "gfx950": (40000,),
}  # fmt: skip


@pytest.mark.parametrize("architecture, width", each_with_its(WIDTHS))
def test_norms(architecture, width):
    check_norms(architecture, width)


@pytest.mark.parametrize(
    "architecture, center, dtype",
    [("sm_80", True, torch.float32), ("sm_90", True, torch.bfloat16), ("sm_90", False, torch.float32),
     ("gfx942", True, torch.float32)], ids=str,
)  # fmt: skip
def test_the_widest_rows_stay_in_registers(architecture, center, dtype):
    torch.use_deterministic_algorithms(False)
    norm = Norm(center, 1e-5)
    with compiled.compile_for(architecture) as kernels:
        x, weight = (torch.empty(*shape, norm_configs.NORM_COLS["forward"], dtype=dtype) for shape in ((2,), ()))
        backend.norm_forward(x, x, weight, weight if center else None, dtype, True, norm)
        x, weight = (torch.empty(*shape, norm_configs.NORM_COLS["backward"], dtype=dtype) for shape in ((2,), ()))
        mean = rstd = torch.empty(2)
        saved = SavedNorm(x, weight, weight if center else None, mean, rstd)
        backend.norm_backward(x, None, saved, dtype, None, norm)
    assert [kernel.name for kernel in kernels] == ["norm_forward", "norm_backward", "norm_backward_parameters"]
    for kernel in kernels:
        assert kernel.shared_bytes <= configs.SHARED_MEMORY[architecture]
        assert (kernel.spills, kernel.stack_bytes) == (0, 0), kernel


@pytest.mark.parametrize(
    "architecture, center, dtype",
    [("sm_80", True, torch.bfloat16), ("sm_90", True, torch.float32), ("sm_90", False, torch.bfloat16)], ids=str,
)  # fmt: skip
def test_two_programs_with_a_row_of_16384_run_at_a_time(architecture, center, dtype):
    x, weight = torch.empty(2, 16384, dtype=dtype), torch.empty(16384, dtype=dtype)
    with compiled.compile_for(architecture) as kernels:
        backend.norm_forward(x, None, weight, weight if center else None, dtype, False, Norm(center, 1e-5))
    assert kernels[0].occupancy == 1.0
    assert kernels[0].spills <= (15 if center else 0)


@pytest.mark.parametrize("architecture", ["sm_89", "gfx942"])
def test_the_widest_copies_of_rows_fit(architecture):
    """Backward, three tensors of float32 are copied while others are worked on."""
    torch.use_deterministic_algorithms(False)
    x, weight = torch.empty(2, norm_configs.NORM_COLS["backward"]), torch.empty(norm_configs.NORM_COLS["backward"])
    mean = rstd = torch.empty(2)
    with compiled.compile_for(architecture) as kernels:
        backend.norm_backward(x, x, SavedNorm(x, weight, weight, mean, rstd), x.dtype, x.dtype, Norm(True, 1e-5))
    assert kernels[0].shared_bytes <= configs.SHARED_MEMORY[architecture]


def test_an_absent_piece_is_compiled_away():
    """Lengths that are not given cost nothing: the kernel is the one without them."""
    without, with_lengths = (compile_attention("sm_90", 64, lengths=x)[0] for x in (False, True))
    again = compile_attention("sm_90", 64)[0]
    assert without == again
    assert with_lengths != without
