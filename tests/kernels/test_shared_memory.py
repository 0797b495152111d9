"""Every launch fits its architecture's shared memory, which Triton does not check before the card refuses it: by the
arithmetic of `configs.count_shared_bytes` for all that a call can ask for. `test_compiled.py` holds that arithmetic
against what the compiler makes of each kernel there."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from flashattn.kernels import codegen, configs
from flashattn.kernels.configs import PairCosts
from flashattn.kernels.precision import find_widest
from flashattn.score_mod import trace

COLS = [16, 32, 64, 128, 256]
PASSES = [*configs.ATTENTION, "decode"]
KINDS = [(2, "ieee"), (4, "ieee"), (4, "tf32"), (4, "tf32x3")]
# Of a bias of any dtype, a mask, up to three captured tensors, each alone and together.
LOADS = [sum(chosen) for n in range(6) for chosen in itertools.combinations((8, 1, 8, 8, 8), n)]
LOADS += [sum(chosen) for n in range(3) for chosen in itertools.combinations((4, 1, 2), n)]


def can_be(arch: str, direction: str, precision: str, head_dim: int) -> bool:
    """What `choose_input_precision` gives."""
    widest = find_widest(precision, arch, direction in configs.WITH_TANGENTS)
    return precision == "ieee" or (arch.startswith("sm_") and head_dim <= widest)


@pytest.mark.parametrize("arch", [*configs.SHARED_MEMORY, "sm_999", "gfx1"])
def test_every_call_fits(arch):
    limit = configs.find_shared_memory(arch)
    for direction, d, dv, (itemsize, precision), loaded, dropout, has_score_mod in itertools.product(
        PASSES, COLS, COLS, KINDS, sorted(set(LOADS)), (False, True), (False, True)
    ):
        if not can_be(arch, direction, precision, max(d, dv)):
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
            if not can_be(arch, direction, precision, cols):
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
