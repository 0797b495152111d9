"""Every launch fits its architecture's shared memory, which Triton does not check before the card refuses it: by the
arithmetic of `configs.count_shared_bytes` for all that a call can ask for, and that by what the compiler makes of
some."""

import itertools

import pytest
import torch

from tests.common import INTERPRETED

pytest.importorskip("triton")

from bench import compiled
from flashattn.backends import triton as backend
from flashattn.backends.triton_hopper import use_plain_kernels
from flashattn.cache import CacheView
from flashattn.kernels import codegen, configs
from flashattn.kernels.configs import PairCosts
from flashattn.kernels.precision import WIDEST_SPLIT, choose_input_precision
from flashattn.protocol import Saved
from flashattn.score import Score
from flashattn.score_mod import trace

COLS = [16, 32, 64, 128, 256]
PASSES = [*configs.ATTENTION, "decode"]
KINDS = [(2, "ieee"), (4, "ieee"), (4, "tf32"), (4, "tf32x3")]
# Of a bias of any dtype, a mask, up to three captured tensors, each alone and together.
LOADS = [sum(chosen) for n in range(6) for chosen in itertools.combinations((8, 1, 8, 8, 8), n)]
LOADS += [sum(chosen) for n in range(3) for chosen in itertools.combinations((4, 1, 2), n)]


def can_be(arch: str, precision: str, head_dim: int) -> bool:
    """What `choose_input_precision` gives."""
    return precision == "ieee" or (arch.startswith("sm_") and (precision == "tf32" or head_dim <= WIDEST_SPLIT))


@pytest.mark.parametrize("arch", [*configs.SHARED_MEMORY, "sm_999", "gfx1"])
def test_every_call_fits(arch):
    limit = configs.find_shared_memory(arch)
    for direction, d, dv, (itemsize, precision), loaded, dropout, has_score_mod in itertools.product(
        PASSES, COLS, COLS, KINDS, sorted(set(LOADS)), (False, True), (False, True)
    ):
        if not can_be(arch, precision, max(d, dv)):
            continue
        pairs = PairCosts(loaded, min(loaded, 8), dropout)
        tiles = configs.fit_tiles(arch, direction, (d, dv), itemsize, pairs, has_score_mod, precision)
        used = configs.count_shared_bytes(arch, direction, tiles, (d, dv), itemsize, pairs, precision)
        assert used <= limit, (direction, d, dv, itemsize, precision, pairs, tiles)


def test_what_is_loaded_makes_tiles_smaller_only_where_it_must():
    """The case that failed on an H100: a float32 bias at head_dim 64."""
    plain, biased = (configs.fit_tiles("sm_90", "forward", (64, 64), 2, PairCosts(n, n), False) for n in (0, 4))
    assert plain == configs.look_up_tiles("forward", 64, 2, "sm_90")
    assert (
        configs.count_shared_bytes("sm_90", "forward", plain, (64, 64), 2, PairCosts(4, 4))
        > configs.SHARED_MEMORY["sm_90"]
    )
    assert biased == plain._replace(stages=plain.stages - 1)


def test_plain_rows_are_taken_as_they_are():
    for arch, family in configs.FAMILY.items():
        for direction, cols, (itemsize, precision) in itertools.product(configs.ATTENTION, (64, 128, 256), KINDS):
            if not can_be(arch, precision, cols):
                continue
            row = configs.look_up_tiles(direction, cols, itemsize if precision == "ieee" else precision, family)
            assert configs.fit_tiles(arch, direction, (cols, cols), itemsize, PairCosts(), False, precision) == row


TABLE, ROWS = torch.ones(4, 1024, dtype=torch.float64), torch.ones(512)


def test_loads_of_a_callable_are_counted_where_they_depend_on_both_positions():
    counted = {
        lambda s, b, h, i, j: s + TABLE[h, i - j + 512]: [8],
        lambda s, b, h, i, j: s + ROWS[i] + ROWS[j]: [],
        lambda s, b, h, i, j: s + ROWS[(s > 0).int()]: [4],
        lambda s, b, h, i, j: s + TABLE[h, i] * ROWS[(i * j) % 512]: [4],
    }
    for mod, expected in counted.items():
        assert codegen.list_pair_loads(trace("score_mod", mod, 1)) == expected


@pytest.fixture
def without_assembler(monkeypatch):
    """Shared memory is known before the assembler runs, which takes most of a compilation."""
    from triton import knobs

    def stop_before_the_assembler(backend=None, stages=None, *_):
        if backend is None:
            return "no assembler", "no assembler"
        for stage in stages.keys() & {"ptx", "amdgcn"}:
            stages[stage] = lambda module, metadata: metadata.setdefault("name", "kernel")
        for stage in stages.keys() & {"cubin", "hsaco"}:
            stages[stage] = lambda module, metadata: b""
        return None

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", stop_before_the_assembler)
    monkeypatch.setattr(compiled, "inspect", lambda kernel, architecture: kernel.metadata.shared)


