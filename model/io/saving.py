"""Checkpoints written as Hugging Face directories, whole or not at all."""

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
from .checkpoints import source_name
from .tokenizer import Tokenizer

HEADS = ("lm_head.", "cls.", "classifier.", "qa_outputs.", "predictions.", "final_logits_bias")  # outside of the prefix


@contextlib.contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `directory` only when all of it is written and on the disk. Where
    anything goes wrong, nothing is left; a process that is killed leaves a name that ends in .partial.

    Raises:
        FileExistsError: where `directory` is there.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} must not be there yet")
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
    """To the disk, before what comes next."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save(model: Model, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and the tokeniser into a new directory, for `load` and `transformers`.

    Raises:
        FileExistsError: where the directory is there.
        ValueError: where the family cannot hold what the config says.
    """
    with whole(Path(directory)) as partial:
        write(model.config, model.state_dict(), partial, tokenizer)


def write(config: Config, weights: dict[str, Tensor], directory: Path, tokenizer: Tokenizer | None) -> None:
    """The files of a checkpoint; weights: a model's state."""
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
        save_file(named(config, weights), directory / "model.safetensors", metadata={"format": "pt"})
    except Exception as error:  # the package has an exception of its own for a full disk
        raise OSError(f"{directory / 'model.safetensors'}: not written: {error}") from error


def named(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that `transformers` has for them."""
    family = FAMILIES[config.family]
    tensors = {source_name(name, family.NAMES): x for name, x in weights.items()}
    if hasattr(family, "restore"):
        tensors = family.restore(tensors, config)
    bare = not (config.lm_head or config.task)  # the inner model alone, whose names have no prefix
    prefix = "" if bare or not family.PREFIXES else family.PREFIXES[0]
    return {(name if name.startswith(HEADS) else prefix + name): x.contiguous() for name, x in tensors.items()}
