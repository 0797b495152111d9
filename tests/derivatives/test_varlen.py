"""Forward mode and second derivatives of packed sequences on every backend, against PyTorch's of each alone."""

import pytest
import torch

import flashattn
from tests.attention.packed_cases import (
    CASES,
    LENGTHS,
    attend_by_sequence,
    make_packed_case,
    make_packed_gradients,
    make_packed_inputs,
    ours,
)
from tests.common import (
    DTYPES,
    Truth,
    assert_as_exact_as_torch,
    find_device,
    once_per_case,
)
from tests.derivatives.cases import compute, list_results, make_directions


def make_truth(case, lengths_q, lengths_k, dtype, device) -> Truth:
    inputs, options = make_packed_inputs(case, lengths_q, lengths_k, dtype, device)
    theirs = attend_by_sequence(case, lengths_q, lengths_k, options)
    gradients = make_packed_gradients(case, *theirs(*inputs), dtype, device)
    directions = make_directions(inputs)
    wide = ([x.double() for x in xs] for xs in (inputs, gradients, directions))
    by_torch = compute(theirs, inputs, gradients, directions)
    return Truth(inputs, options, (*gradients, *directions), compute(theirs, *wide), by_torch, [])


compute_truth = once_per_case(make_truth)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case, dtype, backend):
    check(case, dtype, backend)


@pytest.mark.interpreter
def test_triton():
    check(CASES[-1], torch.float32, "triton")


def check(case, dtype, backend) -> None:
    case = make_packed_case(case, *LENGTHS)
    truth = compute_truth(case, *LENGTHS, dtype, find_device(backend))
    inputs, options, gradients = truth.fresh()
    gradients, directions = gradients[:2], gradients[2:]
    with flashattn.use_backend(backend):
        found = compute(ours(case, *LENGTHS, options), inputs, gradients, directions)
    for kind, names in list_results(case).items():
        for name, x, y, t in zip(names, found[kind], truth.by_torch[kind], truth.exact[kind], strict=True):
            assert_as_exact_as_torch(x, y, t, name)
