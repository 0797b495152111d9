"""Config fields that are the same thing under another name, both ways."""

from __future__ import annotations

from ..config import Config

ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "silu": "silu",
    "swish": "silu", "relu": "relu",
}  # fmt: skip


def read(hf: dict, fields: dict[str, str]) -> dict:
    """Our fields from a config.json; fields: our name -> theirs."""
    return {ours: hf[theirs] for ours, theirs in fields.items()}


def write(config: Config, fields: dict[str, str], architecture: str, **more) -> dict:
    """A config.json of these fields and `more`. One of a task gets its own architecture and its labels."""
    hf = {theirs: getattr(config, ours) for ours, theirs in fields.items()}
    return dict(architectures=[architecture], model_type=config.family) | hf | more


def only(hf: dict, **wanted) -> None:
    """What a config.json may say that this library knows one value of."""
    for name, value in wanted.items():
        if hf.get(name, value) != value:
            raise ValueError(f"{name} must be {value}, got {hf[name]}")


def read_dropout(dropout: float, attention: float) -> dict:
    """Of the model, and of attention's weights, which may be another."""
    return dict(dropout=dropout, attention_dropout=None if attention == dropout else attention)


def one_of(hf: dict, name: str, default: str, known: dict) -> object:
    """What `known` has for the value of a name."""
    value = hf.get(name, default)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def name_of(value: object, known: dict) -> str:
    """The first name that `known` has for a value."""
    return next(name for name, meaning in known.items() if meaning == value)
