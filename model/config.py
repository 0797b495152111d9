"""The fields that tell one Transformer from another; names are Hugging Face's where a field means the same."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from .rope import Scaling

POSITIONS = ("rope", "learned", "sinusoidal", "relative")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class Pooling:
    """How a text becomes one vector, with the settings of sentence-transformers."""

    modes: tuple[str, ...] = ("mean",)  # keys of pooling.POOLINGS; the vectors of several are concatenated
    normalize: bool = True  # to unit vectors
    max_seq_length: int | None = None  # tokens that it was trained on; None: the context
    lower_case: bool = False
    prompts: tuple[tuple[str, str], ...] = ()  # names and texts; a prompt is put before a text
    default_prompt: str = ""  # the name of the one that is used where none is given


@dataclass(frozen=True)
class Config:
    family: str  # a module of model/families
    _: KW_ONLY

    # Shape
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    context: int  # the longest sequence that the positions were made for
    activation: str  # a key of layers.ACTIVATIONS
    gated: bool  # feed-forward down(activation(gate(x)) * up(x)) instead of down(activation(up(x)))
    bias: bool = True  # of the linear layers
    qkv_bias: bool = True  # of those for q, k and v, where the others have one
    k_bias: bool = True  # of that for k, where q and v have one
    shared_layers: bool = False  # one block, applied `layers` times
    float32_residual: bool = False  # of a float16 model: the residual stream, and what feed-forwards add to it

    # Experts (experts.py)
    experts: int = 0  # over 0: so many feed-forwards, of which each token uses `experts_per_token`
    experts_per_token: int = 0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    # Norms
    norm: str  # "layer" or "rms"
    norm_eps: float
    norm_first: bool  # pre-norm, with a final norm; else post-norm
    post_norms: bool = False  # with norm_first: the outputs of attention and feed-forward are normalised too
    norm_offset: float = 0.0  # added to every norm's weight
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys, before the rotation

    # Embeddings and positions
    positions: str  # one of POSITIONS
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None  # a class of rope.py
    relative_buckets: int = 0  # of positions "relative"; distances from relative_max_distance on share the last one
    relative_max_distance: int = 128
    token_types: int = 0  # rows of the segment embedding; 0 for none
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    embedding_width: int | None = None  # of the embeddings, where a projection to the width follows them

    # Attention
    causal: bool
    windows: tuple[int | None, ...] = (None,)  # layer i attends to the last windows[i % n] keys; None: to all
    scale: float | None = None  # of the scores; None: head_dim ** -0.5
    softcap: float | None = None  # of the scores
    sinks: bool = False  # a learned logit for each head in the softmax's denominator

    # Encoder-decoder
    decoder_layers: int = 0  # over 0: an encoder of `layers`, and a decoder of so many that attends to its output
    decoder_start_token: int = 0
    mel_bins: int = 0  # over 0: the encoder reads a spectrogram of so many bands
    audio_context: int = 0  # the longest sequence of its encoder, two frames each

    # Heads
    lm_head: bool = True
    lm_head_bias: bool = False
    tie_word_embeddings: bool = True  # the language-model head is the token embedding
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    task: str | None = None  # a key of heads.HEADS: an encoder's head, instead of the language-model head
    labels: tuple[str, ...] = ()  # of a task
    problem_type: str = PROBLEM_TYPES[0]  # of the task "classify": one of PROBLEM_TYPES
    pooling: Pooling | None = None  # of embeddings, where the checkpoint has it

    # Dropout, in training
    dropout: float = 0.0  # of embeddings and of each sublayer's output
    attention_dropout: float | None = None  # of attention's weights; None: as `dropout`
    activation_dropout: float = 0.0  # inside the feed-forward
    classifier_dropout: float = 0.0  # before the last layer of the heads for "classify" and "tag"

    def window(self, layer: int) -> tuple[int, None] | None:
        """The `window` of `flashattn.attention`."""
        keys = self.windows[layer % len(self.windows)]
        return None if keys is None else (keys - 1, None)

    @property
    def attention_dropout_p(self) -> float:
        """Dropout of attention's weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    def __post_init__(self):
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}")
        if any(keys is not None and keys < 1 for keys in self.windows) or not self.windows:
            raise ValueError(f"windows must be at least 1 key each, or None, got {self.windows}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads {self.heads}, got {self.kv_heads}")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.head_dim)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {self.positions!r}")
        for name in ("dropout", "attention_dropout", "activation_dropout", "classifier_dropout"):
            p = getattr(self, name)
            if p is not None and not 0 <= p < 1:
                raise ValueError(f"{name} must be in [0, 1), got {p}")
        if self.norm not in ("layer", "rms"):
            raise ValueError(f"norm must be 'layer' or 'rms', got {self.norm!r}")
