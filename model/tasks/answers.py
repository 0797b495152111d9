"""Question answering: MiniLM, fine-tuned, extracts the answer to a question from a passage.

Passages are built from trivia: six questions and their answers as statements, in other text; one of them is asked.
Every fourth question is held out, and used in test passages only. The baseline is a bag of words: in the statement with
most words in common with the question, the longest run of words that are neither in the question nor in one of ten
training passages.

    python -m model.tasks.answers --out out/answers
"""

from __future__ import annotations

import random
import re
import sys
import textwrap
import zipfile
from collections import Counter
from typing import NamedTuple

import torch

from ..inference.predict import answer
from ..io.checkpoints import load
from ..io.tokenizer import Tokenizer
from ..training.batches import Batch
from ..transformer import Transformer
from .common import count_training_minutes, make_fine_tuning_settings, make_parser, run_command, train_task
from .datasets import fetch

BATCH, STATEMENTS = 16, 6
ASKS = re.compile(r"\b(what|which|who|where|when|how many|around)\b", re.IGNORECASE)
# The text around a statement; it does not tell where the answer is.
FRONTS = (
    "", "", "People often forget that ", "According to an old almanac, ", "My neighbour, who reads a lot, told me: ",
    "It is widely believed that ", "During the quiz last night we learned this: ", "In short, ", "Surprisingly, ",
    "The teacher wrote on the board that ",
)  # fmt: skip
BACKS = (
    "", "", ", as everybody in the room agreed", ", although few would have guessed it", ", or so the book says",
    ", and nobody doubted it", " (see the appendix for the sources)", ", which came up twice that evening",
)  # fmt: skip


class Fact(NamedTuple):
    question: str
    statement: str  # with {} in place of the answer
    answer: str


class Example(NamedTuple):
    question: str
    passage: str
    start: int  # of the answer's characters in the passage
    end: int


def read_facts() -> list[Fact]:
    """The questions whose question word can be replaced by the answer."""
    import yaml

    with zipfile.ZipFile(fetch("trivia")) as files:
        pairs = yaml.safe_load(files.read("chatterbot_corpus/data/english/trivia.yml"))["conversations"]
    result = []
    for question, reply, *_ in pairs:
        reply = " ".join(reply.split()).strip(" .")
        if found := ASKS.search(question):
            statement = question[: found.start()] + "{}" + question[found.end() :]
            result.append(Fact(question, statement.strip(" ?."), reply))
    return [fact for fact in result if fact.statement.count("{}") == 1]


def split(known: list[Fact]) -> tuple[list[Fact], list[Fact]]:
    return [fact for i, fact in enumerate(known) if i % 4], known[::4]


def make_example(known: list[Fact], rng: random.Random) -> Example:
    picked = rng.sample(known, STATEMENTS)
    asked = rng.randrange(STATEMENTS)
    passage, start = "", 0
    for i, fact in enumerate(picked):
        before, after = fact.statement.split("{}")
        passage += rng.choice(FRONTS) + before
        if i == asked:
            start = len(passage)
        passage += fact.answer + after + rng.choice(BACKS) + ". "
    return Example(picked[asked].question, passage.strip(), start, start + len(picked[asked].answer))


def encode_example(tokenizer: Tokenizer, one: Example) -> tuple[list[int], list[int], tuple[int, int]]:
    """Tokens, their types, and the first and last token of the answer."""
    encoding = tokenizer.backend.encode(one.question, one.passage)
    first, last = (encoding.char_to_token(at, 1) for at in (one.start, one.end - 1))
    return encoding.ids, encoding.type_ids, (first, last)


def split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def find_common_words(passages: list[str], share: float = 0.1) -> set[str]:
    """The words in more than this share of the passages."""
    counts = Counter(word for passage in passages for word in set(split_words(passage)))
    return {word for word, count in counts.items() if count > share * len(passages)}


def answer_by_bag_of_words(question: str, passage: str, common: set[str]) -> str:
    asked = set(split_words(question))
    best = max(re.split(r"(?<=\.) ", passage), key=lambda statement: len(asked & set(split_words(statement)) - common))
    runs: list[list[re.Match]] = [[]]
    for found in re.finditer(r"\w+", best):
        if found.group().lower() in asked | common:
            runs.append([])
        else:
            runs[-1].append(found)
    longest = max(runs, key=len)
    return best[longest[0].start() : longest[-1].end()] if longest else ""


def normalise(text: str) -> str:
    """Without case, punctuation and articles, as SQuAD compares answers. Rajpurkar et al. (2016), arXiv:1606.05250."""
    return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))


def exact_match(model: Transformer, tokenizer: Tokenizer, examples: list[Example]) -> float:
    found = [answer(model, tokenizer, e.question, e.passage, best=1).best[0].text for e in examples]
    return measure_match(found, examples)


def measure_match(found: list[str], examples: list[Example]) -> float:
    same = [normalise(f) == normalise(e.passage[e.start : e.end]) for f, e in zip(found, examples, strict=True)]
    return sum(same) / len(same)


def run(steps: int, seed: int = 0, out: str | None = None, measured: int = 500) -> dict:
    learned, held_out = split(read_facts())
    rng = random.Random(10**6)
    examples = [make_example(held_out, rng) for _ in range(measured)]
    encoder, tokenizer = load("minilm")
    torch.manual_seed(seed)
    model = encoder.with_head("answer", dropout=0.1)

    def batch(number: int) -> Batch:
        rng = random.Random(seed * 1_000_003 + number)
        encoded = [encode_example(tokenizer, make_example(learned, rng)) for _ in range(BATCH)]
        longest = max(len(tokens) for tokens, _, _ in encoded)
        tokens, types = (torch.tensor([row[i] + [0] * (longest - len(row[i])) for row in encoded]) for i in (0, 1))
        lengths = torch.tensor([len(row[0]) for row in encoded])
        inputs = dict(tokens=tokens, lengths=lengths, token_types=types)
        return Batch(inputs, torch.tensor([span for _, _, span in encoded]))

    some = examples[:100]

    def evaluate(model: Transformer) -> dict[str, float]:
        return {"exact": exact_match(model, tokenizer, some)}

    settings = make_fine_tuning_settings(steps, 2e-4, every=100, seed=seed)
    log = train_task(model, batch, settings, out, evaluate, tokenizer)
    common = find_common_words([make_example(learned, rng).passage for _ in range(500)])
    baseline = [answer_by_bag_of_words(e.question, e.passage, common) for e in examples]
    one = examples[0]
    return {
        "learned": len(learned),
        "held_out": len(held_out),
        "measured": len(examples),
        "minutes": count_training_minutes(log),
        "exact": exact_match(model, tokenizer, examples),
        "bag_of_words": measure_match(baseline, examples),
        "sample": {
            "passage": one.passage,
            "question": one.question,
            "found": [span._asdict() for span in answer(model, tokenizer, one.question, one.passage, best=3).best],
        },
    }


def show(result: dict) -> None:
    print(
        f"MiniLM fine-tuned on passages from {result['learned']} questions for {result['minutes']:.1f} minutes\n\n"
        f"exact answers in {result['measured']} passages from {result['held_out']} other questions"
    )
    print(f"  fine-tuned                {result['exact']:6.1%}")
    print(f"  bag of words              {result['bag_of_words']:6.1%}")
    sample = result["sample"]
    print(f"\n{textwrap.fill(sample['passage'], 118)}\n\n{sample['question']}")
    for span in sample["found"]:
        print(f"  {span['probability']:6.1%}  {span['text']}")


if __name__ == "__main__":
    sys.exit(run_command(make_parser(__doc__.split("\n")[0], steps=400), run, show))
