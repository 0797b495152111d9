"""Whisper: an encoder that hears, and a decoder that writes what it heard; norms in front, GELU.

Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022), arXiv:2212.04356.
"""

from __future__ import annotations

from ..config import Config
from . import marian
from .fields import name_of, one_of, only, read, write

NAMES = {name: theirs for name, theirs in marian.NAMES.items() if ".blocks." in name} | {
    "token_embedding.weight": "decoder.embed_tokens.weight",
    "position_embedding.weight": "decoder.embed_positions.weight",
    "audio.positions.weight": "encoder.embed_positions.weight",
    "audio.conv1": "encoder.conv1",
    "audio.conv2": "encoder.conv2",
    "encoder.norm": "encoder.layer_norm",
    "decoder.norm": "decoder.layer_norm",
}
PREFIXES = ("model.",)
IGNORED = ("proj_out.weight",)  # the token embedding again
ACTIVATIONS = {"gelu": "gelu", "relu": "relu"}
FIELDS = dict(
    vocab_size="vocab_size", width="d_model", layers="encoder_layers", heads="encoder_attention_heads",
    kv_heads="encoder_attention_heads", hidden="encoder_ffn_dim", context="max_target_positions",
    decoder_layers="decoder_layers", start_token="decoder_start_token_id", dropout="dropout", mels="num_mel_bins",
    audio_context="max_source_positions",
)  # fmt: skip


def config(hf: dict) -> Config:
    only(hf, scale_embedding=False, tie_word_embeddings=True)
    only(hf, decoder_attention_heads=hf["encoder_attention_heads"], decoder_ffn_dim=hf["encoder_ffn_dim"])
    return Config(
        family="whisper",
        head_dim=hf["d_model"] // hf["encoder_attention_heads"],
        causal=False,
        norm="layer",
        norm_eps=1e-5,
        norm_first=True,
        activation=one_of(hf, "activation_function", "gelu", ACTIVATIONS),
        gated=False,
        positions="learned",
        k_bias=False,
        **read({"dropout": 0.0, "num_mel_bins": 80} | hf, FIELDS),
    )


def to_hf(config: Config) -> dict:
    return write(
        config, FIELDS, "WhisperForConditionalGeneration", decoder_attention_heads=config.heads,
        activation_function=name_of(config.activation, ACTIVATIONS), decoder_ffn_dim=config.hidden,
        is_encoder_decoder=True, pad_token_id=0,
    )  # fmt: skip