FEATURES = {
    "plain": {},
    "bias": dict(bias=torch.ones(1, 4, 512, 512)),
    "bias of keys, mask": dict(bias=torch.ones(512).view(1, 1, 1, 512), mask=torch.ones(1, 1, 512, 512) > 0),
    "bias, mask, dropout": dict(
        bias=torch.ones(1, 4, 512, 512, dtype=torch.float64),
        mask=torch.ones(1, 1, 512, 512) > 0,
        dropout_p=0.1,
        seed=torch.tensor(5),
    ),
    "score_mod": dict(score_mod=trace("score_mod", lambda s, b, h, i, j: s + TABLE[h, i - j + 512], 1)),
}
SAMPLES = [
    ("sm_80", 64, torch.bfloat16, "bias, mask, dropout"), ("sm_89", 128, torch.float32, "bias"),
    ("sm_89", 64, torch.bfloat16, "bias, mask, dropout"), ("sm_90", 64, torch.bfloat16, "score_mod"),
    ("sm_90", 256, torch.bfloat16, "bias of keys, mask"), ("sm_100", 128, torch.bfloat16, "bias, mask, dropout"),
    ("gfx942", 128, torch.bfloat16, "bias, mask, dropout"),
]  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch, head_dim, dtype, feature", SAMPLES, ids=str)
def test_the_compiler_uses_no_more(without_assembler, arch, head_dim, dtype, feature):
    check(arch, head_dim, dtype, feature)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("page_size, dtype", [(None, torch.float32), (16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950"])
def test_decoding_uses_no_more(without_assembler, arch, dtype, page_size):
    """Nor does a page table make it use fewer: as many keys are under way as without one."""
    q, cache = torch.empty(2, 4, 1, 128, dtype=dtype), torch.empty(64, 2, page_size or 512, 128, dtype=dtype)
    table = None if page_size is None else torch.zeros(2, 32, dtype=torch.int32)
    lengths = torch.full((2,), 512, dtype=torch.int32)
    cached = CacheView(cache, cache, table, lengths, lengths, 512)
    with compiled.compile_for(arch) as used:
        backend.decode(q, cached, Score(0.1, right=0, kv_lengths=lengths))
    tiles = configs.fit_tiles(arch, "decode", (128, 128), dtype.itemsize, configs.PLAIN, False)
    assert used[0] <= configs.count_shared_bytes(arch, "decode", tiles, (128, 128), dtype.itemsize, configs.PLAIN)
    assert used[0] >= (tiles.stages - 1) * tiles.block_n * 2 * 128 * dtype.itemsize


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "arch, setting, head_dim, feature",
    [("sm_89", "medium", 256, "plain"), ("sm_90", "medium", 256, "plain"), ("sm_80", "high", 64, "bias"),
     ("sm_100", "high", 64, "bias")],
)  # fmt: skip
def test_float32_on_tensor_cores_uses_no_more(without_assembler, arch, setting, head_dim, feature):
    torch.set_float32_matmul_precision(setting)
    try:
        check(arch, head_dim, torch.float32, feature)
    finally:
        torch.set_float32_matmul_precision("highest")


def check(arch: str, head_dim: int, dtype: torch.dtype, feature: str) -> None:
    """Each kernel is compiled to use at most as much as the arithmetic allows."""
    torch.use_deterministic_algorithms(False)
    q, k = torch.empty(2, 4, 512, head_dim, dtype=dtype), torch.empty(2, 2, 512, head_dim, dtype=dtype)
    score = Score(0.125, None, 0, **FEATURES[feature])
    with compiled.compile_for(arch) as used, use_plain_kernels():  # the tiles of warp-specialised ones fit all features
        out, lse, rest = backend.forward(q, k, k, score)
        backend.backward(out, None, Saved(q, k, k, out, lse, rest), score, score.bias is not None, [])
    passes = ["forward", "backward_q", "backward_kv"] + ["backward_q"] * (score.bias is not None)
    for direction, bytes_used in zip(passes, used, strict=True):
        has_score_mod, pairs = score.score_mod is not None, backend.count_pair_costs(score)
        cols = (head_dim, head_dim)
        with compiled.compile_only(arch):
            precision = choose_input_precision(q, k)
        tiles = configs.fit_tiles(arch, direction, cols, dtype.itemsize, pairs, has_score_mod, precision)
        allowed = configs.count_shared_bytes(arch, direction, tiles, cols, dtype.itemsize, pairs, precision)
        assert bytes_used <= allowed, direction
