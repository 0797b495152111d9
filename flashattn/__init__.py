"""Exact fused softmax attention and LayerNorm/RMSNorm: Triton GPU kernels, a native CPU engine and a reference,
with one call for each. `python -m flashattn` prints what is usable here."""

from . import flops  # noqa: F401  (which registers what the operators count as)
from .attention import attention, attention_varlen, decode
from .auxiliary import AuxOutput, AuxRequest
from .backends import use_backend
from .cache import KVCache, PagedKVCache, Rotary
from .linear import linear
from .modules import LayerNorm, MultiheadAttention, RMSNorm
from .norm import layer_norm, rms_norm
from .version import __version__

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "KVCache",
    "LayerNorm",
    "MultiheadAttention",
    "PagedKVCache",
    "RMSNorm",
    "Rotary",
    "__version__",
    "attention",
    "attention_varlen",
    "decode",
    "layer_norm",
    "linear",
    "rms_norm",
    "use_backend",
]
