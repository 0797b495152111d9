"""Norms move the bytes they need: counted in the compiled kernels. `python -m bench ptx norm` prints it."""

import pytest
import torch

import flashattn
from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from bench import launches, ptx
from bench.ptx.norm_bytes import count_norm_bytes
from flashattn.kernels import norm_configs

ALLOWED = 1.02
ELEMENTS = 2**16
TWICE = 5 / 3  # grad_y and hidden read twice, grad_x written


def run(rows: int, width: int, dtype: torch.dtype, rms: bool):
    with ptx.device("sm_90") as gpu, flashattn.use_backend("triton"):
        launches.make_norm((rows, width), dtype, backward=True, rms=rms).run()
    return count_norm_bytes(gpu.launches)


@pytest.mark.parametrize("width", [1024, 4096, 8192, 16384, 32768])
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_every_row_is_moved_once(rms, width):
    moved = run(ELEMENTS // width, width, torch.bfloat16, rms)
    assert moved["forward"].moved <= ALLOWED
    assert moved["backward"].moved <= (1 if width <= 8192 else TWICE) * ALLOWED


def test_float32_rows_are_moved_once():
    moved = run(2, 32768, torch.float32, False)
    assert moved["forward"].moved <= ALLOWED
    assert run(8, 8192, torch.float32, False)["backward"].moved <= ALLOWED


def test_the_last_chunk_is_not_read_again():
    """Of a row of two chunks of which the first is read twice: 2.5 for the 2 that are needed."""
    assert run(1, 65536, torch.bfloat16, True)["forward"].moved <= 1.25 * ALLOWED


@pytest.mark.parametrize(
    ("width", "programs"),
    [(1024, 2 * 132), (4096, 2 * 132), (8192, 132), (65536, 2 * 132 // 64)],
)
def test_programs_fill_the_multiprocessors(width, programs, monkeypatch):
    tile = norm_configs.choose_norm_tile("backward", width)
    assert norm_configs.count_norm_programs(132, tile, -(-width // tile.cols)) == programs


def test_partial_sums():
    """8 multiprocessors are 16 programs of 4,096 elements; each column of weight is written and read by each."""
    moved = run(64, 4096, torch.bfloat16, True)
    assert moved["backward"].sums == 16 * 4096 * 4 * 2
