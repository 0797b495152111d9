"""Text generation: a small Llama learns to write like Jane Austen, from scratch.

The last tenth of each novel is held out. Bits per byte on it stand beside those of 5-gram models with modified
Kneser-Ney smoothing, of bytes and of the same tokens, made from the same text.

    python -m model.tasks.text --out out/text
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

from .. import Config, Transformer, generate
from ..layers import initialise
from ..runs import Run
from ..tokenizer import Tokenizer
from ..train import Training, train
from .common import arguments, command, windows
from .data import novels
from .ngram import KneserNey

VOCAB, CONTEXT, BATCH = 2048, 256, 8
PROMPT = "It was a truth"


def split(share: float = 0.9) -> tuple[str, str]:
    """The text to learn from, and the end of each novel, held out."""
    texts = novels().values()
    learned = (text[: int(len(text) * share)] for text in texts)
    return "\n".join(learned), "\n".join(text[int(len(text) * share) :] for text in texts)


def make_tokenizer(text: str, size: int = VOCAB, special: tuple[str, ...] = (), stop: str | None = None) -> Tokenizer:
    """Byte-level BPE, behind the special tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    backend.train_from_iterator(text.split("\n"), trainer)
    return Tokenizer(backend, stop=[] if stop is None else [backend.token_to_id(stop)])


def make_model(vocab_size: int, layers: int, width: int, seed: int) -> Transformer:
    config = Config(
        "llama", vocab_size=vocab_size, width=width, layers=layers, heads=width // 64, kv_heads=width // 64,
        head_dim=64, hidden=width * 8 // 3 // 32 * 32, context=CONTEXT, causal=True, norm="rms", norm_eps=1e-5,
        norm_first=True, activation="silu", gated=True, positions="rope", bias=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Transformer(config)
    initialise(model, layers)
    return model


@torch.no_grad()
def bits(model: Transformer, tokens: torch.Tensor) -> float:
    """Of all tokens but the first: each window begins in the middle of the one before, so that every token but those of
    the first half sees at least half a context."""
    half, total = CONTEXT // 2, 0.0
    for first in range(0, len(tokens) - 1, half):
        piece = tokens[max(0, first - half) : first + half + 1]
        new = min(half, len(tokens) - 1 - first)
        logits = model(piece[None, :-1])[0, -new:].float()
        total += F.cross_entropy(logits, piece[-new:], reduction="sum").item()
    return total / math.log(2)


def run(steps: int, seed: int = 0, out: str | None = None, layers: int = 4, width: int = 256) -> dict:
    learned, held_out = split()
    tokenizer = make_tokenizer(learned)
    tokens, held = (torch.tensor(tokenizer.encode(text)) for text in (learned, held_out))
    size = len(held_out.encode())
    some = held[:20_000]  # enough for the plot
    size_of_some = len(tokenizer.decode(some.tolist()).encode())
    model = make_model(tokenizer.size, layers, width, seed)
    settings = Training(
        steps, learning_rate=2e-3, warmup=min(100, steps // 10), evaluate_every=500, save_every=500, seed=seed
    )
    log = train(
        model,
        lambda i: windows(tokens, i, BATCH, CONTEXT, seed),
        settings,
        Run(out) if out else None,
        evaluate=lambda model: {"bits per byte": bits(model, some) / size_of_some},
        tokenizer=tokenizer,
    )
    ours = bits(model, held) / size
    model_of_bytes = KneserNey(np.frombuffer(learned.encode(), np.uint8).astype(np.int64), 256)
    model_of_tokens = KneserNey(tokens.numpy(), tokenizer.size)
    of_bytes = model_of_bytes.probabilities(np.frombuffer(held_out.encode(), np.uint8).astype(np.int64))
    of_tokens = model_of_tokens.probabilities(held.numpy())
    written = generate(model, [tokenizer.encode(PROMPT)], 80, temperature=0.8, top_p=0.95, seed=seed)[0]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": sum(entry.get("tokens", 0) for entry in log),
        "minutes": sum(entry.get("seconds", 0) for entry in log) / 60,
        "bits_per_byte": ours,
        "five_grams_of_tokens": float(-np.log2(of_tokens).sum()) / size,
        "five_grams_of_bytes": float(-np.log2(of_bytes).sum()) / size,
        "sample": PROMPT + tokenizer.decode(written),
    }


def show(result: dict) -> None:
    print(
        f"a Llama of {result['parameters']:,} parameters, {result['tokens']:,} tokens of six novels in "
        f"{result['minutes']:.1f} minutes\n"
    )
    print("bits per byte of the last tenth of each novel")
    print(f"  Llama                          {result['bits_per_byte']:.3f}")
    print(f"  5-grams of the same tokens     {result['five_grams_of_tokens']:.3f}")
    print(f"  5-grams of bytes               {result['five_grams_of_bytes']:.3f}")
    print(f"\n{result['sample']}")


if __name__ == "__main__":
    sys.exit(command(arguments(__doc__.split("\n")[0], steps=2000), run, show))
