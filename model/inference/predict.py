"""Predictions of models with a task's head: classes of texts, labelled spans, answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..io.tokenizer import Tokenizer
from ..step import pack
from ..transformer import Transformer
from .texts import check_texts, encode_texts


def check_task(model: Transformer, task: str) -> None:
    if model.config.task != task:
        got = f"with one for {model.config.task!r}" if model.config.task else "without one"
        raise ValueError(f"model must have a head for the task {task!r}, got a {model.config.family} {got}")


def check_length(model: Transformer, name: str, tokens: Sequence[int]) -> None:
    if len(tokens) > model.config.context:
        raise ValueError(f"{name} must fit the context of {model.config.context} tokens, got {len(tokens)}")


@torch.inference_mode()
def classify(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], truncate: bool = False
) -> list[dict[str, float]]:
    """For each text the probability of each label, the most likely first; in multi-label models independent ones; in
    regression the numbers. truncate: cut texts that are longer than the model's context."""
    check_task(model, "classify")
    check_texts("texts", texts)
    encoded = encode_texts("texts", texts, tokenizer, model.config, model.config.context if truncate else None)
    if not encoded:
        return []
    logits = model(*pack(encoded)).float()
    values = {
        "single_label_classification": lambda x: x.softmax(-1), "multi_label_classification": torch.sigmoid,
        "regression": lambda x: x,
    }  # fmt: skip
    rows = values[model.config.problem_type](logits).tolist()
    named = [zip(model.config.labels, row, strict=True) for row in rows]
    return [dict(sorted(row, key=lambda one: -one[1])) for row in named]


class Entity(NamedTuple):
    label: str
    text: str
    start: int  # of its characters in the text
    end: int
    probability: float  # the lowest of its words'


@torch.inference_mode()
def tag(model: Transformer, tokenizer: Tokenizer, text: str) -> list[Entity]:
    """The labelled spans of a text. A word has the label of its first token (Devlin et al., "BERT", 5.3). Labels B-X
    and I-X form a span of X, O none; a label without a prefix is of a single word."""
    check_task(model, "tag")
    encoding = tokenizer.backend.encode(text)
    check_length(model, "text", encoding.ids)
    probabilities = model(*pack([encoding.ids])).float().softmax(-1)
    entities: list[Entity] = []
    last = None  # the kind of span that the previous word is in
    for word in range(1 + max((w for w in encoding.word_ids if w is not None), default=-1)):
        piece = encoding.word_ids.index(word)
        probability, number = probabilities[piece].max(-1)
        label = model.config.labels[int(number)]
        begins, kind = label[:2] != "I-", label.removeprefix("B-").removeprefix("I-")
        start, end = encoding.word_to_chars(word)
        if label == "O":
            last = None
        elif begins or kind != last:
            entities.append(Entity(kind, text[start:end], start, end, float(probability)))
            last = kind if label[:2] in ("B-", "I-") else None
        else:
            first = entities[-1]
            lowest = min(first.probability, float(probability))
            entities[-1] = Entity(kind, text[first.start : end], first.start, end, lowest)
    return entities


class Span(NamedTuple):
    text: str
    start: int  # of its characters in the passage
    end: int
    score: float  # the sum of the two logits
    probability: float  # among all possible spans and no answer


class Answers(NamedTuple):
    best: list[Span]  # the most likely first
    null_score: float  # of no answer: the sum of the first token's logits
    null_probability: float


@torch.inference_mode()
def answer(
    model: Transformer, tokenizer: Tokenizer, question: str, passage: str, best: int = 5, longest: int = 30
) -> Answers:
    """The most likely spans of up to `longest` tokens of the passage, and the probability of no answer."""
    check_task(model, "answer")
    for name, value in (("best", best), ("longest", longest)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    encoding = tokenizer.backend.encode(question, passage)
    check_length(model, "question and passage", encoding.ids)
    types = torch.tensor([encoding.type_ids])
    starts, ends = model(torch.tensor([encoding.ids]), token_types=types)[0].float().unbind(-1)
    inside = torch.tensor([s == 1 for s in encoding.sequence_ids])
    scores = starts[:, None] + ends
    n = torch.arange(len(starts))
    allowed = inside[:, None] & inside & (n >= n[:, None]) & (n < n[:, None] + longest)
    null = starts[0] + ends[0]
    scores = scores.masked_fill(~allowed, float("-inf"))
    probabilities = torch.cat([scores.flatten(), null[None]]).softmax(0)
    found = []
    top = scores.flatten().topk(min(best, int(allowed.sum())))
    for score, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        first, last = encoding.offsets[index // len(n)], encoding.offsets[index % len(n)]
        found.append(Span(passage[first[0] : last[1]], first[0], last[1], score, float(probabilities[index])))
    return Answers(found, float(null), float(probabilities[-1]))
