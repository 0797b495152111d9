"""The command line: python -m model COMMAND. Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import partial

import flashattn

from . import commands
from .packages import MODELS

DTYPES = ["float32", "bfloat16", "float16"]


def count(text: str, least: int = 1) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    return number


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m model", description="Transformers on flashattn: real checkpoints, and training."
    )
    add = top.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    models = ", ".join(MODELS)
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--backend", choices=["triton", "cpu", "reference"], help="force one; default: the best here")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    loaded = argparse.ArgumentParser(add_help=False, parents=[output])
    loaded.add_argument(
        "--model", required=True, metavar="NAME", help=f"{models}, a Hugging Face directory or a .gguf file"
    )
    loaded.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")

    def command(name: str, text: str, parent: argparse.ArgumentParser = loaded) -> argparse.ArgumentParser:
        made = add(name, parents=[parent], help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(run=getattr(commands, f"run_{name}"))
        return made

    generate = command("generate", "continue a text, token by token")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--chat", action="store_true", help="put the prompt in the model's chat template")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    generate.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="sample among the tokens that reach probability P")
    generate.add_argument("--min-p", type=float, metavar="P", help="sample among tokens P times as likely as the first")
    generate.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="of tokens that were there"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling, default 0")
    generate.add_argument(
        "--draft", metavar="NAME", help="a smaller model that guesses; greedy, the same tokens sooner"
    )
    generate.add_argument("--no-check", action="store_true", help="do not repeat greedy runs on the reference backend")

    embed = command("embed", "compare sentences: embeddings and their cosines")
    embed.add_argument("sentences", nargs="+", metavar="SENTENCE")
    embed.add_argument("--truncate", action="store_true", help="cut long texts to what the model was trained on")

    classify = command("classify", "the class of each text, of a model with a head for it")
    classify.add_argument("texts", nargs="+", metavar="TEXT")
    classify.add_argument("--truncate", action="store_true", help="cut long texts to the model's context")

    tag = command("tag", "the labelled spans of a text: names, parts of speech")
    tag.add_argument("text")

    translate = command("translate", "what an encoder-decoder makes of each text, by beam search")
    translate.add_argument("texts", nargs="+", metavar="TEXT")
    translate.add_argument("--beams", type=count, default=4, metavar="N", help="hypotheses, default 4; 1 is greedy")
    translate.add_argument("--length-penalty", type=float, default=1.0, metavar="P", help="default 1; 0: short outputs")
    translate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")

    answer = command("answer", "where in a passage the answer to a question stands")
    answer.add_argument("--question", required=True)
    answer.add_argument("--passage", required=True, help="the text, or - to read it from standard input")
    answer.add_argument("--best", type=count, default=5, metavar="N", help="spans to show, default 5")

    transcribe = command("transcribe", "what is said in a WAV file")
    transcribe.add_argument("file", help="16-bit WAV, any rate")
    transcribe.add_argument("--language", metavar="CODE", help="like en; default: what the model takes it for")
    transcribe.add_argument("--task", choices=["transcribe", "translate"], default="transcribe", help="into English")
    transcribe.add_argument(
        "--no-speech-threshold", type=float, default=0.6, metavar="P", help="leave out what is less likely speech"
    )

    train = command("train", "train a language model on text files, from scratch or going on from a model", output)
    train.add_argument("texts", nargs="+", metavar="FILE", help="text in UTF-8; the last twentieth of each is held out")
    train.add_argument(
        "--out", required=True, metavar="DIRECTORY", help="checkpoints, log.jsonl, loss.png; goes on there"
    )
    train.add_argument("--model", metavar="NAME", help="go on from this one; default: a small Llama from scratch")
    train.add_argument("--vocab", type=count, default=2048, metavar="N", help="tokens of the small Llama, default 2048")
    train.add_argument("--layers", type=count, default=4, metavar="N", help="of it, default 4")
    train.add_argument("--width", type=count, default=256, metavar="N", help="of it, default 256")
    two = partial(count, least=2)
    train.add_argument("--context", type=two, default=256, metavar="N", help="tokens of a piece of text, default 256")
    train.add_argument("--batch", type=count, default=8, metavar="N", help="pieces in a batch, default 8")
    train.add_argument("--accumulate", type=count, default=1, metavar="N", help="batches in a step, default 1")
    train.add_argument("--steps", type=count, default=1000, metavar="N", help="default 1000")
    train.add_argument("--learning-rate", type=float, default=1e-3, metavar="R", help="the highest, default 0.001")
    train.add_argument("--schedule", choices=["cosine", "inverse_sqrt", "constant"], default="cosine")
    train.add_argument("--save-every", type=count, default=200, metavar="N", help="steps, default 200")
    train.add_argument("--bfloat16", action="store_true", help="products in bfloat16 (autocast)")
    train.add_argument("--recompute", action="store_true", help="activations in the backward pass: less memory")
    train.add_argument("--seed", type=int, default=0, metavar="S", help="of weights and batches, default 0")

    convert = command("convert", "write any checkpoint as a Hugging Face directory")
    convert.add_argument("directory", help="to write; must not be there yet")

    command("inspect", "what a model is made of: its config, parameters, cache")
    return top


def main() -> int:
    args = parser().parse_args()
    try:
        with flashattn.use_backend(args.backend) if args.backend else contextlib.nullcontext():
            args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
