"""Training with several processes, by PyTorch: FSDP2 shards parameters, tensor parallelism splits layers.

torchrun --nproc-per-node 2 mine.py

torch.distributed.init_process_group()
shard(model)                        # every process has a part of the parameters, gradients and optimizer state
train(model, batch, settings)       # and its own batches

mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "tensor"))     # both: 2 times 4 processes
split(model, mesh["tensor"])
shard(model, mesh["data"])
train(model, batch, settings, mesh=mesh["data"])
"""

from __future__ import annotations

from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ..encoder_decoder import Model
from ..layers import Block


def shard(model: Model, mesh: DeviceMesh | None = None) -> None:
    """Shard in place: block by block, and the rest as one. Zhao et al., "PyTorch FSDP" (2023), arXiv:2304.11277.

    mesh: of one dimension; all processes by default.
    """
    if mesh is None:
        mesh = init_device_mesh(model.token_embedding.weight.device.type, (distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def split(model: Model, mesh: DeviceMesh) -> None:
    """Split in place: each process of the mesh computes some heads, and a part of the feed-forward's width; the outputs
    of a sublayer are summed over the processes, which all take the same batches. Shoeybi et al., "Megatron-LM" (2019),
    arXiv:1909.08053.

    Raises:
        ValueError: if the processes do not divide kv_heads or ffn_width, or if the model has experts.
    """
    config, size = model.config, mesh.size()
    if config.experts:
        raise ValueError("experts must be 0: they are not split over processes")
    for name in ("kv_heads", "ffn_width"):
        if getattr(config, name) % size:
            raise ValueError(f"{name} must be divisible by the mesh's {size} processes, got {getattr(config, name)}")
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for attention in filter(None, (block.attention, block.cross_attention)):
            parts = dict.fromkeys("qkv", ColwiseParallel()) | {"out": RowwiseParallel()}
            parallelize_module(attention, mesh, parts)
        parts = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if block.feed_forward.gate is not None:
            parts["gate"] = ColwiseParallel()
        parallelize_module(block.feed_forward, mesh, parts)
