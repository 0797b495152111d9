"""Shared by all tests: the backends and dtypes to run over, PyTorch's own mathematics, and the error rule.

The error rule, from the design: the error against the float64 reference is at most twice the error PyTorch's own
mathematics makes in the same dtype, plus one unit in the last place.
"""

import copy
import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch

from flashattn.backends import unavailable_reason

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [pytest.param("triton", marks=pytest.mark.interpreter), "cpu", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def find_device(backend: str) -> torch.device:
    """Triton's tensors lie on the GPU, unless its interpreter or the PTX machine takes those of the CPU."""
    return torch.device("cpu" if backend != "triton" or unavailable_reason("triton", "cpu") is None else "cuda")


def skip_if_wrong_there(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")


def randn(*shape: int, dtype: torch.dtype, device="cpu") -> torch.Tensor:
    return torch.randn(*shape).to(device=device, dtype=dtype)


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


class Truth(NamedTuple):
    """What does not depend on the backend: a case's inputs, and the results and gradients that they should give."""

    inputs: Sequence[torch.Tensor | None]
    options: dict
    gradients: Sequence[torch.Tensor]  # of the results
    exact: list[torch.Tensor]  # in float64
    by_torch: list[torch.Tensor]  # by PyTorch's operations in the inputs' dtype
    terms: list[torch.Tensor | float]  # `summed` of the error rule

    def fresh(self) -> tuple[list, dict, list]:
        """Copies of inputs, options and gradients, which a test may spoil."""
        return copy.deepcopy((list(self.inputs), self.options, list(self.gradients)))


def once_per_case(make: Callable[..., Truth]) -> Callable[..., Truth]:
    """The truth of the same arguments is made once for the backends that follow one another, from seed 0."""

    @functools.lru_cache(maxsize=8)
    def made(*arguments):
        torch.manual_seed(0)
        return make(*arguments)

    return made


def difference(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """x - truth where truth is finite. Infinities must be in the same places, and there must be no NaN."""
    x, truth = x.detach().double().cpu(), truth.detach().double().cpu()
    assert x.shape == truth.shape
    assert not x.isnan().any()
    assert torch.equal(x.isinf(), truth.isinf())
    return (x - truth)[truth.isfinite()]


def assert_as_exact_as_torch(x, theirs, truth, name: str, summed: torch.Tensor | float = 0.0) -> None:
    """The error rule. `theirs` is what PyTorch's mathematics makes of the same inputs in the same dtype.

    The error of a tensor is its root mean square: the largest of a few hundred rounding errors is a matter of luck,
    PyTorch's as well as ours. So that no single wrong element hides in the mean, none may be off by more than ten
    times the largest error of PyTorch's. `summed`: how large the terms of the sums are, where terms far larger than
    their sum cancel; a unit in the last place of float32, in which they are summed, is allowed of them too.
    """
    finite = truth.detach().double()[truth.isfinite()]
    ours, theirs = difference(x, truth), difference(theirs, truth)
    last_place, last_place_summed = torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps
    summed = torch.as_tensor(summed, dtype=torch.float64)
    for size, times in ((root_mean_square, 2), (largest, 10)):
        error, allowed = size(ours), times * size(theirs) + last_place * size(finite) + last_place_summed * size(summed)
        assert error <= allowed, f"{name}: {size.__name__} error {error:.2e}, allowed {allowed:.2e}"
