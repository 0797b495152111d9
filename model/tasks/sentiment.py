"""Sentiment: MiniLM, fine-tuned, classifies snippets of movie reviews as good or bad.

10,605 snippets with the mean of many people's ratings (Hutto and Gilbert, "VADER", 2014); every fifth is held out.
The baseline is a frozen MiniLM with a linear layer on its embeddings.

    python -m model.tasks.sentiment --out out/sentiment
"""

from __future__ import annotations

import io
import sys
import tarfile

import torch
from torch import Tensor
from torch.nn import functional as F

from ..inference.embed import embed
from ..io.checkpoints import load
from ..io.tokenizer import Tokenizer
from ..step import pack
from ..training.batches import Batch, sample_indices
from ..transformer import Transformer
from .common import count_training_minutes, make_fine_tuning_settings, make_parser, run_command, train_task
from .datasets import fetch

BATCH, LABELS = 32, ("bad", "good")
Examples = list[tuple[str, int]]  # a text, and the number of its label


def read_snippets() -> Examples:
    with tarfile.open(fetch("vader")) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        data = files.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()
    rows = [line.split("\t", 2) for line in data.decode("utf-8", "replace").splitlines()]
    return [(text, int(float(rating) > 0)) for _, rating, text in rows]


def split(examples: Examples) -> tuple[Examples, Examples]:
    return [e for i, e in enumerate(examples) if i % 5], examples[::5]


@torch.no_grad()
def measure_accuracy(model: Transformer, tokenizer: Tokenizer, examples: Examples) -> float:
    right = 0
    for first in range(0, len(examples), 64):
        texts, labels = zip(*examples[first : first + 64], strict=True)
        logits = model(*pack([tokenizer.encode(text) for text in texts]))
        right += int((logits.argmax(-1) == torch.tensor(labels)).sum())
    return right / len(examples)


def measure_frozen_accuracy(model: Transformer, tokenizer: Tokenizer, learned: Examples, held_out: Examples) -> float:
    """Accuracy of logistic regression on sentence embeddings."""

    def vectors(examples: Examples) -> Tensor:
        texts = [text for text, _ in examples]
        return torch.cat([embed(model, tokenizer, texts[i : i + 64]) for i in range(0, len(texts), 64)]).clone()

    x, y = vectors(learned), torch.tensor([label for _, label in learned])
    layer = torch.nn.Linear(x.shape[1], 2)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + 1e-4 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    right = layer(vectors(held_out)).argmax(-1) == torch.tensor([label for _, label in held_out])
    return right.double().mean().item()


def run(steps: int, seed: int = 0, out: str | None = None, measured: int | None = None) -> dict:
    learned, held_out = split(read_snippets())
    examples = learned
    if measured is not None:  # of the whole length: those of one rating follow each other
        held_out, examples = held_out[:: len(held_out) // measured], learned[:: len(learned) // (8 * measured)]
    encoder, tokenizer = load("minilm")
    baseline = measure_frozen_accuracy(encoder, tokenizer, examples, held_out)
    torch.manual_seed(seed)
    model = encoder.with_head("classify", LABELS, dropout=0.1)

    def batch(number: int) -> Batch:
        picked = [learned[i] for i in sample_indices(number, BATCH, len(learned), seed)]
        tokens, lengths = pack([tokenizer.encode(text) for text, _ in picked])
        return Batch(dict(tokens=tokens, lengths=lengths), torch.tensor([label for _, label in picked]))

    some = held_out[::4]

    def evaluate(model: Transformer) -> dict[str, float]:
        return {"accuracy": measure_accuracy(model, tokenizer, some)}

    settings = make_fine_tuning_settings(steps, 1e-4, every=200, seed=seed)
    log = train_task(model, batch, settings, out, evaluate, tokenizer)
    return {
        "learned": len(learned),
        "measured": len(held_out),
        "minutes": count_training_minutes(log),
        "accuracy": measure_accuracy(model, tokenizer, held_out),
        "accuracy_frozen": baseline,
        "majority": max(sum(label == i for _, label in held_out) for i in (0, 1)) / len(held_out),
    }


def show(result: dict) -> None:
    print(
        f"MiniLM fine-tuned on {result['learned']:,} snippets of movie reviews for {result['minutes']:.1f} minutes\n\n"
        f"accuracy on {result['measured']:,} others"
    )
    print(f"  fine-tuned                      {result['accuracy']:6.1%}")
    print(f"  frozen, with a linear layer     {result['accuracy_frozen']:6.1%}")
    print(f"  majority class                  {result['majority']:6.1%}")


if __name__ == "__main__":
    sys.exit(run_command(make_parser(__doc__.split("\n")[0], steps=530), run, show))
