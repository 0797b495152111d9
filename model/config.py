"""Everything that tells one Transformer from another."""

from __future__ import annotations

from dataclasses import dataclass

from .rope import Scaling


@dataclass(frozen=True)
class Pooling:
    """How a vector is made of a text, as sentence-transformers has it."""

    modes: tuple[str, ...] = ("mean",)  # keys of pooling.POOLINGS; several stand side by side
    normalize: bool = True  # to unit vectors
    longest: int | None = None  # tokens that it was trained on; None: the context
    lower: bool = False  # texts in lower case
    prompts: tuple[tuple[str, str], ...] = ()  # names and texts; a prompt stands in front of a text
    prompt: str = ""  # the name of the one that stands there where none is asked for


POSITIONS = ("rope", "learned", "sinusoidal", "relative")


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
    positions: str  # one of POSITIONS
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None  # one of model/rope.py
    bias: bool = True  # of the linear layers
    qkv_bias: bool = True  # of those for q, k and v, where the others have one
    k_bias: bool = True  # of that for k, where q and v have one
    token_types: int = 0  # rows of the segment embedding; 0 for none
    embedding_norm: bool = False
    dropout: float = 0.0  # in training: of embeddings, of what each sublayer puts out
    attention_dropout: float | None = None  # of attention's weights; None: as `dropout`
    activation_dropout: float = 0.0  # inside the feed-forward
    head_dropout: float = 0.0  # in front of the layer that gives a text's classes, or a token's
    head: bool = True  # a language-model head
    tied: bool = True  # the head is the token embedding
    windows: tuple[int | None, ...] = (None,)  # layer i sees windows[i % n] keys, its own among them; None: all
    scale: float | None = None  # of the scores; None: head_dim ** -0.5
    softcap: float | None = None  # of the scores
    sinks: bool = False  # a learned logit for each head in the softmax's denominator
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys, in front of the rotation
    norms_behind: bool = False  # with norm_first: norms behind attention and feed-forward too
    norm_offset: float = 0.0  # added to every norm's weight
    float32_residual: bool = False  # of a float16 model: the residual stream, and what feed-forwards add to it
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    experts: int = 0  # over 0: so many feed-forwards, of which each token goes through a few (model/experts.py)
    active_experts: int = 0
    gate_alpha: float = 1.702  # of their gates
    gate_limit: float = 7.0
    shared_layers: bool = False  # one block, applied `layers` times
    embedding_width: int | None = None  # of the embeddings, with a projection to the width behind them
    task: str | None = None  # a key of heads.HEADS: what stands on an encoder instead of a language-model head
    labels: tuple[str, ...] = ()  # of a task
    decoder_layers: int = 0  # over 0: an encoder of `layers` and a decoder of so many that attends to it
    start_token: int = 0  # what a decoder begins with
    relative_buckets: int = 0  # of positions: "relative", and from which distance on all share the last one
    relative_distance: int = 128
    logit_scale: float = 1.0
    head_bias: bool = False
    mels: int = 0  # over 0: the encoder reads audio, so many bands of a spectrogram
    audio_context: int = 0  # longest sequence of its encoder, two frames each
    pooling: Pooling | None = None  # of embeddings, where the checkpoint says how
    problem: str = "single"  # of the task "classify": "single", "multi" (labels apart) or "regression"

    def window(self, layer: int) -> tuple[int, None] | None:
        """What `flashattn.attention` takes."""
        keys = self.windows[layer % len(self.windows)]
        return None if keys is None else (keys - 1, None)

    @property
    def attention_p(self) -> float:
        """Dropout of attention's weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    def __post_init__(self):
        if self.problem not in ("single", "multi", "regression"):
            raise ValueError(f"problem must be 'single', 'multi' or 'regression', got {self.problem!r}")
        if any(keys is not None and keys < 1 for keys in self.windows) or not self.windows:
            raise ValueError(f"windows must be at least 1 key each, or None, got {self.windows}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads {self.heads}, got {self.kv_heads}")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.head_dim)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {self.positions!r}")
        for name in ("dropout", "attention_dropout", "activation_dropout", "head_dropout"):
            p = getattr(self, name)
            if p is not None and not 0 <= p < 1:
                raise ValueError(f"{name} must be in [0, 1), got {p}")
        if self.norm not in ("layer", "rms"):
            raise ValueError(f"norm must be 'layer' or 'rms', got {self.norm!r}")
