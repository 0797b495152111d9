"""Two or four processes over gloo: the losses and the weights of one."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
from model.training import parallel
from tests.model.training import CONFIG, make_model

SCRIPT = Path(__file__).parent / "several_processes.py"
LLAMA = dict(family="llama", norm="rms", activation="silu", gated=True, positions="rope", bias=False, kv_heads=2)


def train_processes(how, directory, steps, changes):
    command = [sys.executable, str(SCRIPT), how, str(directory), str(steps), json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def train_alone(tmp_path_factory):
    """The losses and the directory of a run in one process, of each config once."""

    @functools.cache
    def run(changes: str):
        directory = tmp_path_factory.mktemp("one")
        return train_processes("one", directory, 6, json.loads(changes)), directory

    return lambda changes: run(json.dumps(changes))


@pytest.mark.parametrize(("how", "changes"), [("shard", LLAMA), ("split", {}), ("both", LLAMA)])
def test_several_processes_train_as_one(how, changes, train_alone, tmp_path):
    """A sharded run stops half-way and is resumed; its checkpoints are those of one process."""
    one, directory = train_alone(changes)
    if how == "shard":
        train_processes(how, tmp_path, 3, changes)
    several = train_processes(how, tmp_path, 6, changes)
    assert one == pytest.approx(several, abs=1e-5)
    a, b = (model.load(path / "step-000006")[0] for path in (directory, tmp_path))
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        if not name.endswith(".k.bias"):  # softmax does not see it: its gradient is rounding, which Adam makes large
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4, msg=name)


def test_what_does_not_divide_is_named():
    class Three:
        def size(self):
            return 3

    with pytest.raises(
        ValueError, match=f"kv_heads must be divisible by the mesh's 3 processes, got {CONFIG.kv_heads}"
    ):
        parallel.split(make_model(), Three())
