"""Fixtures and settings every test runs under."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

import flashattn
from tests.common import INTERPRETED
from tests.other_kernels import ARCHITECTURES, can_run_kernels_of, use_kernels_of
from tests.quick import is_quick

# Plain modules of checks, whose assertions should show their values as test modules' do.
for _folder in ("attention", "compat", "gpu", "kernels", "norm"):
    pytest.register_assert_rewrite(f"tests.{_folder}")


def pytest_addoption(parser):
    parser.addoption(
        "--rehearse-gpu", metavar="ARCH", choices=["sm_80", "sm_90"],
        help="run the tests marked gpu without one: sm_80 or sm_90, whose launches the PTX machine takes",
    )  # fmt: skip
    parser.addoption(
        "--kernels-of", metavar="ARCH", choices=ARCHITECTURES,
        help="on a later GPU, run the kernels compiled for this one: " + ", ".join(ARCHITECTURES),
    )  # fmt: skip
    parser.addoption("--quick", action="store_true", help="leave the slow tests out, but for samples (tests/quick.py)")


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreter: needs a GPU, or TRITON_INTERPRET=1 in a process of its own")
    config.addinivalue_line("markers", "gpu: needs a GPU, or --rehearse-gpu sm_90")
    if architecture := config.getoption("--kernels-of"):
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--kernels-of {architecture}: needs a GPU that runs them")
        major, minor = torch.cuda.get_device_capability()
        own = f"sm_{major}{minor}"
        if not can_run_kernels_of(architecture, own):
            raise pytest.UsageError(f"--kernels-of {architecture}: this GPU, {own}, is older or has less shared memory")
        until_the_end = contextlib.ExitStack()
        until_the_end.enter_context(use_kernels_of(architecture, own))
        config.add_cleanup(until_the_end.close)


def pytest_collection_modifyitems(config, items):
    """A Triton kernel runs on a GPU, in a process started so in the interpreter, or on the PTX machine."""
    has_gpu = torch.cuda.is_available()
    skips = {}
    if not (INTERPRETED or has_gpu):
        skips["interpreter"] = pytest.mark.skip(reason="run by `make test` a second time with TRITON_INTERPRET=1")
    if INTERPRETED or not (has_gpu or config.getoption("--rehearse-gpu")):
        skips["gpu"] = pytest.mark.skip(reason="needs a GPU (--rehearse-gpu sm_90 runs it without one, slowly)")
    for item in items:
        for marker, skip in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)
    left_out = other_dtypes(items) if INTERPRETED else set()
    if config.getoption("--quick"):
        left_out |= {item for item in items if not is_quick(item.nodeid)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def other_dtypes(items) -> set:
    """The tests that the interpreter leaves out: it is slow, and a kernel's text is the same for every dtype, so each
    case runs in one dtype, alternating among those that the interpreter computes correctly."""
    cases: dict[tuple, list] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if isinstance(parameters.get("dtype"), torch.dtype):
            others = tuple((name, str(value)) for name, value in parameters.items() if name != "dtype")
            cases.setdefault((item.function, others), []).append(item)
    left_out: set = set()
    for number, of_case in enumerate(cases.values()):
        right = [item for item in of_case if item.callspec.params["dtype"] != torch.bfloat16] or of_case
        left_out |= set(of_case) - {right[number % len(right)]}
    return left_out


# Of this checkout: a kernel out of another one's cache names the files of that one.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "triton"))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for on a GPU
if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)  # the workers share the cores; test_threads sets its own number


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)  # which also fills uninitialised memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    doctest_namespace["flashattn"] = flashattn
