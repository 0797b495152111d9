"""Qwen3: a Llama with an RMSNorm over each head of its queries and keys.

Yang et al., "Qwen3 Technical Report" (2025), arXiv:2505.09388.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import Config
from . import llama
from .llama import IGNORED, PREFIXES

NAMES = llama.NAMES | {
    "blocks.{i}.attention.q_norm": "layers.{i}.self_attn.q_norm",
    "blocks.{i}.attention.k_norm": "layers.{i}.self_attn.k_norm",
}

DEFAULTS = dict(head_dim=128, num_key_value_heads=32, sliding_window=4096, max_window_layers=28)

__all__ = ["IGNORED", "NAMES", "PREFIXES", "config", "to_hf"]


def config(hf: dict) -> Config:
    hf = DEFAULTS | hf
    if not hf.get("use_sliding_window"):
        windows = (None,)
    elif hf.get("layer_types"):
        windows = llama.read_windows(hf)
    else:  # full attention below max_window_layers
        full = min(hf["max_window_layers"], hf["num_hidden_layers"])
        windows = (None,) * full + (hf["sliding_window"],) * (hf["num_hidden_layers"] - full)
    return replace(llama.config(hf), family="qwen3", qk_norm=True, windows=windows)


def to_hf(config: Config) -> dict:
    windows = llama.write_windows(config)
    return llama.to_hf(
        config,
        "Qwen3ForCausalLM",
        use_sliding_window=windows["sliding_window"] is not None,
        attention_bias=False,
        **windows,
    )
