"""The command line: python -m model generate|embed. Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time

import torch

import flashattn

from .checkpoints import load
from .embed import embed
from .generate import generate
from .packages import KNOWN, locate
from .tokenizer import Tokenizer
from .transformer import Transformer


def parser() -> argparse.ArgumentParser:
    models = [name for name in KNOWN if not name.endswith("vocabulary")]
    top = argparse.ArgumentParser(prog="python -m model", description="Real checkpoints on flashattn.")
    commands = top.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--model", required=True, metavar="NAME", help=f"{', '.join(models)}, a Hugging Face directory or a .gguf file"
    )
    shared.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    shared.add_argument("--backend", choices=["triton", "cpu", "reference"], help="force one; default: the best here")
    shared.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    command = commands.add_parser(
        "generate", parents=[shared], help="continue a text", description="Continue a text, token by token."
    )
    command.add_argument("--prompt", required=True, help="the text to continue")
    command.add_argument("--chat", action="store_true", help="put the prompt in the model's chat template")
    command.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    command.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    command.add_argument("--top-p", type=float, metavar="P", help="sample among the tokens that reach probability P")
    command.add_argument("--min-p", type=float, metavar="P", help="sample among tokens P times as likely as the first")
    command.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="of tokens that were there")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling, default 0")
    command.add_argument("--no-check", action="store_true", help="do not repeat greedy runs on the reference backend")
    command.set_defaults(run=run_generate)

    command = commands.add_parser(
        "embed", parents=[shared], help="compare sentences", description="Sentence embeddings and their cosines."
    )
    command.add_argument("sentences", nargs="+", metavar="SENTENCE")
    command.set_defaults(run=run_embed)
    return top


def load_named(args: argparse.Namespace) -> tuple[Transformer, Tokenizer]:
    model, tokenizer = load(locate(args.model), getattr(torch, args.dtype), progress=True)
    if tokenizer is None:
        raise ValueError(f"{args.model}: no tokenizer.json")
    return model, tokenizer


def run_generate(args: argparse.Namespace) -> None:
    model, tokenizer = load_named(args)
    text = tokenizer.chat(args.prompt) if args.chat else args.prompt
    prompt = tokenizer.encode(text)
    stream = tokenizer.stream()

    def show(_: int, token: int) -> None:
        if not args.json:
            print(stream.add(token), end="", flush=True)

    def run(on_token=None) -> list[int]:
        return generate(
            model, [prompt], args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            min_p=args.min_p, repetition_penalty=args.repetition_penalty, stop_tokens=tokenizer.stop, seed=args.seed,
            on_token=on_token,
        )[0]  # fmt: skip

    if not args.json:
        print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    tokens = run(show)
    seconds = time.perf_counter() - start
    result = {"tokens": tokens, "text": tokenizer.decode(tokens), "tokens_per_second": len(tokens) / seconds}
    if not args.json:
        print(f"\n\n{len(prompt)} + {len(tokens)} tokens, {len(tokens) / seconds:.1f} tokens/s")
    if args.temperature == 0 and not args.no_check:
        with flashattn.use_backend("reference"):
            result["equals_reference"] = run() == tokens
        if not args.json:
            print(f"greedy tokens equal the reference backend's: {'yes' if result['equals_reference'] else 'NO'}")
    if args.json:
        print(json.dumps(result))


def run_embed(args: argparse.Namespace) -> None:
    model, tokenizer = load_named(args)
    vectors = embed(model, tokenizer, args.sentences).float()
    cosines = (vectors @ vectors.T).tolist()
    if args.json:
        print(json.dumps({"sentences": args.sentences, "cosines": cosines, "vectors": vectors.tolist()}))
        return
    for i, sentence in enumerate(args.sentences):
        print(f"[{i}] {sentence}")
    print("\ncosine  " + "  ".join(f"{f'[{i}]':>7}" for i in range(len(cosines))))
    for i, row in enumerate(cosines):
        print(f"{f'[{i}]':<6}  " + "  ".join(f"{c:7.4f}" for c in row))


def main() -> int:
    args = parser().parse_args()
    try:
        with flashattn.use_backend(args.backend) if args.backend else contextlib.nullcontext():
            args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
