"""Machine translation: the original Transformer learns English to Spanish from two Bibles.

Blocks of twenty consecutive verses are held out. The result is BLEU (sacrebleu) of beam search; the baseline
translates word by word, with the most likely word of IBM model 1 (Brown et al., "The Mathematics of Statistical Machine
Translation", 1993) trained on the same verses.

    python -m model.tasks.translation --out out/translation
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict

import numpy as np
import torch

from ..config import Config
from ..encoder_decoder import EncoderDecoder
from ..inference.beam import beam_search
from ..io.tokenizer import Tokenizer
from ..layers import initialise
from ..step import pack
from ..training.batches import Batch, sample_indices
from ..training.train import Training
from .common import count_training_minutes, make_parser, run_command, train_task
from .datasets import read_verses

VOCAB, BATCH, LONGEST = 4000, 64, 120
START, STOP = "<s>", "</s>"
Pair = tuple[str, str]


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """The training, validation and test verses."""
    block = [i // 20 % 60 for i in range(len(pairs))]
    learned = [pair for pair, b in zip(pairs, block, strict=True) if b not in (0, 30)]
    return learned, *([pair for pair, b in zip(pairs, block, strict=True) if b == wanted] for wanted in (30, 0))


def make_config(vocab_size: int, width: int, layers: int, dropout: float) -> Config:
    return Config(
        "marian", vocab_size=vocab_size, width=width, layers=layers, heads=width // 64, kv_heads=width // 64,
        head_dim=64, ffn_width=4 * width, context=512, causal=False, norm="layer", norm_eps=1e-5, norm_first=False,
        activation="relu", gated=False, positions="sinusoidal", decoder_layers=layers, embedding_scale=width**0.5,
        lm_head_bias=True, dropout=dropout,
    )  # fmt: skip


def encode_pairs(pairs: list[Pair], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    stop = tokenizer.stop[0]
    return [([*tokenizer.encode(a), stop], [*tokenizer.encode(b), stop]) for a, b in pairs]


def make_batch(examples: list[tuple[list[int], list[int]]], number: int, seed: int) -> Batch:
    """Packed on both sides."""
    picked = [examples[i] for i in sample_indices(number, BATCH, len(examples), seed)]
    tokens, lengths = pack([source for source, _ in picked])
    targets, target_lengths = pack([[0, *target[:-1]] for _, target in picked])
    wanted, _ = pack([target for _, target in picked])
    return Batch(dict(tokens=tokens, targets=targets, lengths=lengths, target_lengths=target_lengths), wanted)


def translate(model: EncoderDecoder, tokenizer: Tokenizer, texts: list[str], beams: int = 4) -> list[str]:
    result = []
    for first in range(0, len(texts), 32):
        sources = [[*tokenizer.encode(text), tokenizer.stop[0]] for text in texts[first : first + 32]]
        found = beam_search(model, sources, LONGEST, beams=beams, stop_tokens=tokenizer.stop)
        result += [tokenizer.decode(tokens) for tokens in found]
    return result


def bleu(found: list[str], expected: list[str]) -> float:
    from sacrebleu import corpus_bleu

    return corpus_bleu(found, [expected]).score


def split_words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def learn_dictionary(pairs: list[Pair], rounds: int = 5) -> dict[str, str]:
    """The most likely Spanish word for each English one, by IBM model 1: t(f | e), uniform at first, from the expected
    counts of the previous round."""
    sources = [split_words(a) for a, _ in pairs]
    targets = [split_words(b) for _, b in pairs]
    english, spanish = (
        {w: i for i, w in enumerate(Counter(w for s in side for w in s))} for side in (sources, targets)
    )
    size = len(spanish)
    grids = [
        np.add.outer([spanish[w] for w in target], np.array([english[w] for w in source]) * size)
        for source, target in zip(sources, targets, strict=True)
    ]
    keys, inverse = np.unique(np.concatenate([g.ravel() for g in grids]), return_inverse=True)
    t = np.ones(len(keys))
    rows = np.concatenate([np.repeat(len(g[0]), len(g)) for g in grids])  # length of a Spanish word's row
    starts = np.concatenate([[0], rows.cumsum()[:-1]])
    of = keys // size
    for _ in range(rounds):
        values = t[inverse]
        expected = values / np.repeat(np.add.reduceat(values, starts), rows)
        counts = np.bincount(inverse, expected, minlength=len(keys))
        t = counts / np.bincount(of, counts)[of]
    best: dict[int, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for key, value in zip(keys.tolist(), t.tolist(), strict=True):
        best[key // size] = max(best[key // size], (value, key % size))
    names = list(spanish)
    return {word: names[best[i][1]] for word, i in english.items()}


def translate_word_by_word(text: str, known: dict[str, str]) -> str:
    """Unknown words are kept."""
    return re.sub(r" ([^\w\s])", r"\1", " ".join(known.get(word, word) for word in split_words(text)))


def run(
    steps: int, seed: int = 0, out: str | None = None, width: int = 256, layers: int = 3, measured: int | None = None
) -> dict:
    learned, watched, held_out = split(read_verses())
    held_out = held_out[:measured]
    tokenizer = Tokenizer.train("\n".join(f"{a}\n{b}" for a, b in learned), VOCAB, special=(START, STOP), stop=STOP)
    examples = encode_pairs(learned, tokenizer)
    torch.manual_seed(seed)
    model = EncoderDecoder(make_config(tokenizer.size, width, layers, dropout=0.1))
    initialise(model, layers)
    settings = Training(
        steps, learning_rate=1.5e-3, schedule="inverse_sqrt", warmup=min(400, steps // 4), weight_decay=0.01,
        betas=(0.9, 0.98), label_smoothing=0.1, evaluate_every=500, save_every=500, seed=seed,
    )  # fmt: skip

    def evaluate(model: EncoderDecoder) -> dict[str, float]:
        some = watched[::8]
        return {"BLEU": bleu(translate(model, tokenizer, [a for a, _ in some], beams=1), [b for _, b in some])}

    log = train_task(model, lambda i: make_batch(examples, i, seed), settings, out, evaluate, tokenizer)
    sources, expected = [a for a, _ in held_out], [b for _, b in held_out]
    found, known = translate(model, tokenizer, sources), learn_dictionary(learned)
    by_word = [translate_word_by_word(text, known) for text in sources]
    samples = [dict(zip(("english", "ours", "by_word", "bible"), row, strict=True)) for row in
               list(zip(sources, found, by_word, expected, strict=True))[:: max(1, len(sources) // 4)]]  # fmt: skip
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "pairs": len(learned),
        "minutes": count_training_minutes(log),
        "curve": [(entry["step"], entry["BLEU"]) for entry in log if "BLEU" in entry],
        "measured": len(held_out),
        "bleu": bleu(found, expected),
        "bleu_word_by_word": bleu(by_word, expected),
        "samples": samples,
    }


def show(result: dict) -> None:
    print(
        f"a Transformer of {result['parameters']:,} parameters, trained on {result['pairs']:,} verses for "
        f"{result['minutes']:.0f} minutes\n\nBLEU of greedy decoding on validation verses, during training"
    )
    for step, value in result["curve"]:
        print(f"  after {step:>5,} steps            {value:5.1f}")
    print(f"\nBLEU of {result['measured']} test verses")
    print(f"  Transformer, beam search     {result['bleu']:5.1f}")
    print(f"  word by word, IBM model 1    {result['bleu_word_by_word']:5.1f}")
    for sample in result["samples"]:
        print("\n" + "\n".join(f"  {name:<8} {text}" for name, text in sample.items()))


if __name__ == "__main__":
    sys.exit(run_command(make_parser(__doc__.split("\n")[0], steps=3500), run, show))
