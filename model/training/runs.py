"""The directory of a training run: checkpoints, a log (JSON lines), a plot of the losses."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..encoder_decoder import Model
from ..io import saving
from ..io.checkpoints import CheckpointError
from ..io.tokenizer import Tokenizer

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of a sharded model too


class Run:
    """The last `keep` checkpoints `step-000100`, each a Hugging Face directory with the optimizer's state in
    training.pt. Each is written atomically, before older ones are deleted. log.jsonl grows by a line a step; a run that
    resumes cuts it to its checkpoint. loss.png is of the last checkpoint."""

    def __init__(self, directory: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory, self.keep = Path(directory), keep

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        found = self.directory.glob("step-*") if self.directory.exists() else []
        return sorted(path for path in found if re.fullmatch(r"step-\d+", path.name))

    def save(
        self, step: int, model: Model, optimizer: torch.optim.Optimizer, log: list[dict], tokenizer: Tokenizer | None
    ) -> None:
        weights, state = get_state_dict(model, optimizer, options=WHOLE)
        states = gather_all(torch.get_rng_state())
        if distributed.is_initialized() and distributed.get_rank() > 0:
            return
        with saving.atomic_directory(self.directory / f"step-{step:06d}") as partial:
            saving.write(model.config, weights, partial, tokenizer)
            kept = dict(
                step=step, config=asdict(model.config), weights=weights, optimizer=state, random=states, log=log
            )
            torch.save(kept, partial / "training.pt")
        for old in self.checkpoints[: -self.keep]:  # renamed first: half-deleted, it would look like a checkpoint
            os.rename(old, old.with_name(f"{old.name}.partial"))
        for left in self.directory.glob("step-*.partial"):
            shutil.rmtree(left)
        plot(log, self.directory / "loss.png")

    def record(self, entries: list[dict], mode: str = "a") -> None:
        """Append to log.jsonl; mode "w" replaces it."""
        if distributed.is_initialized() and distributed.get_rank() > 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / "log.jsonl", mode, encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def resume(
        self, model: Model, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer | None
    ) -> tuple[int, list[dict]]:
        """Load the last checkpoint into model, optimizer and PyTorch's generator. Returns its step, and the log up to
        it.

        Raises:
            CheckpointError: if it is of another model or tokeniser, or cannot be read.
        """
        step, log = self.restore(model, optimizer, tokenizer) if self.checkpoints else (0, [])
        if self.directory.exists():  # else the first step creates it
            self.record(log, "w")
        return step, log

    def restore(
        self, model: Model, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer | None
    ) -> tuple[int, list[dict]]:
        file = self.checkpoints[-1] / "training.pt"
        try:
            kept = torch.load(file, map_location="cpu", weights_only=True)
            check_same(file.parent, kept.get("config", {}), asdict(model.config), tokenizer)
            set_state_dict(
                model, optimizer, model_state_dict=kept["weights"], optim_state_dict=kept["optimizer"], options=WHOLE
            )
        except CheckpointError:
            raise
        except Exception as error:  # what unpickling and loading raise depends on the bytes
            message = f"{file}: not a state of this model (delete its directory to resume from the one before)"
            raise CheckpointError(f"{message}: {' '.join(str(error).split())[:300]}") from None
        states = kept["random"]
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        if rank < len(states):  # with more processes than before, a new one keeps its seed
            torch.set_rng_state(states[rank])
        return kept["step"], kept["log"]


def check_same(checkpoint: Path, begun: dict, here: dict, tokenizer: Tokenizer | None) -> None:
    """Raises CheckpointError if a run was begun with another config or tokeniser. Dropout may differ."""
    names = [name for name in begun if begun[name] != here.get(name) and not name.endswith("dropout")]
    if names:
        differences = ", ".join(f"{name} {begun[name]} (here {here.get(name)})" for name in names)
        raise CheckpointError(
            f"{checkpoint}: begun with {differences}; continue with the same, or in another directory"
        )
    file = checkpoint / "tokenizer.json"
    if tokenizer is None or not file.exists():
        return
    if json.loads(file.read_text(encoding="utf-8")) != json.loads(tokenizer.backend.to_str()):
        message = "begun with another tokeniser; continue with the same (of the same texts), or in another directory"
        raise CheckpointError(f"{checkpoint}: {message}")


def gather_all(x: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all processes."""
    if not distributed.is_initialized():
        return [x]
    result = [None] * distributed.get_world_size()
    distributed.all_gather_object(result, x)
    return result


def plot(log: list[dict], file: Path) -> None:
    """The losses and the results of evaluations, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    names = sorted({name for entry in log if "loss" not in entry for name in entry} - {"step"})
    figure, axes = pyplot.subplots(1 + len(names), 1, figsize=(7, 3 * (1 + len(names))), sharex=True, squeeze=False)
    axes[0, 0].plot(*zip(*losses, strict=True), linewidth=0.6, color="tab:blue")
    axes[0, 0].set(ylabel="training loss")
    for axis, name in zip(axes[1:, 0], names, strict=True):
        points = [(entry["step"], entry[name]) for entry in log if name in entry and "loss" not in entry]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color="tab:orange")
        axis.set(ylabel=name)
    axes[-1, 0].set(xlabel="step")
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file.with_suffix(".partial.png"), dpi=110)
    pyplot.close(figure)
    os.replace(file.with_suffix(".partial.png"), file)
