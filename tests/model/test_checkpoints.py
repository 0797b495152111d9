"""Checkpoints: parity with `transformers` for each family, real weights where there are some, and bad files.

No GPT-2 weights are on the registries, so GPT-2 is tested on checkpoints that `transformers` writes with random
weights; so are BERT with its heads and a Llama that is not tied. SmolLM2, MiniLM and an ALBERT are real.
"""

import json
import re

import pytest
import torch

import model
from model import heads
from model.families import gpt2
from model.io.checkpoints import CheckpointError
from model.io.packages import locate
from tests.model.checkpoints import CACHED, SMALL_ENCODER, SMALL_T5, TINY, change_config, write_checkpoint_of
from tests.packages import needs_minilm, needs_rxnfp, needs_rxnmapper, needs_smollm2

transformers = pytest.importorskip("transformers")


def compute_their_output(theirs, tokens, mask=None):
    out = theirs(tokens, attention_mask=mask)
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("name", TINY)
def test_parity_with_transformers(name, tiny):
    _, theirs, ours = tiny(name)
    tokens = torch.randint(0, 101, (3, 37))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), compute_their_output(theirs, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_parity_when_padded(name, tiny):
    _, theirs, ours = tiny(name)
    tokens, lengths = torch.randint(0, 101, (3, 37)), torch.tensor([37, 5, 20])
    exists = torch.arange(37) < lengths[:, None]
    with torch.no_grad():
        a, b = ours(tokens, lengths), compute_their_output(theirs, tokens, exists.long())
    if a.dim() == 3:  # a class of the whole text has no padding
        a, b = a[exists], b[exists]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_gradients_equal_transformers(name, tiny):
    _, theirs, ours = tiny(name)
    tokens = torch.randint(1, 101, (2, 17))  # 0 may be padding, which transformers gives no gradient
    ours(tokens).square().mean().backward()
    compute_their_output(theirs, tokens).square().mean().backward()
    embedding = theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(
        ours.token_embedding.weight.grad, embedding, rtol=1e-3, atol=1e-4 * embedding.abs().max()
    )
    assert all(p.grad is not None for p in ours.parameters())


def test_gpt3_has_its_sizes():
    """Table 2.1: 125 million, 1.3 and 175 billion parameters."""
    for size, expected in (("small", 125e6), ("xl", 1.3e9), ("175b", 175e9)):
        with torch.device("meta"):
            count = sum(p.numel() for p in model.Transformer(gpt2.gpt3(size)).parameters())
        assert abs(count / expected - 1) < (0.2 if size == "xl" else 0.01), (size, count)
    with pytest.raises(ValueError, match="size must be one of small"):
        gpt2.gpt3("huge")


def draw_targets(labels: int, share: float):
    """Targets of which a share counts."""
    return torch.randint(0, labels, (3, 11)).where(torch.rand(3, 11) < share, -100)


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_changes_nothing(name, tiny):
    """A prompt, then token by token, past the windows."""
    ours = tiny(name).ours
    tokens = torch.randint(0, 101, (2, 30))
    cache = ours.new_cache(2, 30)
    with torch.no_grad():
        whole = ours(tokens)
        parts = [
            ours.compute_logits(ours.encode(piece, cache=cache))
            for piece in (tokens[:, :17], *tokens[:, 17:].split(1, 1))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


LOSSES = {
    "single": ("SequenceClassification", dict(num_labels=5), lambda: torch.randint(0, 5, (3,))),
    "multi": (
        "SequenceClassification", dict(num_labels=5, problem_type="multi_label_classification"),
        lambda: torch.randint(0, 2, (3, 5)).float(),
    ),
    "regression": ("SequenceClassification", dict(num_labels=1), lambda: torch.randn(3)),
    "tag": ("TokenClassification", dict(num_labels=7), lambda: draw_targets(7, 0.7)),
    "masked": ("MaskedLM", {}, lambda: draw_targets(101, 0.3)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_transformers(name, tmp_path, monkeypatch):
    task, options, make_targets = LOSSES[name]
    monkeypatch.setitem(TINY, "one", lambda: getattr(transformers, f"BertFor{task}")(
        transformers.BertConfig(**SMALL_ENCODER, **options)))  # fmt: skip
    theirs = write_checkpoint_of("one", tmp_path)
    ours, _ = model.load(tmp_path)
    tokens, targets = torch.randint(1, 101, (3, 11)), make_targets()
    expected, got = theirs(tokens, labels=targets).loss, heads.compute_loss(ours.config, ours(tokens), targets)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    expected.backward(), got.backward()
    torch.testing.assert_close(
        ours.token_embedding.weight.grad, theirs.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-5
    )


def test_loss_of_answers_equals_transformers(tiny):
    _, theirs, ours = tiny("bert_QuestionAnswering")
    tokens, at = torch.randint(1, 101, (3, 11)), torch.randint(0, 11, (3, 2))
    expected = theirs(tokens, start_positions=at[:, 0], end_positions=at[:, 1]).loss
    torch.testing.assert_close(heads.compute_loss(ours.config, ours(tokens), at), expected, rtol=1e-5, atol=1e-5)


def test_labels_are_read(tmp_path):
    write_checkpoint_of("bert_TokenClassification", tmp_path)
    change_config(tmp_path, id2label={str(i): f"tag {i}" for i in range(7)})
    assert model.load(tmp_path)[0].config.labels == tuple(f"tag {i}" for i in range(7))
    change_config(tmp_path, id2label={"1": "a", "2": "b"})
    with pytest.raises(CheckpointError, match="id2label must number the labels from 0 on"):
        model.load(tmp_path)


def test_token_types(tiny):
    _, theirs, ours = tiny("bert")
    tokens, types = torch.randint(0, 101, (2, 9)), torch.randint(0, 2, (2, 9))
    with torch.no_grad():
        b = theirs(tokens, token_type_ids=types).last_hidden_state
        torch.testing.assert_close(ours.encode(tokens, token_types=types), b, rtol=1e-4, atol=1e-4)


# Reactions as SMILES (a substitution, a Suzuki coupling); a token is an atom, a bond, a bracket or a digit.
REACTIONS = [
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1",
]
SMILES = re.compile(r"\[[^\]]+]|Br|Cl|>>|[A-Za-z]|[()=#+./:~@?*$\\-]|%[0-9]{2}|[0-9]")


@needs_rxnmapper
def test_a_real_albert_knows_masked_tokens():
    """Each token of a reaction masked by itself: nine of ten are found again, and the logits are transformers'."""
    path = locate("rxnmapper")
    ours, _ = model.load(path)
    theirs = transformers.AlbertForMaskedLM.from_pretrained(path).eval()
    vocabulary = {word: i for i, word in enumerate((path / "vocab.txt").read_text().splitlines())}
    for reaction in REACTIONS:
        words = ["[CLS]", *SMILES.findall(reaction), "[SEP]"]
        assert "".join(words[1:-1]) == reaction
        tokens = torch.tensor([vocabulary[word] for word in words])
        n = torch.arange(len(words) - 2)
        masked = tokens.repeat(len(n), 1)
        masked[n, n + 1] = vocabulary["[MASK]"]
        with torch.no_grad():
            logits = ours(masked)
            torch.testing.assert_close(logits, theirs(masked).logits, rtol=1e-4, atol=1e-4)
        assert (logits[n, n + 1].argmax(-1) == tokens[1:-1]).float().mean() > 0.9


RXNFP = {"rxnfp": "BertModel", "rxnfp-masked": "BertForMaskedLM", "rxnfp-classes": "BertForSequenceClassification"}


@needs_rxnfp
@pytest.mark.parametrize("name", RXNFP)
def test_real_berts_of_reactions(name):
    """Their config.json lacks what they are, or says another number of labels than it names; the logits are those of
    transformers, and masked tokens are found again."""
    path = locate(name)
    ours, _ = model.load(name)
    theirs = getattr(transformers, RXNFP[name]).from_pretrained(path, **({"num_labels": 50} if "cl" in name else {}))
    vocabulary = {word: i for i, word in enumerate((path / "vocab.txt").read_text().splitlines())}
    words = ["[CLS]", *SMILES.findall(REACTIONS[0]), "[SEP]"]
    tokens = torch.tensor([[vocabulary[word] for word in words]])
    tokens[0, 5] = vocabulary["[MASK]"]
    with torch.no_grad():
        found, expected = ours(tokens), compute_their_output(theirs.eval(), tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if name == "rxnfp-classes":
        assert len(ours.config.labels) == 50
    if name == "rxnfp-masked":
        assert found[0, 5].argmax() == vocabulary[words[5]]


def test_shards_and_bin(tmp_path):
    theirs = write_checkpoint_of("llama", tmp_path / "shards", max_shard_size="50KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    ours, _ = model.load(tmp_path / "shards")
    tokens = torch.randint(0, 101, (1, 9))
    expected = compute_their_output(theirs, tokens)
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-4, atol=1e-4)

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text((tmp_path / "shards" / "config.json").read_text())
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    ours, _ = model.load(tmp_path / "bin")
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-4, atol=1e-4)


def shard_bin(path, theirs):
    """The weights as older versions of transformers write large ones."""
    weights = list(theirs.state_dict().items())
    parts = {"pytorch_model-00001-of-00002.bin": weights[:5], "pytorch_model-00002-of-00002.bin": weights[5:]}
    for file, part in parts.items():
        torch.save(dict(part), path / file)
    places = {name: file for file, part in parts.items() for name, _ in part}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (path / "model.safetensors").unlink()


def test_shards_of_bin(tmp_path):
    theirs = write_checkpoint_of("llama", tmp_path)
    shard_bin(tmp_path, theirs)
    tokens = torch.randint(0, 101, (1, 9))
    torch.testing.assert_close(
        model.load(tmp_path)[0](tokens), compute_their_output(theirs, tokens), rtol=1e-4, atol=1e-4
    )
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin: no such file, but the index names it"):
        model.load(tmp_path)


def test_gpt_oss_in_mxfp4(tmp_path):
    """As OpenAI ships it: blocks of 32 numbers of four bits with a power of two each."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = transformers.GptOssConfig(
        vocab_size=101, hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, head_dim=20, num_local_experts=3, num_experts_per_tok=2, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    theirs.save_pretrained(tmp_path)
    packed = {}
    for i, layer in enumerate(theirs.model.layers):
        for name, p in dict(gate_up_proj=layer.mlp.experts.gate_up_proj, down_proj=layer.mlp.experts.down_proj).items():
            experts, inner, outer = p.shape
            blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
            scales = torch.randint(122, 128, (experts, outer, inner // 32), dtype=torch.uint8)
            p.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            stem = f"model.layers.{i}.mlp.experts.{name}"
            packed |= {f"{stem}_blocks": blocks, f"{stem}_scales": scales, stem: None}

    def pack(tensors):
        tensors.update(packed)
        for name in [name for name, x in tensors.items() if x is None]:
            del tensors[name]

    change_tensors(tmp_path, pack)
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    ours, _ = model.load(tmp_path)
    tokens = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    change_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj_scales"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj_scales is missing"):
        model.load(tmp_path)


def test_a_decoder_without_its_head(tmp_path):
    """Of which embeddings are made; what we write of it has none either."""
    config = transformers.LlamaConfig(**SMALL_ENCODER)
    theirs = transformers.LlamaModel(config).eval()
    theirs.save_pretrained(tmp_path / "a")
    ours, _ = model.load(tmp_path / "a")
    tokens = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"model must be a causal language model .* got a llama without its head"):
        model.generate(ours, [[1]], 1)
    model.save(ours, tmp_path / "b")
    assert model.load(tmp_path / "b")[0].config == ours.config
    again = transformers.AutoModel.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).last_hidden_state, theirs(tokens).last_hidden_state)


@pytest.mark.parametrize(
    ("architecture", "config", "own"),
    [
        ("LlamaForSequenceClassification", lambda: transformers.LlamaConfig(**SMALL_ENCODER), "LlamaForCausalLM"),
        ("LlamaForTokenClassification", lambda: transformers.LlamaConfig(**SMALL_ENCODER), "LlamaForCausalLM"),
        ("BertForMultipleChoice", lambda: transformers.BertConfig(**SMALL_ENCODER), "BertModel"),
        ("T5ForSequenceClassification", lambda: transformers.T5Config(**SMALL_T5), "T5ForConditionalGeneration"),
    ],
)
def test_a_head_that_is_not_known_is_named(architecture, config, own, tmp_path):
    getattr(transformers, architecture)(config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"\(the checkpoint is a {architecture}, read as a {own}\)$"):
        model.load(tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def damage_truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_pickle(path):
    (path / "model.safetensors").unlink()
    torch.save({"x": Evil()}, path / "pytorch_model.bin")


def damage_half_bin(path):
    (path / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1000)}, path / "pytorch_model.bin")
    data = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def change_tensors(path, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


DAMAGE = {
    "no_config": (lambda p: (p / "config.json").unlink(), "config.json: no such file"),
    "config_not_json": (lambda p: (p / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config_no_object": (
        lambda p: (p / "config.json").write_text("[]"),
        "config.json: must hold a JSON object, got a list",
    ),
    "index_without_files": (
        lambda p: (p / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json: has no weight_map",
    ),
    "quantised": (
        lambda p: change_config(p, quantization_config={"quant_method": "gptq", "bits": 4}),
        "weights quantised by 'gptq' are not known here",
    ),
    "quantised_somehow": (
        lambda p: change_config(p, quantization_config={"load_in_8bit": True}),
        "weights quantised by an unnamed method are not known here",
    ),
    "mxfp4_of_another": (
        lambda p: change_config(p, quantization_config={"quant_method": "mxfp4"}),
        "weights quantised by 'mxfp4' are not known here",
    ),
    "unknown_family": (lambda p: change_config(p, model_type="mamba"), "model_type must be one of llama, bert, gpt2"),
    "rope_scaling": (
        lambda p: change_config(p, rope_parameters={"rope_type": "proportional"}),
        "rope_type must be one of default, linear, dynamic, llama3, longrope, yarn, got 'proportional'",
    ),
    "no_weights": (lambda p: (p / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
    "truncated": (damage_truncate, "model.safetensors: truncated"),
    "truncated_bin": (damage_half_bin, "pytorch_model.bin"),
    "pickle_with_code": (damage_pickle, "pytorch_model.bin: refused"),
    "missing": (
        lambda p: change_tensors(p, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "tensor layers.1.mlp.up_proj.weight is missing",
    ),
    "surplus": (lambda p: change_tensors(p, lambda t: t.update(extra=torch.zeros(1))), "does not have: extra"),
    "shape": (
        lambda p: change_tensors(p, lambda t: t.update({"model.norm.weight": torch.zeros(47)})),
        r"tensor norm.weight must be \(48,\), got \(47,\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_checkpoints(name, tmp_path, capfd):
    write_checkpoint_of("llama", tmp_path)
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        model.load(tmp_path)
    assert "ran" not in capfd.readouterr().out


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="nothing: no such file or directory"):
        model.load(tmp_path / "nothing")
    known = "nor one of the names minilm, rampart, rxnfp, rxnfp-classes, rxnfp-masked, rxnmapper, smollm2, whisper"
    with pytest.raises(CheckpointError, match=f"smolm2: no such file or directory, {known}"):
        model.load("smolm2")
    with pytest.raises(CheckpointError, match=r"meta-llama/Llama-3\.2-1B: no such .*; nothing is downloaded"):
        model.load("meta-llama/Llama-3.2-1B")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(CheckpointError, match="a checkpoint is a directory"):
        model.load(tmp_path / "x.txt")


def test_bad_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(CheckpointError, match="truncated or not a GGUF"):
        model.load(tmp_path / "x.gguf")


@needs_smollm2
def test_truncated_gguf(tmp_path):
    with locate("smollm2").open("rb") as file:
        (tmp_path / "half.gguf").write_bytes(file.read(20_000_000))
    with pytest.raises(CheckpointError, match="truncated or not a GGUF"):
        model.load(tmp_path / "half.gguf")


def test_a_tokeniser_that_does_not_fit(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    write_checkpoint_of("llama", tmp_path)
    vocab = {f"w{i}": i for i in range(102)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "w0")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="the tokeniser has 102 tokens, the model an embedding of 101"):
        model.load(tmp_path)


def test_a_truncated_tokeniser(tmp_path):
    write_checkpoint_of("llama", tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    with pytest.raises(ValueError, match=r"tokenizer.json: truncated or not a tokeniser"):
        model.load(tmp_path)


PROMPTS = [
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "<|im_start|>user\nName 3 colours.<|im_end|>\n<|im_start|>assistant\n",
]


@needs_smollm2
def test_smollm2_continues_as_in_transformers():
    """20 greedy tokens on each prompt. transformers dequantises the file itself, so the whole path is compared."""
    path = locate("smollm2")
    ours, tokenizer = model.load(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    state = dict(theirs.named_parameters())
    assert torch.equal(ours.blocks[7].attention.k.weight, state["model.layers.7.self_attn.k_proj.weight"])
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt)
        assert tokens == their_tokenizer(prompt)["input_ids"]
        expected = theirs.generate(
            torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), max_new_tokens=20, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, len(tokens) :]  # fmt: skip
        assert model.generate(ours, [tokens], 20)[0] == expected.tolist()


@needs_minilm
def test_minilm_cosine():
    ours, tokenizer = model.load(locate("minilm"))
    assert tokenizer.encode("Hello, my dog is cute") == [101, 7592, 1010, 2026, 3899, 2003, 10140, 102]
    from model.inference.embed import embed

    vectors = embed(ours, tokenizer, ["A man is eating food.", "A man is eating a piece of bread.", "x"])
    assert abs((vectors[0] @ vectors[1]).item() - 0.7553) < 1e-4
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    alone = embed(ours, tokenizer, ["x"])  # padding does not show
    torch.testing.assert_close(alone[0], vectors[2], rtol=1e-5, atol=1e-6)


@needs_minilm
def test_minilm_equals_transformers():
    path = locate("minilm")
    ours, tokenizer = model.load(path)
    theirs = transformers.BertModel.from_pretrained(path).eval()
    tokens = torch.tensor([tokenizer.encode("The quick brown fox jumps over the lazy dog.")])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).last_hidden_state, rtol=1e-4, atol=1e-5)
