"""The tokeniser of a GGUF file."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, processors

from .splitting import BY_NAME, Splitter, make_byte_level_bpe
from .tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types
READ_FIELDS = ("model", "pre", "tokens", "token_type", "merges", "add_bos_token", "add_eos_token")
NAMED = dict(bos="bos", eos="eos", unk="unknown", pad="padding", sep="seperator", cls="cls", mask="mask")
# Tokens for filling in, which are left to the prompt; and scores, which BPE does not have.
IGNORED_FIELDS = ("scores", "token_type_count", "eot_token_id", "eom_token_id", "prefix_token_id", "suffix_token_id",
           "middle_token_id", *(f"fim_{x}_token_id" for x in ("pre", "suf", "mid", "pad", "rep", "sep")))  # fmt: skip
OFF = ("add_sep_token", "add_space_prefix", "remove_extra_whitespaces")
# Tokens that end a text beside those that a file names, as in llama.cpp.
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "<|end_of_text|>", "</s>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip


def read_tokenizer(fields: dict) -> Tokenizer:
    """From the file's fields under `tokenizer.`, without this prefix.

    Raises:
        ValueError: naming a field that is not supported.
    """
    check_fields(fields)
    ggml = {name.removeprefix("ggml."): value for name, value in fields.items() if name.startswith("ggml.")}
    tokens = ggml["tokens"]
    types = ggml.get("token_type", [NORMAL] * len(tokens))
    splitter = BY_NAME[ggml.get("pre", "default")]
    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    backend = make_byte_level_bpe({token: i for i, token in enumerate(tokens)}, merges, splitter)
    of_type = {kind: [t for t, k in zip(tokens, types, strict=True) if k == kind] for kind in set(types)}
    special = of_type.get(UNKNOWN, []) + of_type.get(CONTROL, [])
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(token, normalized=False) for token in of_type.get(USER_DEFINED, [])])
    named = {ours: ggml.get(f"{theirs}_token_id") for ours, theirs in NAMED.items()}
    config = {f"{ours}_token": tokens[i] for ours, i in named.items() if i is not None}
    add_bos_and_eos(backend, ggml, config, splitter)
    stop = [ggml.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    stop += [backend.token_to_id(token) for token in ENDS if token in special]
    stop = list(dict.fromkeys(token for token in stop if token is not None))
    return Tokenizer(backend, stop, fields.get("chat_template", ""), config)


def check_fields(fields: dict) -> None:
    """Raises ValueError for a field that is not supported, or is missing."""
    for name, value in fields.items():
        kind, _, short = name.partition(".")
        if kind in ("chat_template", "huggingface"):  # the first template only; a tokenizer.json repeats the rest
            continue
        if short in OFF:
            if value:
                raise ValueError(f"tokenizer.{name} must be false, got {value}")
        elif kind != "ggml" or not (
            short in READ_FIELDS + IGNORED_FIELDS or short.removesuffix("_token_id") in NAMED.values()
        ):
            raise ValueError(f"tokenizer.{name} is not known here, and may change what a text's tokens are")
    if fields.get("ggml.model") != "gpt2":
        raise ValueError(f"tokenizer.ggml.model must be 'gpt2', got {fields.get('ggml.model')!r}")
    pre = fields.get("ggml.pre", "default")
    if pre not in BY_NAME:
        raise ValueError(f"tokenizer.ggml.pre must be one of {', '.join(BY_NAME)}, got {pre!r}")
    missing = [name for name in ("tokens", "merges") if f"ggml.{name}" not in fields]
    if missing:
        raise ValueError(f"tokenizer.ggml.{missing[0]} is missing")
    if len(set(fields["ggml.tokens"])) < len(fields["ggml.tokens"]):
        raise ValueError("tokenizer.ggml.tokens must differ, but one occurs twice")


def add_bos_and_eos(backend: tokenizers.Tokenizer, ggml: dict, config: dict, splitter: Splitter) -> None:
    """The tokens that every text begins and ends with."""
    first, last = ggml.get("add_bos_token", splitter.adds_bos), ggml.get("add_eos_token", False)
    for wanted, name in ((first, "bos"), (last, "eos")):
        if wanted and f"{name}_token" not in config:
            raise ValueError(f"tokenizer.ggml.{name}_token_id is missing, which add_{name}_token needs")
    ends = [config[f"{name}_token"] if wanted else "" for wanted, name in ((first, "bos"), (last, "eos"))]
    if not any(ends):
        return
    single = [*filter(None, ends[:1]), "$A", *filter(None, ends[1:])]
    pair = [*single, *filter(None, ends[:1]), "$B:1", *filter(None, ends[1:])]
    tokens = [(token, backend.token_to_id(token)) for token in set(ends) if token]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)
