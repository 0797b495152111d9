"""Checkpoints: a Hugging Face directory (config.json with safetensors or .bin), or a GGUF file."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import Config, Pooling
from ..encoder_decoder import EncoderDecoder, Model
from ..families import FAMILIES
from ..transformer import Transformer
from . import ctranslate2_file, gguf_file, onnx_file, sentence_files
from .packages import LACKING, MODELS, locate
from .tokenizer import Tokenizer

WEIGHTS = (  # files of a directory; the first that exists
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
    "onnx/model_q4.onnx",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated or not supported. Names the file."""


def load(
    path: str | Path, dtype: torch.dtype = torch.float32, progress: bool = False
) -> tuple[Model, Tokenizer | None]:
    """The model of a checkpoint, in evaluation mode on the CPU, and its tokeniser (None without a tokenizer.json).

    Args:
        path: a known name (packages.py); a directory with config.json and model.safetensors or pytorch_model.bin
            (or the shards of one), or onnx/model_q4.onnx, or with a CTranslate2 model.bin; or a .gguf file. The weights
            of gpt-oss may be in MXFP4.
        dtype: of the weights. Quantised GGUF weights are dequantised to it.
        progress: show a progress bar on standard error.

    Raises:
        CheckpointError: naming the file, the tensor and what was expected.
    """
    lacking = LACKING.get(str(path), {})
    path = locate(str(path))
    if not path.exists():
        known = f"nor one of the names {', '.join(sorted(MODELS))}"
        raise CheckpointError(f"{path}: no such file or directory, {known}; nothing is downloaded")
    if path.suffix == ".gguf":
        try:
            hf, tensors, tokenizer = gguf_file.read(path, progress)
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: {error}") from None
    elif (path / "model.bin").exists():
        try:
            hf, tensors = ctranslate2_file.read(path)
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{path / 'model.bin'}: {error}") from None
        tokenizer = Tokenizer.from_directory(path)
    elif path.is_dir():
        hf = lacking | read_json(path / "config.json")
        tensors, tokenizer = read_tensors(path), Tokenizer.from_directory(path)
    else:
        raise CheckpointError(f"{path}: a checkpoint is a directory with config.json, or a .gguf file")
    config = replace(read_config(hf, path), pooling=read_pooling(path))
    if tokenizer is not None and tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokeniser has {tokenizer.size} tokens, the model an embedding of {config.vocab_size}"
        )
    architecture = (hf.get("architectures") or [""])[0]
    if is_bare(architecture) and not config.tie_word_embeddings and "lm_head.weight" not in tensors:
        config = replace(config, lm_head=False)
    try:
        return build_model(config, tensors, path, dtype, progress), tokenizer
    except CheckpointError as error:
        own = FAMILIES[config.family].to_hf(config)["architectures"][0]
        if architecture in ("", own):
            raise
        raise CheckpointError(f"{error} (the checkpoint is a {architecture}, read as a {own})") from None


def is_bare(architecture: str) -> bool:
    """Whether transformers has this name for a model without a head; GPT2LMHeadModel and MarianMTModel have one."""
    return architecture.endswith("Model") and not architecture.endswith(("HeadModel", "MTModel"))


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got a {type(content).__name__}")
    return content


def read_config(hf: dict, path: Path) -> Config:
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"{path}: model_type must be one of {', '.join(FAMILIES)}, got {family!r}")
    quantised = hf.get("quantization_config") or hf.get("compression_config")
    method = (quantised or {}).get("quant_method")
    if quantised and not (family == "gpt_oss" and method == "mxfp4"):
        named = repr(method) if method else "an unnamed method"
        raise CheckpointError(f"{path}: weights quantised by {named} are not known here, only gpt-oss in MXFP4")
    try:
        return FAMILIES[family].config(hf)
    except KeyError as error:
        raise CheckpointError(f"{path}: config.json has no usable {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_pooling(path: Path) -> Pooling | None:
    try:
        return sentence_files.read(path)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory, by their names there."""
    found = next((directory / name for name in WEIGHTS if (directory / name).exists()), None)
    if found is None:
        raise CheckpointError(
            f"{directory}: has neither model.safetensors nor pytorch_model.bin nor onnx/model_q4.onnx"
        )
    files = [found]
    if found.suffix == ".json":
        places = read_json(found).get("weight_map")
        if not places:
            raise CheckpointError(f"{found}: has no weight_map, which says where each tensor is")
        files = [directory / name for name in sorted(set(places.values()))]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_file(file)
    return tensors


def read_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.exists():
        raise CheckpointError(f"{file}: no such file, but the index names it")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.suffix == ".onnx":
            return onnx_file.read(file)
        return torch.load(file, map_location="cpu", weights_only=True)  # never runs code from the file
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not a checkpoint: {error}") from None
    except Exception as error:  # unpickling raises anything, depending on the bytes
        raise CheckpointError(f"{file}: refused: {str(error).splitlines()[0]}") from None


def find_checkpoint_name(name: str, names: dict[str, str]) -> str:
    """The checkpoint's name of our parameter: its entry in `names`, with or without the last part."""
    parts = name.split(".")
    layer = next((p for p in parts if p.isdigit()), None)
    generic = name if layer is None else name.replace(f".{layer}.", ".{i}.", 1)
    stem, _, last = generic.rpartition(".")
    found = names[generic] if generic in names else f"{names[stem]}.{last}"
    return found.replace("{i}", layer or "")


def build_model(config: Config, tensors: dict[str, Tensor], path: Path, dtype: torch.dtype, progress: bool) -> Model:
    """A model with the tensors of a checkpoint: none may be missing, of another shape, or left over."""
    family = FAMILIES[config.family]
    tensors = {strip_prefixes(name, family.PREFIXES): x for name, x in tensors.items()}
    tensors = {name: x for name, x in tensors.items() if not any(fnmatch(name, p) for p in family.IGNORED)}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:  # stored twice by some checkpoints
        embedding = tensors.get(find_checkpoint_name("token_embedding.weight", family.NAMES))
        if embedding is None or not torch.equal(tensors.pop("lm_head.weight"), embedding):
            raise CheckpointError(f"{path}: the config ties the head to the embedding, but lm_head.weight is another")
    if hasattr(family, "prepare"):
        try:
            tensors = family.prepare(tensors, config)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
    with torch.device("meta"):
        model = EncoderDecoder(config) if config.decoder_layers else Transformer(config)
    state = {}
    for name, parameter in tqdm(model.state_dict().items(), "loading", disable=None if progress else True, leave=False):
        source = find_checkpoint_name(name, family.NAMES)
        if source not in tensors:
            raise CheckpointError(f"{path}: tensor {source} is missing")
        x = tensors.pop(source)
        if x.shape != parameter.shape:
            raise CheckpointError(f"{path}: tensor {source} must be {tuple(parameter.shape)}, got {tuple(x.shape)}")
        state[name] = x.to(dtype).contiguous()
    if tensors:
        raise CheckpointError(f"{path}: tensors that a {config.family} does not have: {', '.join(sorted(tensors)[:5])}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def strip_prefixes(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name
