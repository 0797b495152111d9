"""What test_parallel.py runs under torchrun: a few steps, whose losses process 0 prints.

python several_processes.py one|shard|split|both DIRECTORY STEPS CHANGES_OF_THE_CONFIG
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from model.training import parallel, train
from model.training.runs import Run
from model.training.train import Training
from tests.model.training import make_batch, make_model

if __name__ == "__main__":  # doctest's collector imports every file
    how, directory, steps, changes = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    ours = make_model(**changes)
    accumulate = 2
    if how != "one":
        distributed.init_process_group("gloo")
    mesh = None
    if how in ("split", "both"):
        size = distributed.get_world_size()
        meshes = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        parallel.split(ours, meshes["tensor"])
        mesh = meshes["data"]
    if how in ("shard", "both"):  # each process, or pair, takes every other batch
        parallel.shard(ours, mesh)
        accumulate = 1
    settings = Training(steps=steps, accumulate=accumulate, learning_rate=1e-2, warmup=2, schedule="constant")
    log = train.train(ours, make_batch, settings, Run(directory), mesh=mesh, progress=False)
    if how == "one" or distributed.get_rank() == 0:
        print(json.dumps([entry["loss"] for entry in log]))
    if how != "one":
        distributed.destroy_process_group()
