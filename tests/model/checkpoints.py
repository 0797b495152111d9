"""Small checkpoints with random weights, one for each variant of each family, written by `transformers`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import model
from model.families import FAMILIES

transformers = pytest.importorskip("transformers")

name_of = {"bert": "Bert", "albert": "Albert"}
SMALL_ENCODER = dict(
    vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
SMALL_DECODER = dict(
    vocab_size=101, hidden_size=48, intermediate_size=72, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
EXTRA = {"SequenceClassification": dict(num_labels=5), "TokenClassification": dict(num_labels=7)}
ROPES = {  # rope_type: more fields, and the context in config.json
    "linear": ({}, 16),
    "dynamic": ({}, 16),
    "llama3": (dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16), 64),
    "longrope": (
        dict(
            short_factor=[1.0, 1.2, 1.5, 2.0, 3.0, 3.5], long_factor=[1.0, 2.0, 3.0, 4.0, 6.0, 8.0],
            original_max_position_embeddings=16,
        ),
        64,
    ),
}  # fmt: skip


class Tiny(NamedTuple):
    """A small model of `transformers`, made anew by each call."""

    make: Callable
    no_cache: str = ""  # why the tests of caches and of generation do not apply

    def __call__(self):
        return self.make()


# Variants of decoders. One with its family's name is tested with a server and with speculative decoding too.
DECODERS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=64, rope_theta=5000.0, tie_word_embeddings=False,
        )
    ),
    "llama_tied_head_dim": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=20, max_position_embeddings=64, tie_word_embeddings=True,
        )
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(
            **SMALL_DECODER, num_hidden_layers=2, sliding_window=9,
        )
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **SMALL_DECODER, num_hidden_layers=2, head_dim=20, tie_word_embeddings=True,
        )
    ),
    "qwen3_with_windows": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **SMALL_DECODER, num_hidden_layers=3, head_dim=20, use_sliding_window=True, sliding_window=7,
            max_window_layers=1,
        )
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SMALL_DECODER, num_hidden_layers=3, head_dim=20, sliding_window=9, query_pre_attn_scalar=30,
            attn_implementation="eager",
        )
    ),
    "llama_yarn": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SMALL_DECODER, num_hidden_layers=2, rope_parameters=dict(
                rope_type="yarn", rope_theta=300.0, factor=4.0, original_max_position_embeddings=16,
            ),
        )
    ),
    **{
        f"llama_{name}": lambda name=name, rope=rope, context=context: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **SMALL_DECODER | dict(max_position_embeddings=context), num_hidden_layers=2,
                rope_parameters=dict(rope_type=name, rope_theta=300.0, factor=4.0) | rope,
            )
        )
        for name, (rope, context) in ROPES.items()
    },
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **SMALL_DECODER, num_hidden_layers=3, head_dim=20, sliding_window=9, num_local_experts=5,
            num_experts_per_tok=2, swiglu_limit=0.7, attn_implementation="eager", rope_parameters=dict(
                rope_type="yarn", rope_theta=300.0, factor=4.0, beta_fast=8.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=16,
            ),
        )
    ),
    "gpt_neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=101, hidden_size=48, num_layers=4, attention_types=[[["global", "local"], 2]], num_heads=4,
            window_size=9, max_position_embeddings=64,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=101, n_embd=48, n_layer=3, n_head=4, n_positions=64)
    ),
}  # fmt: skip
ENCODERS = {
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64,
        )
    ),
    **{
        f"{family}_{task}": lambda family=family, task=task: getattr(transformers, f"{name_of[family]}For{task}")(
            getattr(transformers, f"{name_of[family]}Config")(**SMALL_ENCODER, **EXTRA.get(task, {}))
        )
        for family in ("bert", "albert")
        for task in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    },
    "albert": lambda: transformers.AlbertModel(transformers.AlbertConfig(**SMALL_ENCODER, embedding_size=20)),
}  # fmt: skip
TINY = {name: Tiny(make) for name, make in DECODERS.items()}
TINY |= {name: Tiny(make, no_cache="an encoder sees later tokens") for name, make in ENCODERS.items()}
CACHED = [name for name, tiny in TINY.items() if not tiny.no_cache]
SERVED = [name for name in CACHED if name in FAMILIES]  # a variant of each family


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


SMALL_T5 = dict(
    vocab_size=101, d_model=48, d_kv=20, d_ff=72, num_layers=2, num_decoder_layers=3, num_heads=4,
    relative_attention_num_buckets=12, relative_attention_max_distance=20,
)  # fmt: skip
MARIAN = dict(
    vocab_size=101, d_model=48, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=72, decoder_ffn_dim=72, max_position_embeddings=64, pad_token_id=0,
    decoder_start_token_id=0, eos_token_id=1, forced_eos_token_id=1,
)  # fmt: skip
ENCODER_DECODERS = {
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**MARIAN, activation_function="relu", scale_embedding=True)
    ),
    "marian_swish": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**MARIAN, activation_function="swish")
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL_T5)),
    "t5_1.1": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SMALL_T5, feed_forward_proj="gated-gelu", scale_decoder_outputs=False)
    ),
}


def write_checkpoint_of(name, path, **options):
    """A tiny checkpoint with random weights, large enough that every bias and norm shows: the model of
    `transformers`."""
    theirs = (TINY | ENCODER_DECODERS)[name]().eval()
    with torch.no_grad():
        for parameter_name, p in theirs.named_parameters():
            if "embed_positions" not in parameter_name:  # sinusoids
                p.copy_(torch.randn_like(p) * 0.3)
        if hasattr(theirs, "final_logits_bias"):
            theirs.final_logits_bias.copy_(torch.randn(1, 101))
    if name == "t5_1.1":  # a head of its own, which this transformers has no config for
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(101, 48) * 0.3)
    theirs.save_pretrained(path, **options)
    if name == "t5_1.1":
        change_config(path, tie_word_embeddings=False)
    return theirs


class Checkpoint(NamedTuple):
    """A checkpoint, and both models of it."""

    path: Path
    theirs: torch.nn.Module
    ours: model.Transformer | model.EncoderDecoder


def write_checkpoint(name, path) -> Checkpoint:
    return Checkpoint(path, write_checkpoint_of(name, path), model.load(path)[0])
