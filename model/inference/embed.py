"""Sentence embeddings (Reimers and Gurevych, "Sentence-BERT", 2019, arXiv:1908.10084)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import Pooling
from ..io.tokenizer import Tokenizer
from ..pooling import pool
from ..step import pack
from ..transformer import Transformer
from .texts import check_texts, encode_texts


@torch.inference_mode()
def embed(
    model: Transformer,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    *,
    prompt: str | None = None,
    normalize: bool | None = None,
    truncate: bool = False,
) -> Tensor:
    """Vectors (sentences, width) in the model's dtype, computed from packed sequences: nothing is padded.

    The pooling is the checkpoint's, `model.config.pooling`, read from its sentence-transformers modules; by default the
    normalised mean of the last hidden states. Several poolings are concatenated, to a multiple of the model's width.

    Args:
        prompt: put before every text; None: the checkpoint's default. Its prompts by name are in
            `dict(model.config.pooling.prompts)`.
        normalize: to unit vectors; None: as the checkpoint does.
        truncate: cut texts to the length that the checkpoint was trained on, or to the context.

    Raises:
        ValueError: naming the argument, before the model runs.
    """
    config = model.config
    if config.decoder_layers:
        raise ValueError(f"model must be one whose hidden states are those of one text, got a {config.family}")
    check_texts("sentences", sentences)
    if not sentences:
        raise ValueError("sentences must hold at least one, got none")
    pooling = config.pooling or Pooling()
    prompt = dict(pooling.prompts).get(pooling.default_prompt, "") if prompt is None else prompt
    texts = [f"{prompt}{text}" for text in sentences]
    texts = [text.lower() for text in texts] if pooling.lower_case else texts
    longest = min(pooling.max_seq_length or config.context, config.context) if truncate else None
    tokens, lengths = pack(encode_texts("sentences", texts, tokenizer, config, longest))
    vectors = pool(model.encode(tokens, lengths), lengths, pooling.modes)
    return F.normalize(vectors, dim=-1) if (pooling.normalize if normalize is None else normalize) else vectors
