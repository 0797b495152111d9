"""Sequence tasks: an encoder-decoder learns to copy, reverse and sort new sequences.

python -m model.tasks.sequences
"""

from __future__ import annotations

import sys
import time

import torch

from ..config import Config
from ..encoder_decoder import EncoderDecoder
from ..inference.generate import generate
from ..layers import initialise
from ..step import pack
from ..training.batches import Batch, make_generator
from ..training.train import Training
from .common import make_parser, run_command, train_task

KINDS = {"copy": list, "reverse": lambda x: x[::-1], "sort": sorted}
DIGITS, LONGEST, BATCH = 20, 16, 64
STOP, FIRST_DIGIT = 1, 2 + len(KINDS)  # tokens: 0 starts an output, 1 ends it, then one for each kind of task

CONFIG = Config(
    "marian", vocab_size=FIRST_DIGIT + DIGITS, width=128, layers=2, heads=4, kv_heads=4, head_dim=32, ffn_width=256,
    context=64, causal=False, norm="layer", norm_eps=1e-5, norm_first=False, activation="relu", gated=False,
    positions="sinusoidal", decoder_layers=2, embedding_scale=128**0.5, lm_head_bias=True,
)  # fmt: skip


def make_examples(
    number: int, size: int, seed: int, longest: int, kind: str | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Sources, each the kind of task and 1 to `longest` numbers, and their targets."""
    random = make_generator(seed, number)
    lengths = torch.randint(1, longest + 1, (size,), generator=random).tolist()
    kinds = torch.randint(0, len(KINDS), (size,), generator=random).tolist()
    sources, outputs = [], []
    for length, i in zip(lengths, kinds, strict=True):
        i = i if kind is None else list(KINDS).index(kind)
        digits = (FIRST_DIGIT + torch.randint(0, DIGITS, (length,), generator=random)).tolist()
        sources.append([2 + i, *digits])
        outputs.append(list(KINDS.values())[i](digits))
    return sources, outputs


def make_batch(number: int, seed: int, longest: int) -> Batch:
    sources, outputs = make_examples(number, BATCH, seed, longest)
    tokens, lengths = pack(sources)
    targets, target_lengths = pack([[CONFIG.decoder_start_token, *row] for row in outputs])
    wanted, _ = pack([[*row, STOP] for row in outputs])
    return Batch(dict(tokens=tokens, targets=targets, lengths=lengths, target_lengths=target_lengths), wanted)


def exact_match(model: EncoderDecoder, kind: str, longest: int, size: int = 500) -> float:
    """Exact-match accuracy on new sequences."""
    sources, outputs = make_examples(0, size, 10**6, longest, kind)
    found = generate(model, sources, longest + 1, stop_tokens=[STOP])
    return sum(a == b for a, b in zip(found, outputs, strict=True)) / size


def run(steps: int, seed: int = 0, out: str | None = None, longest: int = LONGEST) -> dict:
    torch.manual_seed(seed)
    model = EncoderDecoder(CONFIG)
    initialise(model, CONFIG.layers)
    settings = Training(
        steps, learning_rate=2e-3, warmup=100, min_lr_ratio=0.0, weight_decay=0.0, save_every=500, seed=seed
    )
    start = time.perf_counter()
    train_task(model, lambda i: make_batch(i, seed, longest), settings, out)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "exact": {kind: exact_match(model, kind, longest) for kind in KINDS}}


def show(result: dict) -> None:
    print(
        f"trained for {result['seconds']:.0f} s; exact-match accuracy on 500 new sequences of up to {LONGEST} numbers"
    )
    for kind, share in result["exact"].items():
        print(f"  {kind:<8} {share:7.1%}")


if __name__ == "__main__":
    sys.exit(run_command(make_parser(__doc__.split("\n")[0], steps=5000), run, show))
