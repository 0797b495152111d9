"""GGUF files as llama.cpp's converter writes them, with the weights and the results of a Llama of `transformers`."""

import gguf
import numpy as np
import pytest
import torch

import model
from model.io.checkpoints import CheckpointError
from model.io.gguf_file import NAMES
from model.io.splitting import BY_NAME, make_byte_level_bpe
from model.io.tokenizer import make_byte_alphabet

transformers = pytest.importorskip("transformers")

LAYOUT = {theirs: ours for ours, theirs in NAMES.items()}
TOKENS = [*make_byte_alphabet().values(), "Ġa", "<s>", "</s>", "<|eot_id|>", "<tool>"]
A, BOS, EOS, EOT, TOOL = range(256, 261)
TYPES = [1] * 257 + [3, 3, 3, 4]
TEXT = {"tokens": TOKENS, "token_type": TYPES, "merges": ["Ġ a"], "model": "gpt2", "pre": "gpt-2"}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS}


def permute(x, heads):
    """As the converter stores queries and keys."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path, said=(), text=(), tensors=(), drop=(), **of_llama):
    """A file, and the Llama of `transformers` whose weights it has."""
    sizes = dict(
        vocab_size=len(TOKENS), hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=500.0, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | of_llama)).eval()
    writer = gguf.GGUFWriter(path, "llama")
    fields = {
        "block_count": 1, "context_length": sizes["max_position_embeddings"], "embedding_length": 48,
        "feed_forward_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": len(TOKENS),
        "rope.dimension_count": 12, "rope.freq_base": 500.0, "attention.layer_norm_rms_epsilon": 1e-5,
    } | dict(said)  # fmt: skip
    fields = {f"llama.{name}": value for name, value in fields.items()}
    fields |= {(name if "." in name else f"tokenizer.ggml.{name}"): x for name, x in (TEXT | dict(text)).items()}
    for name, value in fields.items():
        if name in drop or value is None:
            continue
        adds = {bool: "bool", str: "string", int: "uint32", float: "float32", list: "array"}
        getattr(writer, f"add_{adds[type(value)]}")(name, value)
    for name, x in theirs.state_dict().items():
        stem = name.removeprefix("model.").removesuffix(".weight").removeprefix("layers.0.")
        block = "blk.0." if "layers.0." in name else ""
        x = x.numpy()
        if stem.endswith(("q_proj", "k_proj")):
            x = permute(x, 4 if stem.endswith("q_proj") else 2)
        writer.add_tensor(f"{block}{LAYOUT[stem]}.weight", np.ascontiguousarray(x))
    for name, x in dict(tensors).items():
        writer.add_tensor(name, np.array(x, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return theirs


def load_pair(tmp_path, **options):
    theirs = write_gguf(tmp_path / "x.gguf", **options)
    return theirs, *model.load(tmp_path / "x.gguf")


FREQS = [1.0, 1.0, 1.5, 3.0, 6.0, 8.0]
LONG = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0]
ALIKE = dict(rope_type="longrope", short_factor=FREQS, long_factor=FREQS, original_max_position_embeddings=64)
# name: fields of the file, its tensors, and what transformers calls the same
ROPES = {
    "nothing": ({}, {}, None),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}, None),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}, dict(rope_type="linear", factor=4.0)),
    "linear as it was called": ({"rope.scale_linear": 4.0}, {}, dict(rope_type="linear", factor=4.0)),
    "rope_freqs": ({}, {"rope_freqs.weight": FREQS}, ALIKE | dict(attention_factor=1.0)),
    "rope_freqs and linear": (
        {"rope.scaling.factor": 2.0},
        {"rope_freqs.weight": FREQS},
        ALIKE | dict(attention_factor=1.0, short_factor=[2 * x for x in FREQS], long_factor=[2 * x for x in FREQS]),
    ),
    "yarn": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        {},
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "yarn with bounds": (
        {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 0.5, "rope.scaling.attn_factor": 0.8,
        },
        {},
        dict(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5,
            attention_factor=0.8 * (1 + 0.1 * float(np.log(4))),
        ),
    ),
    "longrope": (
        {
            "rope.scaling.type": "longrope", "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": 1.25,
        },
        {"rope_factors_short.weight": FREQS, "rope_factors_long.weight": LONG},
        ALIKE | dict(long_factor=LONG, original_max_position_embeddings=16, attention_factor=1.25),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rotary_positions(name, tmp_path):
    """In a sequence longer than the original context; saved, it is the same."""
    said, tensors, rope = ROPES[name]
    rope = None if rope is None else dict(rope_theta=500.0) | rope
    theirs, ours, _ = load_pair(tmp_path, said=said, tensors=tensors, rope_parameters=rope)
    tokens = torch.randint(0, 257, (2, 40))
    with torch.no_grad():
        for length in (40, 12):
            expected = theirs(tokens[:, :length]).logits
            torch.testing.assert_close(ours(tokens[:, :length]), expected, rtol=1e-4, atol=1e-5)
        model.save(ours, tmp_path / "saved")
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_llama31_frequencies(tmp_path):
    """What llama.cpp's converter computes from the rope type llama3, and what transformers does with that."""
    rope = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= dict(original_max_position_embeddings=32)
    divisors = []
    for i in range(6):
        turns = 32 * 500.0 ** (-i / 6) / (2 * np.pi)
        smooth = (turns - 1) / (4 - 1)
        divisors.append(1.0 if turns > 4 else 8.0 if turns < 1 else 1 / ((1 - smooth) / 8 + smooth))
    theirs, ours, _ = load_pair(tmp_path, tensors={"rope_freqs.weight": divisors}, rope_parameters=rope)
    tokens = torch.randint(0, 257, (1, 50))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    assert ours.paged_context == 64  # these do not depend on the length


