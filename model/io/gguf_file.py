"""GGUF files, through the `gguf` package: configuration, dequantised tensors and tokeniser of a Llama."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..rope import compute_yarn_amplitude
from .gguf_tokenizer import read_tokenizer
from .tokenizer import Tokenizer

# GGUF's tensor names to Hugging Face's.
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# Fields of a Llama, after "llama.", that are read here.
HEADS = "attention.head_count"
READ_FIELDS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", HEADS, "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon", "attention.key_length", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip
IGNORED_FIELDS = (
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
)  # vocab_size: the embedding's shape has it
ROPE_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


def read(path: Path, progress: bool = False) -> tuple[dict, dict[str, Tensor], Tokenizer]:
    """The fields of a Hugging Face config.json, tensors by their names there, and the tokeniser.

    Raises:
        ValueError: for a file that is no GGUF, or naming a field that is not supported.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"truncated or not a GGUF file: {error}") from None
    if fields.get("split.count", 1) > 1:
        raise ValueError(f"split.count must be 1, got {fields['split.count']}: merge its files first")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    rope = {name: dequantise(stored.pop(f"{name}.weight", None)) for name in ROPE_TENSORS}
    hf, tokenizer = read_config(fields, rope), read_tokenizer(select(fields, "tokenizer."))
    tensors = {rename(name): tensor for name, tensor in stored.items()}
    for name in tqdm(tensors, "dequantising", disable=None if progress else True, leave=False):
        x = dequantise(tensors[name])
        if "self_attn.q_proj" in name:
            x = unpermute(x, hf["num_attention_heads"])
        elif "self_attn.k_proj" in name:
            x = unpermute(x, hf["num_key_value_heads"])
        tensors[name] = x
    hf["vocab_size"] = len(tensors.get("embed_tokens.weight", ()))
    hf["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return hf, tensors, tokenizer


def dequantise(tensor) -> Tensor | None:
    import gguf

    if tensor is None:
        return None
    try:
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    except NotImplementedError as error:
        raise ValueError(f"tensor {tensor.name} of type {tensor.tensor_type.name}: {error}") from None


def select(fields: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}


def read_config(fields: dict, rope_tensors: dict[str, Tensor | None]) -> dict:
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise ValueError(f"general.architecture must be 'llama', got {kind!r}")
    said = select(fields, "llama.")
    needed = (*READ_FIELDS[:5], "attention.layer_norm_rms_epsilon")
    missing = next((name for name in needed if name not in said), None)
    if missing is not None:
        raise ValueError(f"llama.{missing} is missing")
    several = next((name for name, value in said.items() if isinstance(value, list)), None)
    if several is not None:
        raise ValueError(f"llama.{several} must be one number for all layers, got {said[several]}")
    head_dim = said.get("attention.key_length", said["embedding_length"] // said[HEADS])
    only = {"rope.dimension_count": head_dim, "attention.value_length": head_dim, "attention.causal": True}
    only |= {"expert_count": 0, "expert_used_count": 0}
    for name, value in said.items():
        if name in only and value != only[name]:
            raise ValueError(f"llama.{name} must be {only[name]}, got {value}")
        if name not in only and name not in READ_FIELDS + IGNORED_FIELDS:
            raise ValueError(f"llama.{name} is not known here, and may change the results")
    return {
        "model_type": "llama",
        "hidden_size": said["embedding_length"],
        "num_hidden_layers": said["block_count"],
        "num_attention_heads": said[HEADS],
        "num_key_value_heads": said.get("attention.head_count_kv", said[HEADS]),
        "head_dim": head_dim,
        "intermediate_size": said["feed_forward_length"],
        "max_position_embeddings": said["context_length"],
        "rms_norm_eps": said["attention.layer_norm_rms_epsilon"],
        "rope_theta": said.get("rope.freq_base", 10000.0),
        "rope_parameters": read_rope(said, rope_tensors, head_dim),
    }


def read_rope(said: dict, tensors: dict[str, Tensor | None], head_dim: int) -> dict:
    """rope_parameters. A tensor divides each frequency, such as Llama 3.1's rope_freqs: a longrope, with the same
    factors for short and long sequences if the file has only one tensor."""
    scaling = select(said, "rope.scaling.")
    kind, factor = scaling.get("type", "linear"), scaling.get("factor") or said.get("rope.scale_linear") or 1.0
    original = scaling.get("original_context_length", said["context_length"])
    amplitude = scaling.get("attn_factor", 1.0)
    if kind not in ("none", "linear", "longrope", "yarn"):
        raise ValueError(f"llama.rope.scaling.type must be one of none, linear, longrope, yarn, got {kind!r}")
    if kind == "yarn":
        found = next((name for name, x in tensors.items() if x is not None), None)
        if found is not None:
            raise ValueError(f"tensor {found} and llama.rope.scaling.type yarn together are not known here")
        amplitude *= scaling.get("yarn_attn_factor", 1.0) * compute_yarn_amplitude(factor)
        bounds = {name: scaling[f"yarn_{name}"] for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in scaling}
        rope = dict(rope_type="yarn", factor=factor, attention_factor=amplitude, **bounds)
        return rope | dict(original_max_position_embeddings=original)
    if kind == "none":
        factor = 1.0
    names = ("rope_factors_short", "rope_factors_long") if kind == "longrope" else ("rope_freqs", "rope_freqs")
    divisors = [tensors[name] for name in names]
    if kind == "longrope" and None in divisors:
        raise ValueError(f"llama.rope.scaling.type longrope needs the tensors {' and '.join(names)}")
    if divisors[0] is None and amplitude == 1:
        return dict(rope_type="default") if factor == 1 else dict(rope_type="linear", factor=factor)
    short, long = ((torch.ones(head_dim // 2) if x is None else x) * factor for x in divisors)
    return dict(
        rope_type="longrope", factor=1.0, short_factor=short.tolist(), long_factor=long.tolist(),
        attention_factor=amplitude, original_max_position_embeddings=original,
    )  # fmt: skip


def rename(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight"""
    *layer, stem, last = name.split(".")
    if stem not in NAMES:
        raise ValueError(f"tensor {name} is none of a Llama's")
    return ".".join([*(["layers", layer[1]] if layer else []), NAMES[stem], last])


def unpermute(x: Tensor, heads: int) -> Tensor:
    """GGUF pairs adjacent rows of q and k for the rotation; move them apart, as `positions.rotate` pairs row i of a
    head with row i + head_dim / 2."""
    return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
