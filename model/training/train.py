"""The training loop.

    run = Run("out")                                      # the directory of checkpoints, log and plot; None for none
    train(model, batch, Training(steps=1000), run)        # resumes from the last checkpoint, if there is one

`batch(i)` returns the i-th batch, always the same one: so a run that was killed resumes bit-exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from .. import heads
from ..encoder_decoder import Model
from ..io.tokenizer import Tokenizer
from ..transformer import Stack
from .batches import Batch
from .flops import count_model_flops, measure_peak_flops
from .runs import Run

SCHEDULES = ("cosine", "inverse_sqrt", "constant")


@dataclass(frozen=True)
class Training:
    """The settings of a training run, checked."""

    steps: int
    learning_rate: float = 1e-3  # the peak
    schedule: str = "cosine"  # one of SCHEDULES, after a linear warm-up
    warmup: int = 100  # steps
    min_lr_ratio: float = 0.1  # of the peak: where the cosine ends
    weight_decay: float = 0.1  # of matrices
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0  # largest norm of all gradients together; None: no clipping
    accumulate: int = 1  # batches of a step; all their targets have the same weight
    label_smoothing: float = 0.0
    bfloat16: bool = False  # autocast: matrix products in bfloat16, parameters in float32
    recompute: bool = False  # activations of blocks in the backward pass (activation checkpointing)
    evaluate_every: int | None = None  # steps; None: at the end only, where it is always done
    save_every: int | None = None  # steps; None: at the end only, where it is always done
    seed: int = 0  # of dropout

    def __post_init__(self):
        for name in ("steps", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 step or None, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be over 0 or None, got {self.clip}")
        if self.min_lr_ratio < 0:
            raise ValueError(f"min_lr_ratio must be at least 0, got {self.min_lr_ratio}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 steps, got {self.warmup}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        inverse_sqrt: Vaswani et al. (2017), section 5.3: linear up to `warmup`, then proportional to step^-0.5. cosine:
        Loshchilov and Hutter, "SGDR" (2017), arXiv:1608.03983.

        >>> settings = Training(steps=8, learning_rate=1.0, warmup=2, min_lr_ratio=0.0)
        >>> [round(settings.lr_at(step), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "inverse_sqrt":
            return self.learning_rate * math.sqrt(max(1, self.warmup) / (step + 1))
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)


def train(
    model: Model,
    batch: Callable[[int], Batch],
    settings: Training,
    run: Run | None = None,
    evaluate: Callable[[Model], dict[str, float]] | None = None,
    tokenizer: Tokenizer | None = None,
    mesh: DeviceMesh | None = None,
    progress: bool = True,
) -> list[dict]:
    """Train in place. Returns the log: a dictionary for each step and each evaluation.

    Args:
        model: on its device, in float32; it may be sharded (parallel.py).
        batch: the i-th batch, deterministic. Of n processes, process r takes batches r, r + n, ...
        settings: see Training.
        run: the directory to write, and to resume from; its checkpoints are directories that `model.load` reads.
        evaluate: called with the model in evaluation mode; its result is added to the log.
        tokenizer: saved with the model.
        mesh: the processes that share the batches; None for all.
        progress: show loss, tokens per second and model FLOPs utilisation on a terminal.

    Raises:
        FloatingPointError: if the loss is not finite; the last checkpoint is kept.
        CheckpointError: if the run was begun with another model or tokeniser.
    """
    processes = Processes.from_mesh(mesh)
    rank, world = processes.rank, processes.size
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, settings)
    peak_flops = measure_peak_flops(device, torch.bfloat16 if settings.bfloat16 else torch.float32)
    torch.manual_seed(settings.seed + rank)
    first, log = (0, []) if run is None else run.resume(model, optimizer, tokenizer)
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = settings.recompute
    bar = tqdm(total=settings.steps, initial=first, desc="training", disable=None if progress and not rank else True)
    model.train()
    for step in range(first, settings.steps):
        start = time.perf_counter()
        numbers = [(step * settings.accumulate + i) * world + rank for i in range(settings.accumulate)]
        batches = [to_device(batch(number), device) for number in numbers]
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        loss = train_step(model, batches, settings, optimizer, processes)
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {step}: try a lower learning rate, or clip gradients")
        seconds = time.perf_counter() - start
        tokens = sum(b.tokens for b in batches) * world
        utilisation = world * sum(count_model_flops(model, b.inputs) for b in batches) / seconds / peak_flops
        new = [dict(step=step + 1, loss=loss, rate=settings.lr_at(step), tokens=tokens, seconds=seconds)]
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s, MFU {utilisation:.0%}", refresh=False)
        bar.update()
        if evaluate is not None and is_due(step + 1, settings.evaluate_every, settings.steps):
            new.append(dict(step=step + 1) | run_evaluation(model, evaluate))
        log += new
        if run is None:
            continue
        run.record(new)
        if is_due(step + 1, settings.save_every, settings.steps):
            run.save(step + 1, model, optimizer, log, tokenizer)
    bar.close()
    model.eval()
    return log


def train_step(
    model: Model, batches: list[Batch], settings: Training, optimizer: torch.optim.Optimizer, processes: Processes
) -> float:
    """One step of the optimizer. Every target of all batches and processes has the same weight; without any, the loss
    is 0 and nothing changes."""
    total = float(sum(heads.count_targets(model.config, b.targets) for b in batches))
    total = float(processes.sum(torch.tensor(total)))
    optimizer.zero_grad()
    summed = torch.zeros(())
    device = next(model.parameters()).device
    for b in batches:  # those without targets too: other processes may wait for their gradients
        with torch.autocast(device.type, torch.bfloat16) if settings.bfloat16 else nullcontext():
            logits = model(**b.inputs)
        loss = heads.sum_losses(model.config, logits.float(), b.targets, settings.label_smoothing) / max(1, total)
        (loss * processes.size).backward()  # sharded gradients are means over the processes
        summed += loss.detach().cpu()
    if total:
        if settings.clip is not None:
            clip_gradients(model, settings.clip)
        optimizer.step()
    return float(processes.sum(summed))


def make_optimizer(model: Model, settings: Training) -> torch.optim.AdamW:
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), arXiv:1711.05101. Its fast paths
    accept no mixture of sharded and replicated parameters, so these are in separate groups."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for p in model.parameters():
        groups.setdefault((p.dim() >= 2, isinstance(p, DTensor)), []).append(p)
    decays = {True: settings.weight_decay, False: 0.0}
    options = [dict(params=params, weight_decay=decays[matrix]) for (matrix, _), params in groups.items()]
    return torch.optim.AdamW(options, lr=settings.learning_rate, betas=settings.betas)


def clip_gradients(model: Model, largest: float) -> None:
    """Scale all gradients to a joint norm of at most `largest`. PyTorch's function accepts no mixture of sharded
    ones."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(g) for g in gradients]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    scale = (largest / (norm + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale)


def run_evaluation(model: Model, evaluate: Callable[[Model], dict[str, float]]) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        result = evaluate(model)
    model.train()
    return result


def is_due(done: int, every: int | None, last: int) -> bool:
    return done == last or (every is not None and done % every == 0)


class Processes(NamedTuple):
    """The processes that share the batches: the rank of this one, and their number."""

    rank: int = 0
    size: int = 1
    group: distributed.ProcessGroup | None = None

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh | None) -> Processes:
        if not distributed.is_initialized():
            return cls()
        group = distributed.group.WORLD if mesh is None else mesh.get_group()
        return cls(distributed.get_rank(group), distributed.get_world_size(group), group)

    def sum(self, x: Tensor) -> Tensor:
        if self.group is not None:
            distributed.all_reduce(x, group=self.group)
        return x


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch({name: x.to(device) for name, x in batch.inputs.items()}, batch.targets.to(device))
