"""A minimal Transformer on flashattn: one block class, a config dataclass, one short file a family."""

from .beam import beam_search
from .checkpoints import load
from .config import Config
from .encoder_decoder import EncoderDecoder
from .generate import generate
from .sampling import Sampling
from .saving import save
from .serving import Request, Server
from .speculative import speculate
from .transformer import Transformer

__all__ = [
    "Config", "EncoderDecoder", "Request", "Sampling", "Server", "Transformer", "beam_search", "generate", "load",
    "save", "speculate",
]  # fmt: skip
