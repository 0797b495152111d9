"""Everything that tells one Transformer from another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    family: str  # a module of model/families
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # width of the feed-forward
    context: int  # longest sequence the positions were made for
    causal: bool
    norm: str  # "layer" or "rms"
    norm_eps: float
    norm_first: bool  # pre-norm: norms in front of attention and feed-forward, and a last one; else behind each
    activation: str  # a key of layers.ACTIVATIONS
    gated: bool  # feed-forward down(activation(gate(x)) * up(x)) instead of down(activation(up(x)))
    positions: str  # "rope" or "learned"
    rope_theta: float = 10000.0
    bias: bool = True  # of the linear layers
    token_types: int = 0  # rows of the segment embedding; 0 for none
    embedding_norm: bool = False
    head: bool = True  # a language-model head
    tied: bool = True  # the head is the token embedding

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads {self.heads}, got {self.kv_heads}")
        if self.positions not in ("rope", "learned"):
            raise ValueError(f"positions must be 'rope' or 'learned', got {self.positions!r}")
        if self.norm not in ("layer", "rms"):
            raise ValueError(f"norm must be 'layer' or 'rms', got {self.norm!r}")
