"""The types that a type checker of the user's code sees."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFUSED = "# refused"  # ends a line in which mypy has to find an error; it must find none in others
USE = """\
import torch
from torch import Tensor
from typing_extensions import assert_type

import flashattn
from flashattn import AuxOutput, AuxRequest
from flashattn.compat.sdpa import scaled_dot_product_attention

x, starts = torch.ones(1, 2, 4, 8), torch.tensor([0, 2], dtype=torch.int32)
angles, flag = torch.ones(16, 4), bool(x.sum() > 0)
assert_type(flashattn.attention(x, x, x, causal=True, window=(2, None), softcap=30.0), Tensor)
assert_type(flashattn.attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
assert_type(flashattn.attention(x, x, x, return_aux=AuxRequest(lse=True)), tuple[Tensor, AuxOutput])
assert_type(flashattn.attention(x, x, x, return_lse=flag), Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput])
assert_type(flashattn.attention_varlen(x[0], x[0], x[0], starts, starts, 2, 2), Tensor)
cache, pages = flashattn.KVCache(1, 2, 16, 8), flashattn.PagedKVCache(8, 4, 2, 8)
assert_type(flashattn.decode(x, cache, x, x, flashattn.Rotary(angles.cos(), angles.sin())), Tensor)
assert_type(flashattn.decode(x, pages.select([pages.add()]), return_lse=True), tuple[Tensor, Tensor])
assert_type(flashattn.rms_norm(x).sum(), Tensor)
assert_type(flashattn.layer_norm(x, residual=x, prenorm=True), tuple[Tensor, Tensor])
assert_type(flashattn.LayerNorm(8).weight, torch.nn.Parameter | None)
assert_type(flashattn.MultiheadAttention(8, 2, batch_first=True), flashattn.MultiheadAttention)
assert_type(flashattn.linear(x, x[0, 0]), Tensor)
assert_type(scaled_dot_product_attention(x, x, x), Tensor)

flashattn.attention(x, x, x, window=2)  # refused
flashattn.attention(x, x, x, softmax_scale=1.0)  # refused
flashattn.attention(x, x, x, return_lse=True).sum()  # refused
flashattn.decode(x, x, x, x)  # refused
flashattn.rms_norm(x, prenorm=True).sum()  # refused
flashattn.MultiheadAttention(8)  # refused
scaled_dot_product_attention(x, x, x, causal=True)  # refused
"""


def test_user_code(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    file = tmp_path / "use.py"
    file.write_text(USE)
    # The configuration and the cache of `make lint`: without the cache mypy reads all of PyTorch first.
    options = ("--config-file=pyproject.toml", "--no-error-summary", "--hide-error-context", file)
    done = subprocess.run([sys.executable, "-m", "mypy", *options], capture_output=True, text=True, cwd=ROOT)
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if f"{file.name}:" in line}
    wanted = {number for number, line in enumerate(USE.splitlines(), 1) if line.endswith(REFUSED)}
    assert found == wanted, done.stdout + done.stderr
