"""Rotary frequencies against those of `transformers`, and what a config.json says of them."""

import pytest
import torch

import model
from model import Request, Server, rope
from model.families import llama
from model.io.checkpoints import CheckpointError
from model.positions import make_rotary_table
from tests.model.checkpoints import change_config, write_checkpoint_of

transformers = pytest.importorskip("transformers")
utils = pytest.importorskip("transformers.modeling_rope_utils")

SIZES = dict(
    vocab_size=99, hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=1, rms_norm_eps=1e-5, max_position_embeddings=8192, rope_theta=500000.0, head_dim=128,
)  # fmt: skip
ORIGINAL = dict(original_max_position_embeddings=2048)
LLAMA31 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
)  # fmt: skip
FACTORS = dict(short_factor=[1 + i / 64 for i in range(64)], long_factor=[1 + i / 2 for i in range(64)])
# name: rope_scaling, and what else config.json says
CONFIGS = {
    "linear": (dict(rope_type="linear", factor=4.0), {}),
    "linear, by its old name": (dict(type="linear", factor=2.5), {}),
    "dynamic": (dict(rope_type="dynamic", factor=2.0), {}),
    "llama 3.1": (dict(rope_type="llama3", **LLAMA31), dict(max_position_embeddings=131072)),
    "llama 3.2": (dict(rope_type="llama3", **LLAMA31 | dict(factor=32.0)), dict(max_position_embeddings=131072)),
    "longrope": (dict(rope_type="longrope", **FACTORS, **ORIGINAL), {}),
    "longrope, its length outside": (dict(rope_type="longrope", **FACTORS), ORIGINAL),
    "longrope with an amplitude": (dict(rope_type="longrope", **FACTORS, **ORIGINAL, attention_factor=1.25), {}),
    "longrope with a factor": (dict(rope_type="longrope", **FACTORS, **ORIGINAL, factor=16.0), {}),
    "yarn": (dict(rope_type="yarn", factor=4.0, **ORIGINAL), {}),
    "yarn without the original length": (dict(rope_type="yarn", factor=4.0), {}),
    "yarn, its length outside": (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096), ORIGINAL),
    "yarn without a factor": (dict(rope_type="yarn", factor=None, **ORIGINAL), {}),
    "yarn with bounds": (dict(rope_type="yarn", factor=4.0, **ORIGINAL, beta_fast=8, beta_slow=2, truncate=False), {}),
    "yarn with an amplitude": (dict(rope_type="yarn", factor=4.0, **ORIGINAL, attention_factor=1.5), {}),
    "yarn with scales": (dict(rope_type="yarn", factor=40.0, **ORIGINAL, mscale=1.0, mscale_all_dim=0.7), {}),
    "yarn with one scale": (dict(rope_type="yarn", factor=40.0, **ORIGINAL, mscale=0.7), {}),
    "both, as before and now": (dict(rope_type="linear", factor=4.0), dict(rope_parameters=dict(rope_type="default"))),
    "no scaling": (dict(rope_type="default"), {}),
    "nothing": (None, {}),
}


def compute_expected(hf: dict, length: int) -> tuple[torch.Tensor, float]:
    """From transformers: (frequencies, amplitude) for a sequence of this length."""
    config = transformers.LlamaConfig(**{name: dict(x) if isinstance(x, dict) else x for name, x in hf.items()})
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return utils.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize("length", [1, 2048, 2049, 8192, 8193, 16000])
@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies(name, length):
    scaling, more = CONFIGS[name]
    hf = SIZES | dict(rope_scaling=scaling) | more
    config = llama.config(hf)
    frequencies, amplitude = compute_expected(hf, length)
    cos, sin = make_rotary_table(torch.tensor([[1]]), config, length)
    torch.testing.assert_close(cos[0, 0, 0], frequencies.cos() * amplitude, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sin[0, 0, 0], frequencies.sin() * amplitude, rtol=1e-5, atol=1e-6)
    again = llama.config(llama.to_hf(config))
    assert again == config
    torch.testing.assert_close(compute_expected(llama.to_hf(config), length)[0], frequencies, rtol=1e-6, atol=0)


def test_context():
    """As long as the stretched positions reach, whichever length config.json has."""

    def context(**scaling):
        return llama.config(SIZES | dict(rope_scaling=scaling)).context

    assert context(rope_type="linear", factor=4.0) == context(rope_type="dynamic", factor=4.0) == 32768
    assert context(rope_type="yarn", factor=4.0) == 32768
    assert context(rope_type="yarn", factor=4.0, **ORIGINAL) == 8192
    assert context(rope_type="llama3", **LLAMA31) == context(rope_type="longrope", **FACTORS, **ORIGINAL) == 8192


WRONG = {
    "no factor": (dict(rope_type="linear"), "rope_parameters of the type linear must have factor"),
    "zero": (dict(rope_type="linear", factor=0), "factor of the rotary frequencies must be over 0, got 0"),
    "llama3": (
        dict(rope_type="llama3", factor=8.0),
        "rope_parameters of the type llama3 must have low_freq_factor, high_freq_factor",
    ),
    "bounds": (
        dict(rope_type="llama3", **LLAMA31 | dict(high_freq_factor=1.0)),
        "low_freq_factor must be over 0 and below high_freq_factor 1.0, got 1.0",
    ),
    "count": (
        dict(rope_type="longrope", **FACTORS | dict(long_factor=[1.0, 2.0]), **ORIGINAL),
        r"factors of the rotary frequencies must be 64 over 0, got \(1.0, 2.0\)",
    ),
    "unknown": (dict(rope_type="axial"), "rope_type must be one of default, linear, dynamic, llama3, longrope, yarn"),
    "part": (dict(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor must be 1, got 0.5"),
    "sections": (
        dict(rope_type="default", mrope_section=[16, 24, 24]),
        "rope_parameters of the type default must be .*, got mrope_section",
    ),
    "by layer": (
        dict(full_attention=dict(rope_type="linear", factor=2.0), sliding_attention=dict(rope_type="default")),
        "rope_parameters of the type default must be .*, got full_attention",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    scaling, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        llama.config(SIZES | dict(rope_parameters=scaling))


def test_the_error_names_the_file(tmp_path):
    write_checkpoint_of("llama", tmp_path)
    change_config(tmp_path, rope_parameters=dict(rope_type="linear"))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: rope_parameters of the type linear must have factor"):
        model.load(tmp_path)


@pytest.mark.parametrize("name", ["llama_dynamic", "llama_longrope"])
def test_a_server_whose_requests_would_change_each_other(name, tiny):
    """Frequencies that depend on the length: up to the original context all requests have the same."""
    ours, draft = (tiny(name).ours for _ in range(2))
    server = Server(ours, pages=32, page_size=4)
    first, second = server.submit(Request([1, 2, 3], 13)), server.submit(Request([1, 2, 3, 4, 5], 3))
    server.run()
    assert [first.tokens, second.tokens] == [
        model.generate(ours, [r.prompt], r.max_new_tokens)[0] for r in (first, second)
    ]
    with pytest.raises(ValueError, match="must fit the original context of 16, got 17 tokens"):
        server.submit(Request([1, 2, 3], 14))
    found = model.speculate(ours, draft, [1, 2, 3], 30, lookahead=3)
    assert found.tokens == model.generate(ours, [[1, 2, 3]], 30)[0]


def test_same_factors_do_not_depend_on_the_length():
    factors = (1.0, 2.0)
    assert rope.LongRope(1.0, 16, factors, factors).fixed_context(64) == 64
    assert rope.LongRope(1.0, 16, factors, (1.0, 3.0)).fixed_context(64) == 16
