"""T5: an encoder-decoder, relative position biases, RMSNorm, pre-norm, unscaled scores.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2019),
arXiv:1910.10683. v1.1 has a gated feed-forward and an untied head.
"""

from __future__ import annotations

from torch import Tensor

from ..config import Config
from .fields import find_key, look_up, read, require, write

PROJECTIONS = {"q": "q", "k": "k", "v": "v", "out": "o"}


def list_layer_names(feed_forward: int) -> dict[str, str]:
    """The names of one side's layers; feed_forward: its number there."""
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
LAYERS = {
    "encoder": list_layer_names(1),
    "decoder": list_layer_names(2) | CROSS | {"cross_attention_norm": "layer.1.layer_norm"},
}
NAMES = {"token_embedding.weight": "shared.weight", "lm_head.weight": "lm_head.weight"}
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
DENSE = {"relu": "relu", "gelu_tanh": "gelu_new", "silu": "silu"}  # its name in dense_act_fn


FIELDS = dict(
    vocab_size="vocab_size", width="d_model", layers="num_layers", heads="num_heads", kv_heads="num_heads",
    head_dim="d_kv", ffn_width="d_ff", context="n_positions", norm_eps="layer_norm_epsilon",
    tie_word_embeddings="tie_word_embeddings", decoder_layers="num_decoder_layers",
    decoder_start_token="decoder_start_token_id", dropout="dropout_rate",
    relative_buckets="relative_attention_num_buckets", relative_max_distance="relative_attention_max_distance",
)  # fmt: skip
DEFAULTS = dict(
    n_positions=512, layer_norm_epsilon=1e-6, tie_word_embeddings=True, decoder_start_token_id=0, dropout_rate=0.1,
    relative_attention_num_buckets=32, relative_attention_max_distance=128,
)  # fmt: skip


def config(hf: dict) -> Config:
    activation, gated = look_up(hf, "feed_forward_proj", "relu", FEED_FORWARD)
    require(hf, is_encoder_decoder=True, is_gated_act=gated, dense_act_fn=DENSE[activation])
    hf = DEFAULTS | hf
    hf["num_decoder_layers"] = hf.get("num_decoder_layers") or hf["num_layers"]
    scaled = hf.get("scale_decoder_outputs", hf["tie_word_embeddings"])
    return Config(
        family="t5",
        causal=False,
        norm="rms",
        norm_first=True,
        activation=activation,
        gated=gated,
        positions="relative",
        float32_residual=True,  # it was trained in bfloat16, whose range float16 lacks
        bias=False,
        scale=1.0,
        activation_dropout=hf["dropout_rate"],
        logit_scale=hf["d_model"] ** -0.5 if scaled else 1.0,
        **read(hf, FIELDS),
    )


def to_hf(config: Config) -> dict:
    proj = find_key((config.activation, config.gated), FEED_FORWARD)
    scaled = config.logit_scale != 1
    return write(
        config, FIELDS, "T5ForConditionalGeneration", feed_forward_proj=proj, scale_decoder_outputs=scaled,
        is_encoder_decoder=True,
    )  # fmt: skip


def prepare(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Without a gate, the matrix up is named wi."""
    return {name.replace("DenseReluDense.wi.", "DenseReluDense.wi_1."): x for name, x in tensors.items()}


def restore(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The reverse of `prepare`."""
    if config.gated:
        return tensors
    return {name.replace("DenseReluDense.wi_1.", "DenseReluDense.wi."): x for name, x in tensors.items()}
