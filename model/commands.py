"""The commands of `python -m model`, except train."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import flashattn

from .encoder_decoder import EncoderDecoder, Model
from .inference.beam import beam_search
from .inference.embed import embed
from .inference.generate import generate
from .inference.predict import answer, classify, tag
from .inference.sound import RATE, read_wave
from .inference.speculative import speculate
from .inference.speech import Segment, transcribe
from .io.checkpoints import load
from .io.saving import save
from .io.tokenizer import Stream, Tokenizer
from .training.flops import count_matrix_parameters


def load_with_tokenizer(name: str, dtype: str) -> tuple[Model, Tokenizer]:
    model, tokenizer = load(name, getattr(torch, dtype), progress=True)
    if tokenizer is None:
        raise ValueError(f"{name}: no tokenizer.json")
    return model, tokenizer


@contextlib.contextmanager
def echo_prompt(args: argparse.Namespace, stream: Stream) -> Iterator[None]:
    """Print the prompt, before its continuation is printed, and end the line, even on an error."""
    if args.json:
        yield
        return
    print(args.prompt, end="", flush=True)
    try:
        yield
    finally:
        print(stream.end(), flush=True)


def run_generate(args: argparse.Namespace) -> None:
    model, tokenizer = load_with_tokenizer(args.model, args.dtype)
    draft = load_with_tokenizer(args.draft, args.dtype)[0] if args.draft else None
    if draft is not None and args.temperature:
        raise ValueError("--draft needs --temperature 0: guesses are checked against the most likely token")
    text = tokenizer.chat(args.prompt) if args.chat else args.prompt
    prompt = tokenizer.encode(text, add_special_tokens=not args.chat)  # a template has its own
    stream = tokenizer.stream()
    bar = partial(tqdm, total=args.max_new_tokens, unit="token", leave=False)

    def generate_tokens(on_token: Callable[[int], object]) -> list[int]:
        return generate(
            model, [prompt], args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            min_p=args.min_p, repetition_penalty=args.repetition_penalty, stop_tokens=tokenizer.stop, seed=args.seed,
            on_token=lambda _, token: on_token(token),
        )[0]  # fmt: skip

    start = time.perf_counter()
    more = {}
    with echo_prompt(args, stream), bar(desc="generating", disable=None if args.json else True) as line:

        def show(token: int) -> None:
            line.update()
            if not args.json:
                print(stream.add(token), end="", flush=True)

        if draft is None:
            tokens = generate_tokens(show)
        else:
            options = dict(stop_tokens=tokenizer.stop, on_token=show)
            tokens, steps, accepted = speculate(model, draft, prompt, args.max_new_tokens, **options)
            more = {"steps": steps, "accepted": accepted}
    seconds = time.perf_counter() - start
    result = {"tokens": tokens, "text": tokenizer.decode(tokens), "tokens_per_second": len(tokens) / seconds} | more
    if not args.json:
        print(f"\n{len(prompt)} + {len(tokens)} tokens, {len(tokens) / seconds:.1f} tokens/s")
        if more:
            print(f"{more['steps']} steps of the model, {more['accepted']:.0%} of the drafted tokens were accepted")
    if args.temperature == 0 and not args.no_check:
        with flashattn.use_backend("reference"), bar(desc="checking on the reference backend", disable=None) as line:
            result["equals_reference"] = generate_tokens(lambda _: line.update()) == tokens
        if not args.json:
            print(f"greedy tokens equal the reference backend's: {'yes' if result['equals_reference'] else 'NO'}")
    if args.json:
        print(json.dumps(result))


def run_embed(args: argparse.Namespace) -> None:
    model, tokenizer = load_with_tokenizer(args.model, args.dtype)
    vectors = embed(model, tokenizer, args.sentences, normalize=True, truncate=args.truncate).float()
    cosines = (vectors @ vectors.T).tolist()
    if args.json:
        print(json.dumps({"sentences": args.sentences, "cosines": cosines, "vectors": vectors.tolist()}))
        return
    for i, sentence in enumerate(args.sentences):
        print(f"[{i}] {sentence}")
    print("\ncosine  " + "  ".join(f"{f'[{i}]':>7}" for i in range(len(cosines))))
    for i, row in enumerate(cosines):
        print(f"{f'[{i}]':<6}  " + "  ".join(f"{c:7.4f}" for c in row))


def run_classify(args: argparse.Namespace) -> None:
    model, tokenizer = load_with_tokenizer(args.model, args.dtype)
    results = classify(model, tokenizer, args.texts, args.truncate)
    if args.json:
        print(json.dumps({"texts": args.texts, "labels": results}, ensure_ascii=False))
        return
    for text, labels in zip(args.texts, results, strict=True):
        print(text)
        for label, value in list(labels.items())[:5]:
            print(f"  {value:7.4f}  {label}")


def run_tag(args: argparse.Namespace) -> None:
    model, tokenizer = load_with_tokenizer(args.model, args.dtype)
    entities = tag(model, tokenizer, args.text)
    if args.json:
        print(json.dumps({"text": args.text, "entities": [e._asdict() for e in entities]}, ensure_ascii=False))
        return
    widest = max((len(e.label) for e in entities), default=0)
    for e in entities:
        print(f"{e.label:<{widest}}  {e.probability:6.1%}  {e.text}")


def run_translate(args: argparse.Namespace) -> None:
    model, tokenizer = load_with_tokenizer(args.model, args.dtype)
    if not isinstance(model, EncoderDecoder):
        raise ValueError(f"{args.model}: translate needs an encoder-decoder, got a {model.config.family}")
    ends = tokenizer.stop[:1]
    sources = [tokenizer.encode(text) for text in args.texts]
    sources = [tokens if tokens[-1:] == ends else tokens + ends for tokens in sources]
    options = dict(beams=args.beams, length_penalty=args.length_penalty, stop_tokens=tokenizer.stop)
    texts = [tokenizer.decode(tokens).strip() for tokens in beam_search(model, sources, args.max_new_tokens, **options)]
    if args.json:
        print(json.dumps({"texts": args.texts, "translations": texts}, ensure_ascii=False))
    else:
        print("\n".join(texts))


def run_answer(args: argparse.Namespace) -> None:
    model, tokenizer = load_with_tokenizer(args.model, args.dtype)
    passage = sys.stdin.read() if args.passage == "-" else args.passage
    found = answer(model, tokenizer, args.question, passage, args.best)
    if args.json:
        best = [span._asdict() for span in found.best]
        print(json.dumps({"best": best, "null_probability": found.null_probability}, ensure_ascii=False))
        return
    for span in found.best:
        print(f"{span.probability:6.1%}  {span.text}")
    print(f"{found.null_probability:6.1%}  (no answer)")


def run_transcribe(args: argparse.Namespace) -> None:
    model, tokenizer = load_with_tokenizer(args.model, args.dtype)
    samples = read_wave(args.file)

    def show(segment: Segment) -> None:
        if not args.json:
            print(f"[{segment.start:7.2f} - {segment.end:7.2f}] {segment.text.strip()}", flush=True)

    start = time.perf_counter()
    options = dict(language=args.language, task=args.task, no_speech_threshold=args.no_speech_threshold)
    found = transcribe(model, tokenizer, samples, show, **options)
    seconds, length = time.perf_counter() - start, len(samples) / RATE
    if args.json:
        result = found._asdict() | {"segments": [segment._asdict() for segment in found.segments]}
        print(json.dumps(result | {"seconds": seconds, "seconds_of_sound": length}, ensure_ascii=False))
    else:
        print(f"\n{length:.1f} s of audio in {seconds:.1f} s, language {found.language}")


def run_convert(args: argparse.Namespace) -> None:
    model, tokenizer = load(args.model, getattr(torch, args.dtype), progress=True)
    save(model, args.directory, tokenizer)
    size = sum(file.stat().st_size for file in Path(args.directory).iterdir())
    result = {"directory": args.directory, "family": model.config.family, "bytes": size}
    print(json.dumps(result) if args.json else f"{args.directory}: a {model.config.family}, {size:,} bytes")


def run_inspect(args: argparse.Namespace) -> None:
    model, tokenizer = load(args.model, getattr(torch, args.dtype), progress=True)
    config, weight = model.config, model.token_embedding.weight
    layers = config.decoder_layers or config.layers
    groups: dict[str, int] = {}
    for name, p in model.named_parameters():
        parts = [part for part in name.split(".")[:-1] if not part.isdigit()] or [name]
        groups[".".join(parts)] = groups.get(".".join(parts), 0) + p.numel()
    result = {
        "config": asdict(config),
        "parameters": sum(groups.values()),
        "of": groups,
        "matrices": count_matrix_parameters(model),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "cache_bytes_per_token": 2 * layers * config.kv_heads * config.head_dim * weight.element_size(),
        "tokens": None if tokenizer is None else tokenizer.size,
        "stop_tokens": None if tokenizer is None else tokenizer.stop,
    }
    if args.json:
        print(json.dumps(result))
        return
    fields = type(config).__dataclass_fields__
    for name, value in result["config"].items():
        if value != fields[name].default:
            shown = f"{len(value)} of them" if name == "labels" else value
            print(f"{name:<22} {shown}")
    print(f"\n{result['parameters']:,} parameters, {result['bytes']:,} bytes as {args.dtype}")
    for name, count in groups.items():
        print(f"  {name:<36} {count:>13,}")
    if config.causal or config.decoder_layers:
        print(f"cache: {result['cache_bytes_per_token']:,} bytes a token")
    if tokenizer is not None:
        print(f"tokeniser: {tokenizer.size:,} tokens, stops at {tokenizer.stop}")
