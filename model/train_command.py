"""The command `python -m model train`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .commands import load_with_tokenizer
from .encoder_decoder import EncoderDecoder
from .io.tokenizer import Tokenizer
from .tasks.common import make_small_llama
from .training.batches import Batch, random_windows
from .training.evaluate import measure_bits
from .training.runs import Run
from .training.train import Training, train
from .transformer import Transformer

HELD_OUT = 0.05  # the share of each file that is held out


def run_train(args: argparse.Namespace) -> None:
    texts = [Path(file).read_text(encoding="utf-8") for file in args.texts]
    training = "\n".join(text[: int(len(text) * (1 - HELD_OUT))] for text in texts)
    held_out = "\n".join(text[int(len(text) * (1 - HELD_OUT)) :] for text in texts)
    if args.model:
        model, tokenizer = load_with_tokenizer(args.model, "float32")
    else:
        tokenizer = Tokenizer.train(training, args.vocab)
        model = make_small_llama(tokenizer.size, args.layers, args.width, args.context, args.seed)
    if isinstance(model, EncoderDecoder) or not (model.config.causal and model.config.lm_head):
        raise ValueError(f"{args.model}: train needs a causal language model, got a {model.config.family}")
    context = min(args.context, model.config.context)
    tokens, held = (torch.tensor(tokenizer.encode(text)) for text in (training, held_out))
    if len(held) < 2:
        raise ValueError(f"texts must be long enough for two tokens in the twentieth held out, got {len(held)}")
    size = len(held_out.encode())

    def evaluate(model: Transformer) -> dict[str, float]:
        return {"bits per byte": measure_bits(model, held, context) / size}

    settings = Training(
        args.steps, args.learning_rate, args.schedule, warmup=min(100, args.steps // 10), accumulate=args.accumulate,
        bfloat16=args.bfloat16, recompute=args.recompute, evaluate_every=args.save_every, save_every=args.save_every,
        seed=args.seed,
    )  # fmt: skip

    def batch(number: int) -> Batch:
        return random_windows(tokens, number, args.batch, context, args.seed)

    log = train(model, batch, settings, Run(args.out), evaluate, tokenizer)
    steps, evaluations = [e for e in log if "loss" in e], [e for e in log if "bits per byte" in e]
    seconds = sum(entry["seconds"] for entry in steps)
    result = {
        "directory": str(Run(args.out).checkpoints[-1]),
        "steps": args.steps,
        "tokens": sum(entry["tokens"] for entry in steps),
        "seconds": seconds,
        "loss": steps[-1]["loss"],
        "bits_per_byte": evaluations[-1]["bits per byte"],
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['tokens']:,} tokens in {seconds:.0f} s, {result['tokens'] / seconds:,.0f} tokens/s")
    print(f"loss {result['loss']:.3f}; bits per byte of held-out text {result['bits_per_byte']:.3f}")
    print(f"{result['directory']}; losses in {Path(args.out) / 'loss.png'}")
