"""What the tests of graphs share."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture
def no_graphs():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


def compiled(function, dynamic: bool | None = None):
    """In one graph; its `counter` says how often it was compiled."""
    counter = CompileCounterWithBackend("aot_eager")
    result = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    result.counter = counter
    return result
