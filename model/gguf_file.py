"""GGUF files, through the `gguf` package: configuration, dequantised tensors and tokeniser of a Llama."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

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


def read(path: Path, progress: bool = False) -> tuple[dict, dict[str, Tensor], Tokenizer]:
    """(configuration as a Hugging Face config.json would have it, tensors by their names there, tokeniser)."""
    import gguf

    reader = gguf.GGUFReader(path)
    hf = config(reader)
    tensors = {}
    for tensor in tqdm(reader.tensors, "dequantising", disable=None if progress else True, leave=False):
        x = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        name = rename(tensor.name)
        if "self_attn.q_proj" in name:
            x = unpermute(x, hf["num_attention_heads"])
        elif "self_attn.k_proj" in name:
            x = unpermute(x, hf["num_key_value_heads"])
        tensors[name] = x
    hf["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return hf, tensors, tokenizer(reader)


def field(reader, name: str, default=None):
    found = reader.get_field(name)
    if found is None:
        if default is None:
            raise KeyError(name)
        return default
    return found.contents()


def config(reader) -> dict:
    kind = field(reader, "general.architecture")
    if kind != "llama":
        raise ValueError(f"general.architecture must be 'llama', got {kind!r}")
    heads = field(reader, "llama.attention.head_count")
    return {
        "model_type": "llama",
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": field(reader, "llama.embedding_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv", heads),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": field(reader, "llama.context_length"),
        "rms_norm_eps": field(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field(reader, "llama.rope.freq_base", 10000.0),
    }


def rename(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    return f"{NAMES[parts[0]]}.{parts[1]}"


def unpermute(x: Tensor, heads: int) -> Tensor:
    """GGUF pairs neighbouring rows for the rotation of q and k; put row i of a head back beside row i + head_dim / 2,
    as `layers.rotate` pairs them."""
    return x.view(heads, -1, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)


def tokenizer(reader) -> Tokenizer:
    kind, pre = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model must be 'gpt2', got {kind!r}")
    tokens = field(reader, "tokenizer.ggml.tokens")
    types = field(reader, "tokenizer.ggml.token_type")
    return Tokenizer.from_bpe(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")],
        special=[token for token, kind in zip(tokens, types, strict=True) if kind == 3],  # 3: control
        stop=[tokens[field(reader, "tokenizer.ggml.eos_token_id")], "<|endoftext|>"],
        digits=pre == "smollm",
        chat_template=field(reader, "tokenizer.chat_template", ""),
    )
