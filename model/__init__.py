"""A minimal Transformer on flashattn: one block class, a config dataclass, one short file a family."""

from importlib import import_module

MODULES = {
    "Config": "config", "EncoderDecoder": "encoder_decoder", "Request": "inference.serving",
    "Sampling": "inference.sampling", "Server": "inference.serving", "Transformer": "transformer",
    "beam_search": "inference.beam", "generate": "inference.generate", "load": "io.checkpoints", "save": "io.saving",
    "speculate": "inference.speculative",
}  # fmt: skip
__all__ = list(MODULES)


def __getattr__(name: str):
    """Import a public name when it is first used (PEP 562): `python -m model --help` waits for no PyTorch."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
