"""Sentence embeddings, as a checkpoint's sentence-transformers modules say, on random weights."""

import json

import pytest
import torch

import model
from model.inference.embed import embed
from model.inference.predict import classify
from model.io.checkpoints import CheckpointError
from model.io.tokenizer import Tokenizer
from tests.model.checkpoints import write_checkpoint_of
from tests.model.fakes import BERT, Says, make_small_tokenizer

transformers = pytest.importorskip("transformers")
TEXTS = ["new york is large", "paris", "paris is larger than new york"]
NAMES = {
    "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens", "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens", "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}  # fmt: skip


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


NORMALIZE = ("2_Normalize", "Normalize")


def write_checkpoint(path, pooling=None, more_modules=(NORMALIZE,), **transformer):
    """A tiny BERT as sentence-transformers writes it, and that of transformers."""
    theirs = write_checkpoint_of("bert", path)
    make_small_tokenizer().write(path)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *more_modules]
    modules = [
        dict(idx=i, name=str(i), path=folder, type=f"sentence_transformers.models.{kind}")
        for i, (folder, kind) in enumerate(modules)
    ]
    write_json(path / "modules.json", modules)
    write_json(path / "1_Pooling" / "config.json", pooling or dict(pooling_mode_mean_tokens=True))
    write_json(path / "sentence_bert_config.json", dict(max_seq_length=5, do_lower_case=False) | transformer)
    return theirs


def pool_hidden(hidden, mode):
    """Pooling of the hidden states (seq, width) of one text."""
    if mode == "weightedmean":
        weights = torch.arange(1.0, len(hidden) + 1)[:, None]
        return (hidden * weights).sum(0) / weights.sum()
    return {
        "cls": hidden[0], "max": hidden.max(0).values, "mean": hidden.mean(0), "lasttoken": hidden[-1],
        "mean_sqrt_len_tokens": hidden.sum(0) / len(hidden) ** 0.5,
    }[mode]  # fmt: skip


def compute_expected(theirs, texts, *modes, longest=None):
    rows = []
    for text in texts:
        tokens = make_small_tokenizer().encode(text)
        if longest is not None and len(tokens) > longest:
            tokens = tokens[: longest - 1] + tokens[-1:]  # [SEP] stays
        with torch.no_grad():
            hidden = theirs(torch.tensor([tokens])).last_hidden_state[0]
        rows.append(torch.cat([pool_hidden(hidden, mode) for mode in modes]))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", NAMES)
@pytest.mark.parametrize("new", [False, True])
def test_the_pooling_is_that_of_the_checkpoint(mode, new, tmp_path):
    """As older and as newer versions of sentence-transformers write it."""
    theirs = write_checkpoint(tmp_path, dict(pooling_mode=mode) if new else {n: k == mode for k, n in NAMES.items()})
    assert_close(embed(*model.load(tmp_path), TEXTS), compute_expected(theirs, TEXTS, mode))


@pytest.mark.parametrize("pooling", [dict(pooling_mode_cls_token=True, pooling_mode_mean_tokens=True),
                                     dict(pooling_mode=["cls", "mean"])])  # fmt: skip
def test_several_poolings_stand_side_by_side(pooling, tmp_path):
    theirs = write_checkpoint(tmp_path, pooling)
    assert_close(embed(*model.load(tmp_path), TEXTS), compute_expected(theirs, TEXTS, "cls", "mean"))


def test_a_checkpoint_that_says_nothing_has_the_mean(tmp_path):
    theirs = write_checkpoint_of("bert", tmp_path)
    ours, _ = model.load(tmp_path)
    assert_close(embed(ours, make_small_tokenizer(), TEXTS), compute_expected(theirs, TEXTS, "mean"))


@pytest.mark.parametrize(("modules", "normalize"), [((), None), ((NORMALIZE,), False)])
def test_without_norms(modules, normalize, tmp_path):
    theirs = write_checkpoint(tmp_path, more_modules=modules)
    vectors = embed(*model.load(tmp_path), TEXTS, normalize=normalize)
    assert (vectors.norm(dim=-1) - 1).abs().min() > 0.1
    assert_close(torch.nn.functional.normalize(vectors), compute_expected(theirs, TEXTS, "mean"))


def test_long_texts_are_cut_when_asked(tmp_path):
    """To what the checkpoint was trained on, its special tokens among them; or to its context."""
    theirs = write_checkpoint(tmp_path)
    ours, tokenizer = model.load(tmp_path)
    assert_close(embed(ours, tokenizer, TEXTS), compute_expected(theirs, TEXTS, "mean"))
    assert_close(embed(ours, tokenizer, TEXTS, truncate=True), compute_expected(theirs, TEXTS, "mean", longest=5))
    long = [TEXTS[0], "paris " * 70]
    with pytest.raises(ValueError, match=r"sentences\[1\] must fit the context of 64 tokens, got 72; .*truncate"):
        embed(ours, tokenizer, long)
    (tmp_path / "sentence_bert_config.json").unlink()
    ours, tokenizer = model.load(tmp_path)
    assert_close(embed(ours, tokenizer, long, truncate=True), compute_expected(theirs, long, "mean", longest=64))


