"""Every field of a config.json that changes results is obeyed, as in transformers, or refused by its name."""

import json
from dataclasses import replace

import pytest
import torch

import model
from model.families import FAMILIES
from model.io.checkpoints import CheckpointError
from tests.model.checkpoints import ENCODER_DECODERS, TINY, change_config, write_checkpoint_of

transformers = pytest.importorskip("transformers")


def make_changed(name, changes):
    """The tiny model of `transformers`, made with another config."""
    kind, config = type((TINY | ENCODER_DECODERS)[name]()), (TINY | ENCODER_DECODERS)[name]().config
    config = type(config)(**json.loads(config.to_json_string(use_diff=False)) | changes)
    config._attn_implementation = "eager"
    return kind(config)


def load_pair(name, changes, path, monkeypatch):
    """Theirs and ours of a checkpoint with other fields; ours raises where it refuses them."""
    monkeypatch.setitem(TINY, "one", lambda: make_changed(name, changes))
    return write_checkpoint_of("one", path), model.load(path)[0]


OBEYED = [
    ("llama", dict(hidden_act="gelu")),
    ("llama", dict(hidden_act="gelu_new")),
    ("llama", dict(hidden_act="gelu_pytorch_tanh")),
    ("llama", dict(hidden_act="gelu_fast")),
    ("llama", dict(hidden_act="swish")),
    ("llama", dict(hidden_act="relu")),
    ("mistral", dict(hidden_act="gelu_pytorch_tanh")),
    ("gemma2", dict(hidden_activation="gelu")),
    ("gpt2", dict(activation_function="silu")),
    ("bert", dict(hidden_act="silu")),
    ("albert_MaskedLM", dict(hidden_act="gelu_pytorch_tanh")),
    ("marian", dict(activation_function="gelu_new")),
    ("bert", dict(is_decoder=True)),
    ("bert_MaskedLM", dict(is_decoder=True)),
    ("bert_TokenClassification", dict(is_decoder=True)),
    ("bert_SequenceClassification", dict(tie_word_embeddings=False)),
    ("gemma2", dict(attn_logit_softcapping=None, final_logit_softcapping=None)),
    ("gpt_neo", dict(attention_types=[[["local"], 4]], attention_layers=["local"] * 4, window_size=5)),
    ("gpt_neo", dict(attention_types=[[["global"], 4]], attention_layers=["local"] * 4, window_size=5)),
]


@pytest.mark.parametrize(("name", "changes"), OBEYED)
def test_what_is_obeyed(name, changes, tmp_path, monkeypatch):
    theirs, ours = load_pair(name, changes, tmp_path / "theirs", monkeypatch)
    tokens = torch.randint(1, 101, (2, 21))
    more = dict(decoder_input_ids=tokens[:, :9]) if name in ENCODER_DECODERS else {}
    with torch.no_grad():
        expected = theirs(input_ids=tokens, **more)[0]
        torch.testing.assert_close(ours(tokens, *(x for x in more.values())), expected, rtol=1e-4, atol=1e-4)
        model.save(ours, tmp_path / "ours")
        again = type(theirs).from_pretrained(tmp_path / "ours").eval()
        torch.testing.assert_close(again(input_ids=tokens, **more)[0], expected, rtol=1e-4, atol=1e-4)
    assert model.load(tmp_path / "ours")[0].config == ours.config


REFUSED = [
    ("llama", dict(hidden_act="quick_gelu"), "hidden_act must be one of gelu, .*, got 'quick_gelu'"),
    ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention must be False, got True"),
    ("gpt_oss", dict(output_router_logits=True), "output_router_logits must be False, got True"),
    ("bert_MaskedLM", dict(tie_word_embeddings=False), "tie_word_embeddings must be True, got False"),
    ("albert_MaskedLM", dict(tie_word_embeddings=False), "tie_word_embeddings must be True, got False"),
    ("gpt2", dict(embd_pdrop=0.3), "embd_pdrop must be 0.1, got 0.3"),
    ("gpt_neo", dict(embed_dropout=0.3), "embed_dropout must be 0.0, got 0.3"),
    ("t5", dict(dense_act_fn="gelu"), "dense_act_fn must be relu, got gelu"),
    ("marian", dict(encoder_layerdrop=0.2), "encoder_layerdrop must be 0.0, got 0.2"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_refused(name, changes, message, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=message):
        load_pair(name, changes, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", dict(add_cross_attention=True), "add_cross_attention must be False, got True"),
        ("mistral", dict(layer_types=["full_attention"] * 2), "layer_types of a mistral must be sliding_attention"),
        ("gpt_neo", dict(attention_layers=["global"] * 3), "attention_types must be of the 4 layers, got 3"),
    ],
)
def test_what_transformers_does_not_make_either(name, changes, message, tmp_path):
    write_checkpoint_of(name, tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        model.load(tmp_path)


def remove_fields(path, *names):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({name: x for name, x in config.items() if name not in names}))


@pytest.mark.parametrize("whole", [0, 1, 2, 3, 28])
def test_qwen3_has_windows_from_a_layer_on(whole, tmp_path, monkeypatch):
    """Its older checkpoints have no layer_types."""
    monkeypatch.setitem(TINY, "one", lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=101, hidden_size=48, intermediate_size=72, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=whole,
    )))  # fmt: skip
    theirs = write_checkpoint_of("one", tmp_path)
    remove_fields(tmp_path, "layer_types")
    ours, tokens = model.load(tmp_path)[0], torch.randint(0, 101, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in TINY | ENCODER_DECODERS])
