"""T5: an encoder and a decoder, biases by distance, RMSNorm in front, scores that are not scaled.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2019),
arXiv:1910.10683. v1.1 has a gated feed-forward and a head of its own.
"""

from __future__ import annotations

from torch import Tensor

from ..config import Config

PROJECTIONS = {"q": "q", "k": "k", "v": "v", "out": "o"}


def layer_names(feed_forward: int) -> dict[str, str]:
    """Of one side's layers, whose feed-forward has this number."""
    names = {f"attention.{ours}": f"layer.0.SelfAttention.{theirs}" for ours, theirs in PROJECTIONS.items()}
    dense = f"layer.{feed_forward}.DenseReluDense"
    return names | {
        "attention_norm": "layer.0.layer_norm",
        "feed_forward_norm": f"layer.{feed_forward}.layer_norm",
        "feed_forward.gate": f"{dense}.wi_0",
        "feed_forward.up": f"{dense}.wi_1",
        "feed_forward.down": f"{dense}.wo",
    }


CROSS = {f"cross_attention.{ours}": f"layer.1.EncDecAttention.{theirs}" for ours, theirs in PROJECTIONS.items()}
LAYERS = {"encoder": layer_names(1), "decoder": layer_names(2) | CROSS | {"cross_attention_norm": "layer.1.layer_norm"}}
NAMES = {"token_embedding.weight": "shared.weight", "head.weight": "lm_head.weight"}
NAMES |= {f"{side}.norm.weight": f"{side}.final_layer_norm.weight" for side in LAYERS}
NAMES |= {
    f"{side}.relative.weight": f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in LAYERS
}
NAMES |= {
    f"{side}.blocks.{{i}}.{ours}": f"{side}.block.{{i}}.{theirs}"
    for side, names in LAYERS.items()
    for ours, theirs in names.items()
}
PREFIXES = ()
IGNORED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "*.EncDecAttention.relative_attention_bias.*")
FEED_FORWARD = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True), "gated-silu": ("silu", True)}


def config(hf: dict) -> Config:
    kind = hf.get("feed_forward_proj", "relu")
    if kind not in FEED_FORWARD:
        raise ValueError(f"feed_forward_proj must be one of {', '.join(FEED_FORWARD)}, got {kind!r}")
    activation, gated = FEED_FORWARD[kind]
    tied = hf.get("tie_word_embeddings", True)
    return Config(
        family="t5",
        vocab_size=hf["vocab_size"],
        width=hf["d_model"],
        layers=hf["num_layers"],
        heads=hf["num_heads"],
        kv_heads=hf["num_heads"],
        head_dim=hf["d_kv"],
        hidden=hf["d_ff"],
        context=hf.get("n_positions", 512),
        causal=False,
        norm="rms",
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        norm_first=True,
        activation=activation,
        gated=gated,
        positions="relative",
        bias=False,
        scale=1.0,
        tied=tied,
        decoder_layers=hf.get("num_decoder_layers") or hf["num_layers"],
        start_token=hf.get("decoder_start_token_id", 0),
        relative_buckets=hf.get("relative_attention_num_buckets", 32),
        relative_distance=hf.get("relative_attention_max_distance", 128),
        logit_scale=hf["d_model"] ** -0.5 if hf.get("scale_decoder_outputs", tied) else 1.0,
    )


def prepare(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Without a gate the one matrix up is called wi."""
    return {name.replace("DenseReluDense.wi.", "DenseReluDense.wi_1."): x for name, x in tensors.items()}
