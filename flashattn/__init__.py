"""Exact fused softmax attention and LayerNorm/RMSNorm: Triton GPU kernels, a native CPU engine and a reference,
behind one call each. `python -m flashattn` prints what is usable here."""

from . import decode_ops, flops, ops  # noqa: F401  (they register the operators, and what they count as)
from .attention import attention, attention_varlen
from .auxiliary import AuxOutput, AuxRequest
from .backends import use_backend
from .cache import KVCache, PagedKVCache
from .decode import Rotary, decode
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
