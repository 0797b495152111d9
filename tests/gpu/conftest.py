"""The device of the tests in this folder."""

import pytest

import flashattn
from tests.gpu.machine import Gpu, Rehearsal


@pytest.fixture(autouse=True)
def gpu(request, monkeypatch):
    architecture = request.config.getoption("--rehearse-gpu")
    if architecture is None:
        with flashattn.use_backend("triton"):
            yield (real := Gpu())
        real.release_memory()
        return
    from bench import ptx

    with ptx.device(architecture), flashattn.use_backend("triton"):
        yield Rehearsal(monkeypatch)
