"""What test_parallel.py runs: a few steps in several processes, whose losses process 0 prints. The processes are forks
of this one, which has imported PyTorch for them all.

python several_processes.py one|shard|split|both DIRECTORY STEPS CHANGES_OF_THE_CONFIG
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import start_processes

from model.training import parallel, train
from model.training.runs import Run
from model.training.train import Training
from tests.model.training import make_batch, make_model

PROCESSES = {"one": 1, "shard": 2, "split": 2, "both": 4}


def run(rank: int, how: str, directory: str, steps: int, changes: dict, store: str) -> None:
    torch.set_num_threads(1)
    size, mesh, accumulate = PROCESSES[how], None, 2
    if how != "one":
        distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    ours = make_model(**changes)
    if how in ("split", "both"):
        meshes = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        parallel.split(ours, meshes["tensor"])
        mesh = meshes["data"]
    if how in ("shard", "both"):  # each process, or pair, takes every other batch
        parallel.shard(ours, mesh)
        accumulate = 1
    settings = Training(steps=steps, accumulate=accumulate, learning_rate=1e-2, warmup=2, schedule="constant")
    log = train.train(ours, make_batch, settings, Run(directory), mesh=mesh, progress=False)
    if rank == 0:
        print(json.dumps([entry["loss"] for entry in log]), flush=True)
    if how != "one":
        distributed.destroy_process_group()


if __name__ == "__main__":  # doctest's collector imports every file
    how, directory, steps, changes = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = how, directory, steps, changes, f"{scratch}/store"
        start_processes(run, arguments, PROCESSES[how], start_method="fork")