def test_classes_of_long_texts():
    """One of them refuses no batch, where it may be cut."""
    says = Says([[0.0, 1.0], [1.0, 0.0]], task="classify", labels=("a", "b"))
    seen = []
    says.__class__ = type("Seen", (Says,), {"__call__": lambda self, *args: seen.append(args) or self.logits})
    long = ["paris", "new " * 40]
    with pytest.raises(ValueError, match=r"texts\[1\] must fit the context of 32 tokens, got 42; .*truncate"):
        classify(says, make_small_tokenizer(), long)
    assert len(classify(says, make_small_tokenizer(), long, truncate=True)) == 2
    tokens, lengths = seen[0]
    assert lengths.tolist() == [3, 32]
    assert tokens[-1] == 1


def test_a_bare_text_is_not_its_letters(tmp_path):
    write_checkpoint(tmp_path)
    ours, tokenizer = model.load(tmp_path)
    with pytest.raises(ValueError, match=r"sentences must be a list of texts, got the text 'paris'"):
        embed(ours, tokenizer, "paris")
    with pytest.raises(ValueError, match=r"texts must be a list of texts, got the text 'paris'"):
        classify(Says([[0.0]], task="classify", labels=("a",)), tokenizer, "paris")


def test_prompts(tmp_path):
    theirs = write_checkpoint(tmp_path)
    write_json(tmp_path / "config_sentence_transformers.json",
               dict(prompts={"query": "paris than ", "other": "x"}, default_prompt_name="query"))  # fmt: skip
    ours, tokenizer = model.load(tmp_path)
    assert_close(
        embed(ours, tokenizer, TEXTS), compute_expected(theirs, [f"paris than {text}" for text in TEXTS], "mean")
    )
    assert_close(embed(ours, tokenizer, TEXTS, prompt=""), compute_expected(theirs, TEXTS, "mean"))
    assert_close(
        embed(ours, tokenizer, TEXTS, prompt="is "), compute_expected(theirs, [f"is {text}" for text in TEXTS], "mean")
    )


def test_lower_case(tmp_path):
    theirs = write_checkpoint(tmp_path, do_lower_case=True)
    assert_close(embed(*model.load(tmp_path), ["New YORK"]), compute_expected(theirs, ["new york"], "mean"))


@pytest.mark.parametrize("modes", [["cls", "max"], ["max", "cls"], "lasttoken"])
def test_what_was_saved_is_what_was_there(modes, tmp_path):
    write_checkpoint(tmp_path / "a", dict(pooling_mode=modes), do_lower_case=True)
    write_json(tmp_path / "a" / "config_sentence_transformers.json",
               dict(prompts={"query": "paris "}, default_prompt_name="query"))  # fmt: skip
    ours, tokenizer = model.load(tmp_path / "a")
    model.save(ours, tmp_path / "b", tokenizer)
    again, _ = model.load(tmp_path / "b")
    assert again.config == ours.config
    assert torch.equal(embed(again, tokenizer, TEXTS, truncate=True), embed(ours, tokenizer, TEXTS, truncate=True))


@pytest.mark.parametrize(
    ("pooling", "modules", "message"),
    [
        (dict(pooling_mode="cls", include_prompt=False), (), "include_prompt must be True, got False"),
        (dict(pooling_mode="median"), (), "pooling_mode must be one of cls, max, .*, got 'median'"),
        (
            None,
            [("3_Dense", "Dense")],
            r"modules\.json: modules must be Transformer, Pooling, Normalize, Dropout, got Dense; without",
        ),
    ],
)
def test_what_is_not_known_is_named(pooling, modules, message, tmp_path):
    write_checkpoint(tmp_path, pooling, modules)
    with pytest.raises(CheckpointError, match=message):
        model.load(tmp_path)


def test_wrong_calls_are_named(tmp_path):
    write_checkpoint(tmp_path)
    ours, tokenizer = model.load(tmp_path)
    with pytest.raises(ValueError, match="sentences must hold at least one, got none"):
        embed(ours, tokenizer, [])
    bare = Tokenizer.train("a text", 260)
    with pytest.raises(ValueError, match=r"sentences\[1\] must have at least one token, got none"):
        embed(model.Transformer(model.Config(**{**vars(BERT), "vocab_size": 300})), bare, ["a", ""])
    with pytest.raises(ValueError, match="model must be one whose hidden states are those of one text, got a t5"):
        embed(Says([[0.0]], family="t5", decoder_layers=1), tokenizer, ["paris"])
