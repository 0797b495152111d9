"""Fixtures and settings every test runs under."""

import os

import pytest
import torch
from common import INTERPRETED

import flashattn


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreter: needs a GPU, or TRITON_INTERPRET=1 in a process of its own")


def pytest_collection_modifyitems(items):
    """A Triton kernel runs on a GPU or, in a process started so, in the interpreter."""
    usable = INTERPRETED or torch.cuda.is_available()
    skip = pytest.mark.skip(reason="run by `make test` a second time with TRITON_INTERPRET=1")
    for item in items:
        if item.get_closest_marker("interpreter") and not usable:
            item.add_marker(skip)


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
