"""Mistral: a Llama with sliding windows.

Jiang et al., "Mistral 7B" (2023), arXiv:2310.06825.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import Config
from . import llama
from .llama import IGNORED, NAMES, PREFIXES

DEFAULTS = dict(num_key_value_heads=8, sliding_window=4096)

__all__ = ["IGNORED", "NAMES", "PREFIXES", "config", "to_hf"]


def config(hf: dict) -> Config:
    hf = DEFAULTS | hf
    kinds = set(hf.get("layer_types") or ())
    if hf["sliding_window"] is not None and kinds - {"sliding_attention"}:  # transformers ignores these
        raise ValueError(f"layer_types of a mistral must be sliding_attention, got {', '.join(sorted(kinds))}")
    return replace(llama.config(hf), family="mistral", windows=llama.read_windows(hf))


def to_hf(config: Config) -> dict:
    windows = llama.write_windows(config)
    if len(set(windows["layer_types"])) > 1:
        raise ValueError(f"windows of a mistral must be one for all layers, got {config.windows}")
    return llama.to_hf(config, "MistralForCausalLM", sliding_window=windows["sliding_window"])
