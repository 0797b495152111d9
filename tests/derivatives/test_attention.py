"""Forward mode and second derivatives of attention on every backend, against PyTorch's of the same mathematics."""

import pytest

from tests.attention.cases import CASES, pairwise
from tests.common import BACKENDS, DTYPES, skip_if_wrong_there
from tests.derivatives.cases import check

ALL = [*CASES, *pairwise()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_against_float64(case, dtype, backend):
    skip_if_wrong_there(backend, dtype)
    check(case, dtype, backend)
