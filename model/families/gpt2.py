"""GPT-2: a pre-norm decoder, learned positions, tanh GELU, a head tied to the embedding.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..config import Config
from .fields import ACTIVATIONS, find_key, look_up, read, read_dropout, require, write

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
    "lm_head.weight": "lm_head.weight",
}
PREFIXES = ("transformer.",)
IGNORED = ("h.*.attn.bias", "h.*.attn.masked_bias")  # causal masks

FIELDS = dict(
    vocab_size="vocab_size", width="n_embd", layers="n_layer", heads="n_head", kv_heads="n_head", ffn_width="n_inner",
    context="n_positions", norm_eps="layer_norm_epsilon", tie_word_embeddings="tie_word_embeddings",
)  # fmt: skip
DEFAULTS = dict(layer_norm_epsilon=1e-5, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, tie_word_embeddings=True)


def config(hf: dict) -> Config:
    require(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    hf = DEFAULTS | hf | {"n_inner": hf.get("n_inner") or 4 * hf["n_embd"]}
    require(hf, embd_pdrop=hf["resid_pdrop"])
    return Config(
        family="gpt2",
        head_dim=hf["n_embd"] // hf["n_head"],
        causal=True,
        norm="layer",
        norm_first=True,
        activation=look_up(hf, "activation_function", "gelu_new", ACTIVATIONS),
        gated=False,
        positions="learned",
        **read_dropout(hf["resid_pdrop"], hf["attn_pdrop"]),
        **read(hf, FIELDS),
    )


def to_hf(config: Config) -> dict:
    if config.windows != (None,):
        raise ValueError("windows must be (None,) in a gpt2; with windows it is a gpt_neo")
    activation, p = find_key(config.activation, ACTIVATIONS), config.dropout
    return write(
        config, FIELDS, "GPT2LMHeadModel", activation_function=activation, resid_pdrop=p, embd_pdrop=p,
        attn_pdrop=config.attention_dropout_p,
    )  # fmt: skip


# GPT-3: layers, width, heads, head_dim. Brown et al., "Language Models are Few-Shot Learners" (2020), table 2.1; the
# 13B model's width, 5,140 there, is the 5,120 that its heads make.
GPT3 = {
    "small": (12, 768, 12, 64), "medium": (24, 1024, 16, 64), "large": (24, 1536, 16, 96), "xl": (24, 2048, 24, 128),
    "2.7b": (32, 2560, 32, 80), "6.7b": (32, 4096, 32, 128), "13b": (40, 5120, 40, 128), "175b": (96, 12288, 96, 128),
}  # fmt: skip


def gpt3(size: str, window: int = 256) -> Config:
    """The config of a GPT-3: a GPT-2 in which every other layer has a window, whose size the paper does not give.

    >>> gpt3("small").windows
    (None, 256)
    """
    if size not in GPT3:
        raise ValueError(f"size must be one of {', '.join(GPT3)}, got {size!r}")
    layers, width, heads, head_dim = GPT3[size]
    hf = dict(vocab_size=50257, n_embd=width, n_layer=layers, n_head=heads, n_positions=2048)
    return replace(config(hf), head_dim=head_dim, windows=(None, window), dropout=0.0)


def prepare(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """GPT-2 stores its linear weights transposed (Conv1D), and q, k and v fused."""
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


def restore(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The reverse of `prepare`."""
    result = {name: x for name, x in tensors.items() if ".attn.q." not in name}
    for name in tensors.keys() - result.keys():
        joined = torch.cat([tensors[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"])
        result[name.replace(".attn.q.", ".attn.c_attn.")] = joined
    result = {name: x for name, x in result.items() if ".attn.k." not in name and ".attn.v." not in name}
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: x.t() if name.endswith(transposed) else x for name, x in result.items()}
