"""The case tables of all backends through the warp-specialised kernels, on the PTX machine for sm_90, in bfloat16 and
float16, and one case through every row of tiles that may be timed against the ones that are taken.
`make roles` runs this file on the oldest and the newest Triton, which takes two cores some two hours: pytest does not
find it by its name. `test_roles.py` and `every_triton.py` hold samples."""

import pytest
import torch

from bench import ptx
from flashattn.kernels import configs
from tests.attention import cases, packed_cases
from tests.attention.truth import Case
from tests.compat import flex_cases
from tests.kernels.compile_cases import CANDIDATES
from tests.ptx.run_text import STRICT

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
# The bias's gradient has a kernel of its own, for every GPU.
PASSES = {f"attention_{direction}_hopper" for direction in ("forward", "backward_q", "backward_kv")}
OTHERS = {"attention_backward_bias"}


@pytest.fixture
def in_roles():
    with ptx.device("sm_90", on_fault=STRICT) as device:
        yield device


def check_launches(device, case) -> None:
    """Bulk copies take rows of whole pieces of 16 bytes."""
    ran = {launch.kernel for launch in device.launches} - OTHERS
    if case.head_dim % 8 == case.head_dim_v % 8 == 0 and case.batch and case.seq_q and case.seq_k:
        assert ran == PASSES


@DTYPES
@pytest.mark.parametrize("case", [*cases.CASES, *cases.pairwise()], ids=lambda case: case.name)
def test_attention_cases(case, dtype, in_roles):
    cases.check(case, dtype, "triton")
    check_launches(in_roles, case)


@DTYPES
@pytest.mark.parametrize("direction, head_dim, row", CANDIDATES, ids=str)
def test_candidates(direction, head_dim, row, dtype, in_roles, monkeypatch):
    """Full and partial tiles; more work items than the programs of a persistent grid."""
    monkeypatch.setitem(configs.HOPPER[direction], head_dim, row)
    monkeypatch.setattr(configs, "count_multiprocessors", lambda device: 2)
    case = Case("", 2, 2, 1, 250, 330, head_dim, head_dim, causal=True, q_lengths=(250, 90), kv_lengths=(330, 200))
    cases.check(case, dtype, "triton")
    check_launches(in_roles, case)


@DTYPES
@pytest.mark.parametrize("case", packed_cases.CASES, ids=lambda case: case.name)
def test_packed_cases(case, dtype, in_roles):
    packed_cases.check(case, *packed_cases.LENGTHS, dtype, "triton")
    check_launches(in_roles, case)


@DTYPES
@pytest.mark.parametrize("block_mask", [None, *flex_cases.BLOCK_MASKS])
@pytest.mark.parametrize("mod", flex_cases.SCORE_MODS)
def test_flex_cases(mod, block_mask, dtype, in_roles, monkeypatch):
    """With blocks of 128, in one of which a tile lies."""
    made = flex_cases.create_block_mask
    monkeypatch.setattr(flex_cases, "create_block_mask", lambda *args: made(*args[:5]))  # of 128, its default
    flex_cases.check_gradients(dtype, mod, block_mask, "triton")
    assert {launch.kernel for launch in in_roles.launches} >= PASSES
