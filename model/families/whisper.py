"""Whisper: an audio encoder and a text decoder, pre-norm, GELU.

Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022), arXiv:2212.04356.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import Config
from . import marian
from .fields import require

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
IGNORED = ("proj_out.weight",)  # a copy of the token embedding


def config(hf: dict) -> Config:
    require(hf, scale_embedding=False, apply_spec_augment=False)
    return replace(
        marian.config({"dropout": 0.0} | hf | {"max_position_embeddings": hf["max_target_positions"]}),
        family="whisper",
        norm_first=True,
        positions="learned",
        k_bias=False,
        lm_head_bias=False,
        mel_bins=hf.get("num_mel_bins", 80),
        audio_context=hf["max_source_positions"],
    )


def to_hf(config: Config) -> dict:
    hf = marian.to_hf(config)
    context = hf.pop("max_position_embeddings")
    return hf | dict(
        architectures=["WhisperForConditionalGeneration"], max_target_positions=context, num_mel_bins=config.mel_bins,
        max_source_positions=config.audio_context, pad_token_id=0,
    )  # fmt: skip
