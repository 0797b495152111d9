"""GPT-2: a decoder with its norms in front, learned positions, tanh GELU, a head tied to the embedding.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

from torch import Tensor

from ..config import Config

NAMES = {
    "token_embedding.weight": "wte.weight",
    "position_embedding.weight": "wpe.weight",
    "blocks.{i}.attention_norm": "h.{i}.ln_1",
    "blocks.{i}.attention.q": "h.{i}.attn.q",
    "blocks.{i}.attention.k": "h.{i}.attn.k",
    "blocks.{i}.attention.v": "h.{i}.attn.v",
    "blocks.{i}.attention.out": "h.{i}.attn.c_proj",
    "blocks.{i}.feed_forward_norm": "h.{i}.ln_2",
    "blocks.{i}.feed_forward.up": "h.{i}.mlp.c_fc",
    "blocks.{i}.feed_forward.down": "h.{i}.mlp.c_proj",
    "norm": "ln_f",
    "head.weight": "lm_head.weight",
}
PREFIXES = ("transformer.",)
IGNORED = ("h.*.attn.bias", "h.*.attn.masked_bias")  # causal masks

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def config(hf: dict) -> Config:
    for name, wanted in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if hf.get(name, wanted) != wanted:
            raise ValueError(f"{name} must be {wanted}, got {hf[name]}")
    return Config(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        width=hf["n_embd"],
        layers=hf["n_layer"],
        heads=hf["n_head"],
        kv_heads=hf["n_head"],
        head_dim=hf["n_embd"] // hf["n_head"],
        hidden=hf.get("n_inner") or 4 * hf["n_embd"],
        context=hf["n_positions"],
        causal=True,
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        norm_first=True,
        activation=ACTIVATIONS[hf.get("activation_function", "gelu_new")],
        gated=False,
        positions="learned",
        tied=hf.get("tie_word_embeddings", True),
    )


def prepare(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """GPT-2 stores its linear weights transposed (Conv1D), and q, k and v as one."""
    result = {}
    for name, x in tensors.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            x = x.t()
        if ".attn.c_attn." in name:
            for part, piece in zip("qkv", x.chunk(3, dim=0), strict=True):
                result[name.replace("c_attn", part)] = piece
        else:
            result[name] = x
    return result
