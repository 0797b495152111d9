"""How byte-level BPE splits a text before it merges: the patterns that a GGUF file names.

The names and their meaning are llama.cpp's; where its pattern replaces one of a tokenizer.json, the latter is used.
Each pattern splits the pieces of the one before it; a piece is a match, or the text between two matches.
"""

from __future__ import annotations

from typing import NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def match_words(number: str) -> str:
    return rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"


def match_cased_words(number: str, short: str = "") -> str:
    """Words that end at the end of lower-case letters."""
    first = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{short}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{short}"
    return rf"{first}|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


class Splitter(NamedTuple):
    names: str
    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token is taken whole, without merges
    adds_bos: bool = False  # a text begins with the bos token, unless the file says otherwise


DIGITS = r"\p{N}{1,3}"
SPLITTERS = (
    Splitter("default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    Splitter("gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais exaone4 trillion", (GPT2,)),
    Splitter("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", (r"\p{N}", GPT2)),
    Splitter("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", (match_words(DIGITS),), True, True),
    Splitter("dbrx smaug-bpe chatglm-bpe glm4", (match_words(DIGITS),)),
    Splitter(
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", (match_words(r"\p{N}"),)
    ),
    Splitter("tekken", (match_cased_words(r"\p{N}"),), True, True),
    Splitter("gpt-4o llama4 kanana2 talkie minimax-m2", (match_cased_words(DIGITS, CONTRACTIONS + "?"),)),
    Splitter("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    Splitter("deepseek-coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一\uac00-\ud7ff]+", r"\p{N}")),
    Splitter(
        "deepseek-v3 hunyuan-dense joyai-llm",
        (
            DIGITS,
            "[一-龥\u3040-\u30ff]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
            rf""" ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}""",
        ),
    ),
)
BY_NAME = {name: splitter for splitter in SPLITTERS for name in splitter.names.split()}


def make_byte_level_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], splitter: Splitter = BY_NAME["gpt-2"]
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=splitter.whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitter.patterns]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    backend.decoder = decoders.ByteLevel()
    return backend