def test_a_field_that_is_not_there_is_what_transformers_takes(name):
    """Or the field is required."""
    family, theirs = FAMILIES[name], type((TINY | ENCODER_DECODERS)[name]().config)
    said = json.loads(theirs().to_json_string(use_diff=False))
    said |= dict(id2label=None, architectures=None)
    required, missed = set(), 0
    for field in said:
        if field in ("architectures", "model_type", "rope_parameters"):
            continue
        less = {key: value for key, value in said.items() if key != field}
        try:
            ours = family.config(less)
        except KeyError as error:
            required.add((field, *error.args))
            continue
        expected = json.loads(theirs(**less).to_json_string(use_diff=False)) | dict(id2label=None, architectures=None)
        assert ours == family.config(expected), field
        missed += 1
    assert missed > 5
    assert all(field == named for field, named in required)


def test_gpt_oss_is_stretched_where_nothing_is_said():
    said = json.loads(transformers.GptOssConfig().to_json_string(use_diff=False))
    less = {name: value for name, value in said.items() if name != "rope_parameters"}
    assert FAMILIES["gpt_oss"].config(less) == FAMILIES["gpt_oss"].config(said)


# name: what transformers calls dropout of the stream, of attention's weights, of the head, and where it is another
DROPOUTS = {
    "llama": dict(attention_dropout=0.3),
    "mistral": dict(attention_dropout=0.3),
    "qwen3": dict(attention_dropout=0.3),
    "gemma2": dict(attention_dropout=0.3),
    "gpt_oss": dict(attention_dropout=0.3),
    "gpt2": dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.3),
    "gpt_neo": dict(resid_dropout=0.2, embed_dropout=0.2, attention_dropout=0.3),
    "bert": dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3),
    "bert_SequenceClassification": dict(
        hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, classifier_dropout=0.4
    ),
    "albert_TokenClassification": dict(
        hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, classifier_dropout_prob=0.4
    ),
    "marian": dict(dropout=0.2, attention_dropout=0.3, activation_dropout=0.25),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts(name, tmp_path, monkeypatch):
    _, ours = load_pair(name, DROPOUTS[name], tmp_path / "theirs", monkeypatch)
    config = ours.config
    assert config.dropout == (0.2 if len(DROPOUTS[name]) > 1 else 0.0)
    assert config.attention_dropout_p == 0.3
    assert config.classifier_dropout == (0.4 if "Classification" in name else 0.0)
    assert config.activation_dropout == DROPOUTS[name].get("activation_dropout", 0.0)
    model.save(ours, tmp_path / "ours")
    said = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {field: said[field] for field in DROPOUTS[name]} == DROPOUTS[name]
    assert model.load(tmp_path / "ours")[0].config == config


def test_a_classifier_without_its_own_has_the_streams_dropout(tmp_path):
    write_checkpoint_of("bert_TokenClassification", tmp_path)
    change_config(tmp_path, hidden_dropout_prob=0.25)
    assert model.load(tmp_path)[0].config.classifier_dropout == 0.25


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_dropout_of_ours_comes_back(name, tmp_path):
    write_checkpoint_of(name, tmp_path / "a")
    ours = model.Transformer(replace(model.load(tmp_path / "a")[0].config, dropout=0.2))
    model.save(ours, tmp_path / "b")
    assert model.load(tmp_path / "b")[0].config == ours.config


@pytest.mark.parametrize("field", ["attention_dropout", "classifier_dropout", "activation_dropout"])
def test_each_dropout_drops(field, tmp_path):
    """Where it alone is over zero, what training computes is another each time; and never otherwise."""
    write_checkpoint_of("bert_TokenClassification", tmp_path)
    plain, _ = model.load(tmp_path)
    none = dict(dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)
    tokens = torch.randint(1, 101, (2, 9))
    for changes, changing in ((none, False), (none | {field: 0.5}, True)):
        ours = model.Transformer(replace(plain.config, **changes))
        ours.load_state_dict(plain.state_dict())
        assert torch.equal(ours.train()(tokens), ours(tokens)) != changing
        assert torch.equal(ours.eval()(tokens), plain(tokens))
    with pytest.raises(ValueError, match=rf"{field} must be in \[0, 1\), got 1"):
        replace(plain.config, **{field: 1})
