"""Part-of-speech tags: MiniLM, fine-tuned on the Brown corpus.

Every tenth of its 500 texts is held out. Tags are Brown's without the marks of headlines, titles, citations
(-hl, -tl, -nc) and foreign words (fw-). The baseline is each word's most frequent tag.

    python -m model.tasks.tags --out out/tags
"""

from __future__ import annotations

import re
import sys
import tarfile
from collections import Counter, defaultdict

import torch

from ..io.checkpoints import load
from ..io.tokenizer import Tokenizer
from ..step import pack
from ..training.batches import Batch, sample_indices
from ..transformer import Transformer
from .common import count_training_minutes, make_fine_tuning_settings, make_parser, run_command, train_task
from .datasets import fetch

BATCH, LONGEST = 16, 120  # sentences; words of one
Sentence = list[tuple[str, str]]  # words and their tags


def read_texts() -> list[list[Sentence]]:
    """The sentences of each text, one a line, of words and their tags, separated by a slash."""
    with tarfile.open(fetch("brown")) as files:
        members = sorted(m.name for m in files.getmembers() if re.fullmatch(r"package/c[a-r]\d\d", m.name))
        data = [files.extractfile(name).read().decode("latin-1") for name in members]
    result = []
    for text in data:
        pairs = ([word.rpartition("/") for word in line.split()] for line in text.splitlines() if line.strip())
        result.append([[(word, strip_marks(tag)) for word, _, tag in line][:LONGEST] for line in pairs])
    return result


def strip_marks(tag: str) -> str:
    return re.sub(r"-(hl|tl|nc)\b", "", tag.lower()).removeprefix("fw-")


def split(documents: list[list[Sentence]]) -> tuple[list[Sentence], list[Sentence]]:
    learned = [s for i, document in enumerate(documents) if i % 10 for s in document]
    return learned, [s for document in documents[::10] for s in document]


def encode_sentence(tokenizer: Tokenizer, sentence: Sentence, numbers: dict[str, int]) -> tuple[list[int], list[int]]:
    """Tokens, and the targets: a word's tag at its first token, -100 elsewhere; -2 for an unknown tag."""
    encoding = tokenizer.backend.encode([word for word, _ in sentence], is_pretokenized=True)
    targets = [-100] * len(encoding.ids)
    for word, (_, tag) in enumerate(sentence):
        if word in encoding.word_ids:
            targets[encoding.word_ids.index(word)] = numbers.get(tag, -2)
    return encoding.ids, targets


@torch.no_grad()
def measure_accuracy(model: Transformer, tokenizer: Tokenizer, sentences: list[Sentence]) -> float:
    numbers = {tag: i for i, tag in enumerate(model.config.labels)}
    right = total = 0
    for first in range(0, len(sentences), 64):
        encoded = [encode_sentence(tokenizer, sentence, numbers) for sentence in sentences[first : first + 64]]
        targets = torch.tensor([t for _, row in encoded for t in row])
        found = model(*pack([tokens for tokens, _ in encoded])).argmax(-1)
        right += int((found == targets).sum())
        total += int((targets != -100).sum())
    return right / total


def measure_most_frequent_tag_accuracy(learned: list[Sentence], held_out: list[Sentence]) -> float:
    """Accuracy of each word's most frequent tag; unknown words are nouns."""
    seen: dict[str, Counter] = defaultdict(Counter)
    for sentence in learned:
        for word, tag in sentence:
            seen[word][tag] += 1
    pairs = [pair for sentence in held_out for pair in sentence]
    return sum((seen[word].most_common(1)[0][0] if word in seen else "nn") == tag for word, tag in pairs) / len(pairs)


def run(steps: int, seed: int = 0, out: str | None = None, measured: int | None = None) -> dict:
    learned, held_out = split(read_texts())
    held_out = held_out[:measured]
    labels = sorted({tag for sentence in learned for _, tag in sentence})
    numbers = {tag: i for i, tag in enumerate(labels)}
    encoder, tokenizer = load("minilm")
    torch.manual_seed(seed)
    model = encoder.with_head("tag", labels, dropout=0.1)

    def batch(number: int) -> Batch:
        picked = [learned[i] for i in sample_indices(number, BATCH, len(learned), seed)]
        encoded = [encode_sentence(tokenizer, sentence, numbers) for sentence in picked]
        tokens, lengths = pack([tokens for tokens, _ in encoded])
        return Batch(dict(tokens=tokens, lengths=lengths), torch.tensor([t for _, row in encoded for t in row]))

    some = held_out[::10]

    def evaluate(model: Transformer) -> dict[str, float]:
        return {"accuracy": measure_accuracy(model, tokenizer, some)}

    settings = make_fine_tuning_settings(steps, 3e-4, every=250, seed=seed)
    log = train_task(model, batch, settings, out, evaluate, tokenizer)
    return {
        "labels": len(labels),
        "sentences": min(steps * BATCH, len(learned)),
        "measured": sum(map(len, held_out)),
        "minutes": count_training_minutes(log),
        "accuracy": measure_accuracy(model, tokenizer, held_out),
        "most_frequent": measure_most_frequent_tag_accuracy(learned, held_out),
    }


def show(result: dict) -> None:
    print(
        f"MiniLM fine-tuned on {result['sentences']:,} sentences of the Brown corpus ({result['labels']} tags) for "
        f"{result['minutes']:.1f} minutes\n\naccuracy on {result['measured']:,} words of held-out texts"
    )
    print(f"  fine-tuned                      {result['accuracy']:6.1%}")
    print(f"  each word's most frequent tag   {result['most_frequent']:6.1%}")


if __name__ == "__main__":
    sys.exit(run_command(make_parser(__doc__.split("\n")[0], steps=800), run, show))