REFUSED = {
    "architecture": (dict(said={"expert_count": 8}), "llama.expert_count must be 0, got 8"),
    "unknown": (dict(said={"attention.clamp_kqv": 8.0}), "llama.attention.clamp_kqv is not known here"),
    "part": (dict(said={"rope.dimension_count": 6}), "llama.rope.dimension_count must be 12, got 6"),
    "values": (dict(said={"attention.value_length": 16}), "llama.attention.value_length must be 12, got 16"),
    "scaling": (
        dict(said={"rope.scaling.type": "ntk"}),
        "llama.rope.scaling.type must be one of none, linear, longrope, yarn, got 'ntk'",
    ),
    "a factor of others": (dict(said={"rope.scaling.alpha": 2.0}), "llama.rope.scaling.alpha is not known here"),
    "both": (
        dict(said={"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, tensors={"rope_freqs.weight": FREQS}),
        "tensor rope_freqs and llama.rope.scaling.type yarn together",
    ),
    "half": (
        dict(said={"rope.scaling.type": "longrope"}, tensors={"rope_factors_short.weight": FREQS}),
        "longrope needs the tensors rope_factors_short and rope_factors_long",
    ),
    "by layer": (
        dict(said={"attention.head_count_kv": [2]}),
        r"llama.attention.head_count_kv must be one number for all layers, got \[2\]",
    ),
    "missing": (dict(drop=["llama.block_count"]), "llama.block_count is missing"),
    "tensor": (dict(tensors={"blk.0.ffn_gate_inp.weight": [[1.0]]}), "tensor blk.0.ffn_gate_inp.weight is none"),
    "bias": (dict(tensors={"blk.0.attn_k.bias": [1.0] * 24}), "does not have: layers.0.self_attn.k_proj.bias"),
    "shards": (dict(text={"split.count": 3}), "split.count must be 1, got 3"),
    "kind": (dict(text={"model": "llama"}), "tokenizer.ggml.model must be 'gpt2', got 'llama'"),
    "splitter": (dict(text={"pre": "mine"}), "tokenizer.ggml.pre must be one of default, gpt-2, .*got 'mine'"),
    "space": (dict(text={"add_space_prefix": True}), "tokenizer.ggml.add_space_prefix must be false, got True"),
    "separator": (dict(text={"add_sep_token": True}), "tokenizer.ggml.add_sep_token must be false, got True"),
    "new": (dict(text={"suppress_tokens": [1]}), "tokenizer.ggml.suppress_tokens is not known here"),
    "no bos": (
        dict(text={"add_bos_token": True, "bos_token_id": None}),
        "tokenizer.ggml.bos_token_id is missing, which add_bos_token needs",
    ),
    "twice": (dict(text={"tokens": [*TOKENS[:-1], "Ġa"]}), "tokenizer.ggml.tokens must differ"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    options, message = REFUSED[name]
    write_gguf(tmp_path / "x.gguf", **options)
    with pytest.raises(CheckpointError, match=f"x.gguf: .*{message}"):
        model.load(tmp_path / "x.gguf")


def test_weights_that_cannot_be_read(tmp_path, monkeypatch):
    write_gguf(tmp_path / "x.gguf")

    def dequantize(data, kind):
        raise NotImplementedError("not yet")

    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    with pytest.raises(CheckpointError, match=r"x.gguf: tensor token_embd.weight of type F32: not yet"):
        model.load(tmp_path / "x.gguf")


def test_what_changes_nothing_is_read_past(tmp_path):
    text = {"scores": [0.0] * len(TOKENS), "fim_pre_token_id": 5, "add_space_prefix": False, "padding_token_id": EOS}
    text |= {"tokenizer.chat_template": "{{ bos_token }}", "tokenizer.chat_template.tool_use": "x"}
    said = {"tensor_data_layout": "Meta AI original pth", "rope.scaling.finetuned": True, "expert_count": 0}
    _, _, tokenizer = load_pair(tmp_path, said=said, text=text, drop=["tokenizer.ggml.token_type"])
    assert tokenizer.chat("Hi") == "<s>"
    assert tokenizer.config == dict(bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, [A]),
        ({"pre": "llama-bpe"}, [BOS, A]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [A]),
        ({"add_bos_token": True}, [BOS, A]),
        ({"add_eos_token": True}, [A, EOS]),
        ({"add_bos_token": True, "add_eos_token": True, "eos_token_id": BOS}, [BOS, A, BOS]),
    ],
)
def test_begin_and_end(text, expected, tmp_path):
    _, ours, tokenizer = load_pair(tmp_path, text=text)
    assert tokenizer.encode(" a") == expected
    assert tokenizer.encode(" a", add_special_tokens=False) == [A]
    model.save(ours, tmp_path / "saved", tokenizer)
    assert model.load(tmp_path / "saved")[1].encode(" a") == expected
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs(" a")["input_ids"] == expected


def test_tokens_of_their_own(tmp_path):
    """Those of a user are matched whole and shown; control tokens are matched and not shown. Where a text ends."""
    _, _, tokenizer = load_pair(tmp_path)
    tokens = tokenizer.encode("x<tool>y<|eot_id|>")
    assert tokens == [TOKENS.index("x"), TOOL, TOKENS.index("y"), EOT]
    assert tokenizer.decode(tokens) == "x<tool>y"
    assert tokenizer.stop == [EOS, EOT]
    _, _, tokenizer = load_pair(tmp_path, text={"eot_token_id": TOOL, "eos_token_id": EOT})
    assert tokenizer.stop == [EOT, TOOL, EOS]


SAMPLE = "It'S 12345  naïve\n\n x = a_b; HelloWorld/\r\n"
PIECES = {
    "gpt-2": [
        "It", "'", "S", " 12345", " ", " naïve", "\n\n", " x", " =", " a", "_", "b", ";", " HelloWorld", "/", "\r\n",
    ],
    "smollm": [
        "It", "'", "S", " ", "1", "2", "3", "4", "5", " ", " naïve", "\n\n", " x", " =", " a", "_", "b", ";",
        " HelloWorld", "/", "\r\n",
    ],
    "llama-bpe": [
        "It", "'S", " ", "123", "45", " ", " naïve", "\n\n", " x", " =", " a", "_b", ";", " HelloWorld", "/\r\n",
    ],
    "qwen2": [
        "It", "'S", " ", "1", "2", "3", "4", "5", " ", " naïve", "\n\n", " x", " =", " a", "_b", ";", " HelloWorld",
        "/\r\n",
    ],
    "tekken": [
        "It", "'S", " ", "1", "2", "3", "4", "5", " ", " naïve", "\n\n", " x", " =", " a", "_b", ";", " Hello", "World",
        "/\r\n",
    ],
    "gpt-4o": [
        "It'S", " ", "123", "45", " ", " naïve", "\n\n", " x", " =", " a", "_b", ";", " Hello", "World", "/\r\n",
    ],
    "deepseek-coder": [
        "It", "'", "S", " ", "1", "2", "3", "4", "5", " ", " naïve", "\n", "\n", " x", " =", " a", "_", "b", ";",
        " HelloWorld", "/", "\r", "\n",
    ],
    "deepseek-v3": [
        "It", "'S", " ", "123", "45", " ", " naïve", "\n\n", " x", " =", " a", "_b", ";", " HelloWorld", "/\r\n",
    ],
    "default": [
        "It", "'", "S", " ", "123", "45", " ", " naïve", "\n\n", " x", " ", "=", " a", "_", "b", ";", " HelloWorld",
        "/", "\r\n",
    ],
    "falcon": [
        "It", "'", "S", " ", "123", "45", " ", " naïve", "\n\n", " x", " ", "=", " a", "_", "b", ";", " HelloWorld",
        "/", "\r\n",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_splitters(name, tmp_path):
    _, _, tokenizer = load_pair(tmp_path, text={"pre": name})
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(SAMPLE)
    assert [SAMPLE[a:b] for _, (a, b) in pieces] == PIECES[name]
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE


def test_a_word_that_is_a_token_is_not_merged(tmp_path):
    """Llama 3's tokens that no merge makes."""
    text = {"tokens": [*TOKENS[:A], "xyz", *TOKENS[BOS:]], "merges": ["x q"]}
    text["tokens"][TOKENS.index("Ċ")] = "xq"  # which the merge needs
    for pre, count in (("gpt-2", 3), ("dbrx", 3), ("llama-bpe", 1)):
        _, _, tokenizer = load_pair(tmp_path, text=text | {"pre": pre})
        assert len(tokenizer.encode("xyz", add_special_tokens=False)) == count


def test_every_name_splits():
    for splitter in set(BY_NAME.values()):
        backend = make_byte_level_bpe({token: i for i, token in enumerate(TOKENS[:256])}, [], splitter)
        assert backend.decode(backend.encode(SAMPLE).ids) == SAMPLE
