"""Fixtures of the tests of models."""

import copy
import functools

import pytest
import torch


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Gives the tiny checkpoint of a name, which is written and loaded once, with copies of both models of it.

    Copies, as calls leave traces: gradients, and rotary frequencies in transformers that depend on the calls before.
    """
    from tests.model.checkpoints import write_checkpoint  # skips the tests where transformers is not installed

    @functools.cache
    def write(name: str):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return write_checkpoint(name, tmp_path_factory.mktemp("tiny"))

    def get(name: str):
        checkpoint = write(name)
        return checkpoint._replace(theirs=copy.deepcopy(checkpoint.theirs), ours=copy.deepcopy(checkpoint.ours))

    return get
