"""The command line: python -m model COMMAND. Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import partial
from importlib import import_module

from .io.packages import MODELS

DTYPES = ["float32", "bfloat16", "float16"]


def parse_count(text: str, minimum: int = 1) -> int:
    number = int(text)
    if number < minimum:
        raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {number}")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Without PyTorch, so that help and usage errors come at once."""
    top = argparse.ArgumentParser(
        prog="python -m model", description="Transformers on flashattn: real checkpoints, and training."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--backend", choices=["triton", "cpu", "reference"], help="default: the best available")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    with_model = argparse.ArgumentParser(add_help=False, parents=[output])
    with_model.add_argument(
        "--model", required=True, metavar="NAME", help=f"{', '.join(MODELS)}, a Hugging Face directory or a .gguf file"
    )
    with_model.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights, default float32")

    def add_command(name: str, text: str, parent: argparse.ArgumentParser = with_model) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[parent], help=text, description=text[0].upper() + text[1:] + ".")

    add_generate_options(add_command("generate", "continue a text, token by token"))

    embed = add_command("embed", "embed sentences and print their cosine similarities")
    embed.add_argument("sentences", nargs="+", metavar="SENTENCE")
    embed.add_argument("--truncate", action="store_true", help="cut long texts to the length the model was trained on")

    classify = add_command("classify", "classify texts, with a model that has a classification head")
    classify.add_argument("texts", nargs="+", metavar="TEXT")
    classify.add_argument("--truncate", action="store_true", help="cut long texts to the model's context")

    tag = add_command("tag", "label the spans of a text: names, parts of speech")
    tag.add_argument("text")

    translate = add_command("translate", "translate texts with an encoder-decoder, by beam search")
    translate.add_argument("texts", nargs="+", metavar="TEXT")
    translate.add_argument("--beams", type=parse_count, default=4, metavar="N", help="default 4; 1 is greedy")
    translate.add_argument("--length-penalty", type=float, default=1.0, metavar="P", help="default 1; 0: short outputs")
    translate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")

    answer = add_command("answer", "find the answer to a question in a passage")
    answer.add_argument("--question", required=True)
    answer.add_argument("--passage", required=True, help="the text, or - to read it from standard input")
    answer.add_argument("--best", type=parse_count, default=5, metavar="N", help="spans to show, default 5")

    transcribe = add_command("transcribe", "transcribe a WAV file")
    transcribe.add_argument("file", help="16-bit WAV, any sample rate")
    transcribe.add_argument("--language", metavar="CODE", help="such as en; default: detect it")
    transcribe.add_argument(
        "--task", choices=["transcribe", "translate"], default="transcribe",
        help="default transcribe; translate: into English",
    )  # fmt: skip
    transcribe.add_argument(
        "--no-speech-threshold", type=float, default=0.6, metavar="P",
        help="skip windows whose probability of no speech is over P, default 0.6",
    )  # fmt: skip

    add_train_options(
        add_command("train", "train a language model on text files, from scratch or from a checkpoint", output)
    )
    add_command("convert", "write a checkpoint as a Hugging Face directory").add_argument(
        "directory", help="to write; must not exist yet"
    )
    add_command("inspect", "show a model's config, parameters and cache size")
    return top


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", required=True, help="the text to continue")
    add("--chat", action="store_true", help="put the prompt in the model's chat template")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    add("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    add("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="sample among the most likely tokens that reach probability P")
    add("--min-p", type=float, metavar="P", help="sample tokens at least P times as likely as the most likely one")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="on tokens already in the text, default 1")
    add("--seed", type=int, default=0, metavar="S", help="of the sampling, default 0")
    add("--draft", metavar="NAME", help="a smaller model for speculative decoding: the same greedy tokens, sooner")
    add("--no-check", action="store_true", help="do not check greedy tokens against the reference backend")


def add_train_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("texts", nargs="+", metavar="FILE", help="text in UTF-8; the last twentieth of each is held out")
    add("--out", required=True, metavar="DIRECTORY", help="checkpoints, log.jsonl, loss.png; a run in it is resumed")
    add("--model", metavar="NAME", help="start from this one; default: a small Llama from scratch")
    add("--vocab", type=parse_count, default=2048, metavar="N", help="tokens of the small Llama, default 2048")
    add("--layers", type=parse_count, default=4, metavar="N", help="of the small Llama, default 4")
    add("--width", type=parse_count, default=256, metavar="N", help="of the small Llama, default 256")
    at_least_two = partial(parse_count, minimum=2)
    add("--context", type=at_least_two, default=256, metavar="N", help="tokens of a training sequence, default 256")
    add("--batch", type=parse_count, default=8, metavar="N", help="sequences in a batch, default 8")
    add("--accumulate", type=parse_count, default=1, metavar="N", help="batches in a step, default 1")
    add("--steps", type=parse_count, default=1000, metavar="N", help="default 1000")
    add("--learning-rate", type=float, default=1e-3, metavar="R", help="the peak, default 0.001")
    add("--schedule", choices=["cosine", "inverse_sqrt", "constant"], default="cosine", help="default cosine")
    add("--save-every", type=parse_count, default=200, metavar="N", help="steps, default 200")
    add("--bfloat16", action="store_true", help="matrix products in bfloat16 (autocast)")
    add("--recompute", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--seed", type=int, default=0, metavar="S", help="of weights and batches, default 0")


def main() -> int:
    args = build_parser().parse_args()
    try:
        import flashattn

        commands = import_module(".train_command" if args.command == "train" else ".commands", __package__)
        with flashattn.use_backend(args.backend) if args.backend else contextlib.nullcontext():
            getattr(commands, f"run_{args.command}")(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
