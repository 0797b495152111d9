"""Forward mode and second derivatives of attention on every backend, against PyTorch's of the same mathematics."""

import pytest
import torch

from tests.attention.cases import CASES, pairwise
from tests.common import DTYPES
from tests.derivatives.cases import check


def named(cases):
    return [pytest.param(case, id=case.name) for case in cases]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", named([*CASES, *pairwise()]))
def test_against_float64(case, dtype, backend):
    check(case, dtype, backend)


# Triton's interpreter takes some ten seconds for each; `tests/kernels/test_derivatives.py` has every pair as compiled.
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case", named([c for c in (*pairwise(), *CASES) if c.name in ("pairs_4", "grouped", "decode", "dropout")])
)
def test_triton(case):
    check(case, torch.float16 if case.name == "grouped" else torch.float32, "triton")
