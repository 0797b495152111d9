"""Checks and encodes a list of texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..config import Config
from ..io.tokenizer import Tokenizer
from .generate import check_tokens


def check_texts(name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        shown = texts if len(texts) <= 40 else f"{texts[:40]}…"
        raise ValueError(f"{name} must be a list of texts, got the text {shown!r}")


def encode_texts(
    name: str, texts: Sequence[str], tokenizer: Tokenizer, config: Config, longest: int | None = None
) -> list[list[int]]:
    """The tokens of each text. longest: longer texts are cut, before the special token at the end.

    Raises:
        ValueError: naming a text without tokens, or with more than fit the context.
    """
    encode = tokenizer.encode if longest is None else partial(tokenizer.encode_truncated, longest=longest)
    encoded = [encode(text) for text in texts]
    check_tokens(name, encoded, config.vocab_size)
    for i, tokens in enumerate(encoded):
        if len(tokens) > config.context:
            raise ValueError(
                f"{name}[{i}] must fit the context of {config.context} tokens, got {len(tokens)}; truncate=True cuts it"
            )
    return encoded
