"""Text generation: a small Llama learns to write like Jane Austen, from scratch.

The last tenth of each novel is held out. The baselines are 5-gram models with modified Kneser-Ney smoothing, of bytes
and of the same tokens, trained on the same text.

    python -m model.tasks.text --out out/text
"""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import torch

from ..inference.generate import generate
from ..io.tokenizer import Tokenizer
from ..training.batches import Batch, random_windows
from ..training.evaluate import measure_bits
from ..training.train import Training
from .common import count_training_minutes, make_parser, make_small_llama, run_command, train_task
from .datasets import read_novels
from .ngram import KneserNey

VOCAB, CONTEXT, BATCH = 2048, 256, 8
PROMPT = "It was a truth"


def split(share: float = 0.9) -> tuple[str, str]:
    """The text to learn from, and the end of each novel, held out."""
    texts = read_novels().values()
    learned = (text[: int(len(text) * share)] for text in texts)
    return "\n".join(learned), "\n".join(text[int(len(text) * share) :] for text in texts)


def run(steps: int, seed: int = 0, out: str | None = None, layers: int = 4, width: int = 256) -> dict:
    learned, held_out = split()
    tokenizer = Tokenizer.train(learned, VOCAB)
    tokens, held = (torch.tensor(tokenizer.encode(text)) for text in (learned, held_out))
    size = len(held_out.encode())
    some = held[:20_000]  # enough for the plot
    size_of_some = len(tokenizer.decode(some.tolist()).encode())
    model = make_small_llama(tokenizer.size, layers, width, CONTEXT, seed)
    settings = Training(
        steps, learning_rate=2e-3, warmup=min(100, steps // 10), evaluate_every=500, save_every=500, seed=seed
    )

    def batch(number: int) -> Batch:
        return random_windows(tokens, number, BATCH, CONTEXT, seed)

    log = train_task(
        model,
        batch,
        settings,
        out,
        lambda model: {"bits per byte": measure_bits(model, some, CONTEXT) / size_of_some},
        tokenizer,
    )
    ours = measure_bits(model, held, CONTEXT) / size
    model_of_bytes = KneserNey(np.frombuffer(learned.encode(), np.uint8).astype(np.int64), 256)
    model_of_tokens = KneserNey(tokens.numpy(), tokenizer.size)
    of_bytes = model_of_bytes.compute_probabilities(np.frombuffer(held_out.encode(), np.uint8).astype(np.int64))
    of_tokens = model_of_tokens.compute_probabilities(held.numpy())
    written = generate(model, [tokenizer.encode(PROMPT)], 80, temperature=0.8, top_p=0.95, seed=seed)[0]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": sum(entry.get("tokens", 0) for entry in log),
        "minutes": count_training_minutes(log),
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
    print("\n" + "\n".join(textwrap.fill(line, 118) for line in result["sample"].splitlines()))


if __name__ == "__main__":
    sys.exit(run_command(make_parser(__doc__.split("\n")[0], steps=1500), run, show))
