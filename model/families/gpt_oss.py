"""gpt-oss: a Llama with attention sinks, a window in every other layer, and experts.

OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025), arXiv:2508.10925; sinks: Xiao et al. (2023), arXiv:2309.17453.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..config import Config
from . import llama
from .fields import require
from .llama import IGNORED, PREFIXES

NAMES = {name: theirs for name, theirs in llama.NAMES.items() if "feed_forward." not in name} | {
    "blocks.{i}.attention.sinks": "layers.{i}.self_attn.sinks",
    "blocks.{i}.feed_forward.router": "layers.{i}.mlp.router",
    "blocks.{i}.feed_forward.gate_up": "layers.{i}.mlp.experts.gate_up_proj",
    "blocks.{i}.feed_forward.gate_up_bias": "layers.{i}.mlp.experts.gate_up_proj_bias",
    "blocks.{i}.feed_forward.down": "layers.{i}.mlp.experts.down_proj",
    "blocks.{i}.feed_forward.down_bias": "layers.{i}.mlp.experts.down_proj_bias",
}

DEFAULTS = dict(head_dim=64, num_key_value_heads=8, sliding_window=128, rope_theta=150000.0)
DEFAULT_ROPE = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096,
)  # fmt: skip
# The values of MXFP4's four bits: a sign, two bits of exponent, one of mantissa.
FOUR_BITS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FOUR_BITS += [-x for x in FOUR_BITS]

__all__ = ["IGNORED", "NAMES", "PREFIXES", "config", "prepare", "to_hf"]


def config(hf: dict) -> Config:
    hf = DEFAULTS | hf
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        hf["rope_parameters"] = DEFAULT_ROPE
    require(hf, output_router_logits=False)
    types = hf.get("layer_types") or ["sliding_attention", "full_attention"] * hf["num_hidden_layers"]
    bias = hf.get("attention_bias", True)
    return replace(
        llama.config(hf | {"attention_bias": False}),
        family="gpt_oss",
        bias=bias,
        sinks=True,
        windows=llama.read_windows(hf | {"layer_types": types[: hf["num_hidden_layers"]]}),
        experts=hf["num_local_experts"],
        experts_per_token=hf.get("num_experts_per_tok", 4),
        swiglu_alpha=hf.get("swiglu_alpha", 1.702),
        swiglu_limit=hf.get("swiglu_limit", 7.0),
    )


def to_hf(config: Config) -> dict:
    return llama.to_hf(
        config, "GptOssForCausalLM", attention_bias=config.bias, num_local_experts=config.experts,
        num_experts_per_tok=config.experts_per_token, swiglu_alpha=config.swiglu_alpha,
        swiglu_limit=config.swiglu_limit, **llama.write_windows(config),
    )  # fmt: skip


def prepare(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Unpack MXFP4 matrices of experts, stored as blocks and scales, to bfloat16, which represents them exactly."""
    packed = [name.removesuffix("_blocks") for name in tensors if name.endswith("_proj_blocks")]
    for name in packed:
        if f"{name}_scales" not in tensors:
            raise ValueError(f"tensor {name}_scales is missing")
        tensors[name] = unpack_mxfp4(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales"))
    return tensors


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """(experts, in, out) from blocks (experts, out, in / 32, 16) of bytes, the first of two values in the low bits, and
    exponents of two (experts, out, in / 32) with a bias of 127.

    Open Compute Project, "OCP Microscaling Formats (MX) Specification" (2023).
    """
    table = torch.tensor(FOUR_BITS, dtype=torch.bfloat16)
    numbers = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1).flatten(-2)
    scaled = torch.ldexp(numbers, scales[..., None].int() - 127).to(torch.bfloat16)
    return scaled.flatten(-2).transpose(1, 2)
