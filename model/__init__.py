"""A minimal Transformer on flashattn: one block class, a config dataclass, one short file a family."""

from .beam import beam_search
from .checkpoints import load
from .config import Config
from .encoder_decoder import EncoderDecoder
from .generate import generate
from .saving import save
from .transformer import Transformer

__all__ = ["Config", "EncoderDecoder", "Transformer", "beam_search", "generate", "load", "save"]
