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

    How a text becomes a vector, the checkpoint says with its sentence-transformers modules, `model.config.pooling`; of
    one that says nothing it is the mean of the last hidden states, normalised. Where several poolings stand side by
    side, the width is a multiple of the model's.

    Args:
        prompt: stands in front of every text; None takes the checkpoint's own. Those it has by name are in
            `dict(model.config.pooling.prompts)`.
        normalize: to unit vectors; None does as the checkpoint says.
        truncate: cut texts to the tokens that the checkpoint was trained on, or to the context.

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
