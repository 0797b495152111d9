"""Configs of small decoders, with rotary and with learned positions."""

from model import Config

CONFIGS = {
    "rope": Config(
        "llama", vocab_size=50, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn_width=48, context=40,
        causal=True, norm="rms", norm_eps=1e-5, norm_first=True, activation="silu", gated=True, positions="rope",
        bias=False,
    ),
    "learned": Config(
        "gpt2", vocab_size=50, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, ffn_width=48, context=40,
        causal=True, norm="layer", norm_eps=1e-5, norm_first=True, activation="gelu_tanh", gated=False,
        positions="learned",
    ),
}  # fmt: skip
