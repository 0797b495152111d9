"""Fields of a config.json to those of a Config, and the reverse."""

from __future__ import annotations

from ..config import Config

ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "silu": "silu",
    "swish": "silu", "relu": "relu",
}  # fmt: skip


def read(hf: dict, fields: dict[str, str]) -> dict:
    """Our fields from a config.json. fields: our name -> theirs."""
    return {ours: hf[theirs] for ours, theirs in fields.items()}


def write(config: Config, fields: dict[str, str], architecture: str, **more) -> dict:
    """A config.json with these fields and `more`."""
    hf = {theirs: getattr(config, ours) for ours, theirs in fields.items()}
    return dict(architectures=[architecture], model_type=config.family) | hf | more


def require(hf: dict, **wanted) -> None:
    """Raises ValueError if a field of a config.json has another value than the only one supported."""
    for name, value in wanted.items():
        if hf.get(name, value) != value:
            raise ValueError(f"{name} must be {value}, got {hf[name]}")


def read_dropout(dropout: float, attention: float) -> dict:
    """Our fields of dropout, and of dropout of attention's weights if it differs."""
    return dict(dropout=dropout, attention_dropout=None if attention == dropout else attention)


def look_up(hf: dict, name: str, default: str, known: dict) -> object:
    """The entry in `known` of a field's value."""
    value = hf.get(name, default)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def find_key(value: object, known: dict) -> str:
    """The first key in `known` with this value."""
    return next(name for name, meaning in known.items() if meaning == value)
