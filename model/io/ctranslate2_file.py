"""A Whisper in a CTranslate2 directory: model.bin, config.json, tokenizer.json.

The binary format (version 6): names, shapes and bytes of the tensors in turn, then aliases. Queries, keys and values
are one matrix, and a key has a bias, of zeros.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
PLAIN = {
    "decoder/embeddings/weight": "decoder.embed_tokens.weight",
    "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
    "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
}
SUBLAYERS = {"self_attention": "self_attn", "attention": "encoder_attn"}


def read(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    """The fields of a config.json, and tensors under the names of a Hugging Face checkpoint, in float32.

    Raises:
        ValueError: for another format, another model, or a truncated file.
    """
    with (directory / "model.bin").open("rb") as file:
        try:
            arrays = read_arrays(file)
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise ValueError(f"truncated, or not a CTranslate2 file: {error}") from None
    tensors: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if array.ndim:
            tensors |= rename_tensor(name, torch.tensor(array.astype(np.float32)))
    layers = {side: 1 + max(int(n.split("_")[1].split("/")[0]) for n in arrays if n.startswith(f"{side}/layer_") and
              n[len(side) + 7].isdigit()) for side in ("encoder", "decoder")}  # fmt: skip
    embedding, positions = arrays["decoder/embeddings/weight"], arrays["decoder/position_encodings/encodings"]
    ids = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tokens = {t["content"]: t["id"] for t in json.loads((directory / "tokenizer.json").read_text())["added_tokens"]}
    heads, hidden = int(arrays["encoder/num_heads"]), len(arrays["encoder/layer_0/ffn/linear_0/bias"])
    hf = dict(
        model_type="whisper", vocab_size=len(embedding), d_model=embedding.shape[1], encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"], encoder_attention_heads=heads, decoder_attention_heads=heads,
        encoder_ffn_dim=hidden, decoder_ffn_dim=hidden, num_mel_bins=arrays["encoder/conv1/weight"].shape[1],
        max_source_positions=len(arrays["encoder/position_encodings/encodings"]), max_target_positions=len(positions),
        decoder_start_token_id=tokens["<|startoftranscript|>"], suppress_tokens=ids.get("suppress_ids"),
    )  # fmt: skip
    return hf, tensors


def read_arrays(file: BinaryIO) -> dict[str, np.ndarray]:
    def read_numbers(form: str) -> tuple[int, ...]:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))

    def read_text() -> str:
        (size,) = read_numbers("H")
        return file.read(size)[:-1].decode()

    (version,) = read_numbers("I")
    spec = read_text() if version >= 2 else ""
    if version != 6 or spec != "WhisperSpec":
        raise ValueError(f"version must be 6 and the model a WhisperSpec, got {version}, {spec!r}")
    _, count = read_numbers("II")
    arrays = {}
    for _ in range(count):
        name, (rank,) = read_text(), read_numbers("B")
        shape = read_numbers(f"{rank}I")
        (kind,) = read_numbers("B")
        (size,) = read_numbers("I")
        data = file.read(size)
        if len(data) < size:
            raise ValueError(f"truncated: {name} has {len(data)} of {size} bytes")
        arrays[name] = np.frombuffer(data, DTYPES[kind]).reshape(shape)
    return arrays


def rename_tensor(name: str, x: Tensor) -> dict[str, Tensor]:
    """One tensor under its names there; a fused one is split into two or three."""
    if name in PLAIN:
        return {PLAIN[name]: x}
    *where, last = name.replace("gamma", "weight").replace("beta", "bias").split("/")
    stem = ".".join(
        part.replace("layer_", "layers.") if part[:6] == "layer_" and part[6:].isdigit() else part for part in where
    )
    layer, _, rest = stem.rpartition(".ffn.") if ".ffn." in stem else stem.partition("\\0")
    if rest:
        return {f"{layer}.{dict(layer_norm='final_layer_norm', linear_0='fc1', linear_1='fc2')[rest]}.{last}": x}
    for ours, theirs in SUBLAYERS.items():
        layer, found, rest = stem.rpartition(f".{ours}.")
        if not found:
            continue
        if rest == "layer_norm":
            return {f"{layer}.{theirs}_layer_norm.{last}": x}
        parts = {
            ("self_attn", "linear_0"): "qkv",
            ("encoder_attn", "linear_0"): "q",
            ("encoder_attn", "linear_1"): "kv",
        }
        which = parts.get((theirs, rest))
        if which is None:
            return {f"{layer}.{theirs}.out_proj.{last}": x}
        pieces = dict(zip(which, x.chunk(len(which)), strict=True))
        if last == "bias":
            pieces.pop("k", None)
        return {f"{layer}.{theirs}.{letter}_proj.{last}": piece for letter, piece in pieces.items()}
    return {f"{stem}.{last}": x}
