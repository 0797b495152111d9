"""Checkpoints, written atomically as Hugging Face directories."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..config import Config
from ..encoder_decoder import Model
from ..families import FAMILIES
from . import sentence_files
from .checkpoints import find_checkpoint_name
from .tokenizer import Tokenizer

# Names that have no prefix.
HEADS = ("lm_head.", "cls.", "classifier.", "qa_outputs.", "predictions.", "final_logits_bias")


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A directory to write to, renamed to `directory` when all of it is on the disk. On an error nothing is left; a
    killed process leaves a directory that ends in .partial.

    Raises:
        FileExistsError: if `directory` exists.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} must not exist yet")
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in [*partial.rglob("*"), partial]:
            sync(file)
        os.rename(partial, directory)
        sync(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save(model: Model, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and the tokeniser into a new directory, for `load` and `transformers`.

    Raises:
        FileExistsError: if the directory exists.
        ValueError: if the family has no config.json for this config.
    """
    with atomic_directory(Path(directory)) as partial:
        write(model.config, model.state_dict(), partial, tokenizer)


def write(config: Config, weights: dict[str, Tensor], directory: Path, tokenizer: Tokenizer | None) -> None:
    """The files of a checkpoint; weights: a model's state dict."""
    from safetensors.torch import save_file

    hf = FAMILIES[config.family].to_hf(config) | {"dtype": str(weights["token_embedding.weight"].dtype).split(".")[1]}
    if config.causal and not config.lm_head:  # a bare decoder
        hf["architectures"] = [re.sub("(ForCausalLM|LMHeadModel)$", "Model", hf["architectures"][0])]
    if tokenizer is not None:
        tokenizer.write(directory)
    if config.pooling is not None:
        sentence_files.write(config.pooling, config.width, directory)
    (directory / "config.json").write_text(json.dumps(hf, indent=2), encoding="utf-8")
    try:
        save_file(to_hf_names(config, weights), directory / "model.safetensors", metadata={"format": "pt"})
    except Exception as error:  # safetensors raises its own exception for a full disk
        raise OSError(f"{directory / 'model.safetensors'}: not written: {error}") from error


def to_hf_names(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under their names in `transformers`."""
    family = FAMILIES[config.family]
    tensors = {find_checkpoint_name(name, family.NAMES): x for name, x in weights.items()}
    if hasattr(family, "restore"):
        tensors = family.restore(tensors, config)
    bare = not (config.lm_head or config.task)  # the inner model, whose names have no prefix
    prefix = "" if bare or not family.PREFIXES else family.PREFIXES[0]
    return {(name if name.startswith(HEADS) else prefix + name): x.contiguous() for name, x in tensors.items()}
