"""Models of transformers, small and random, under attn_implementation="flashattn" as under "eager"."""

import pytest
import torch

from model.io.packages import locate
from tests.packages import needs_minilm

transformers = pytest.importorskip("transformers")

import flashattn.compat.transformers as compat  # noqa: E402
from flashattn import backends  # noqa: E402

compat.register()

SIZES = dict(vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
DECODER = SIZES | dict(num_key_value_heads=2, head_dim=12, max_position_embeddings=128, pad_token_id=0)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=48, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel, config


MODELS = {
    "gpt2": gpt2,
    "bert": lambda: (transformers.BertForMaskedLM, transformers.BertConfig(**SIZES)),
    "llama": lambda: (transformers.LlamaForCausalLM, transformers.LlamaConfig(**DECODER)),
    "mistral": lambda: (transformers.MistralForCausalLM, transformers.MistralConfig(**DECODER, sliding_window=6)),
    "gemma2": lambda: (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(**DECODER, sliding_window=6, query_pre_attn_scalar=12, attn_logit_softcapping=3.0),
    ),
    "gpt_oss": lambda: (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(
            **DECODER, sliding_window=6, num_local_experts=4, num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "t5": lambda: (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=99, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
    ),
}  # fmt: skip
CAUSAL = [name for name in MODELS if name not in ("bert", "t5")]


def make_model(name: str):
    torch.use_deterministic_algorithms(False)  # poisoned memory would be read by the models' own empty parameters
    torch.manual_seed(0)
    kind, config = MODELS[name]()
    config._attn_implementation = "eager"
    config.dropout_rate = config.attention_dropout = 0.0
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than they are initialised, so that attention matters
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


PADDINGS = {"none": None, "right": ((0, 20), (0, 13), (0, 1)), "left": ((0, 20), (7, 20), (19, 20))}


def make_batch(padding: str):
    torch.manual_seed(1)
    tokens = torch.randint(3, 99, (3, 20))
    if PADDINGS[padding] is None:
        return tokens, None
    position = torch.arange(20)
    mask = torch.stack([(position >= begin) & (position < end) for begin, end in PADDINGS[padding]])
    return tokens, mask.long()


def run(model, implementation: str, tokens, mask, **others):
    """Logits of tokens that exist, and gradients of every parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    if model.config.is_encoder_decoder:
        others |= dict(decoder_input_ids=tokens[:, :9], decoder_attention_mask=None if mask is None else mask[:, -9:])
    logits = model(input_ids=tokens, attention_mask=mask, **others).logits
    if mask is not None:
        exists = mask[:, -9:] if model.config.is_encoder_decoder else mask
        logits = logits[exists.bool()]
    logits.double().log_softmax(-1)[..., 5].sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, eager):
    torch.testing.assert_close(ours[0], eager[0], rtol=1e-4, atol=1e-4)
    assert ours[1].keys() == eager[1].keys()
    for name, gradient in eager[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=1e-4, atol=1e-4 * max(scale, 1), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_as_eager(name, padding):
    model, (tokens, mask) = make_model(name), make_batch(padding)
    assert_same(run(model, "flashattn", tokens, mask), run(model, "eager", tokens, mask))


def make_packed_batch():
    """Three sequences in one row, and each alone."""
    lengths, (tokens, _) = (9, 1, 10), make_batch("none")
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return tokens[:1], positions, tokens[:1].split(lengths, 1)


@pytest.mark.parametrize("name", [n for n in CAUSAL if n != "gpt_oss"])  # it does not look at positions for its mask
def test_packed_by_position_ids(name):
    model, (tokens, positions, _) = make_model(name), make_packed_batch()
    options = dict(position_ids=positions, use_cache=False)
    assert_same(run(model, "flashattn", tokens, None, **options), run(model, "eager", tokens, None, **options))


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_by_cu_seq_lens(name):
    """As each sequence alone under eager."""
    model, (tokens, positions, alone) = make_model(name), make_packed_batch()
    starts = torch.tensor([0, 9, 10, 20], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=10, max_length_k=10)
    ours = run(model, "flashattn", tokens, None, position_ids=positions, use_cache=False, **packed)
    each = [run(model, "eager", x, None, use_cache=False) for x in alone]
    logits = torch.cat([logits for logits, _ in each], 1)
    assert_same(ours, (logits, {n: sum(gradients[n] for _, gradients in each) for n in ours[1]}))


def test_cu_seq_lens_are_given_together():
    x, starts = torch.zeros(1, 2, 5, 8), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_k must be given with cu_seq_lens_q"):
        compat.attention_forward(torch.nn.Module(), x, x, x, None, cu_seq_lens_q=starts)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "bert"])
def test_generation_as_eager(name, cache):
    model, (tokens, mask) = make_model(name), make_batch("left")
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    if cache == "static":
        options |= dict(cache_implementation="static", disable_compile=True)
    results = []
    for implementation in ("flashattn", "eager"):
        model.set_attn_implementation(implementation)
        results.append(model.generate(tokens, attention_mask=mask, **options))
    assert torch.equal(*results)


def test_a_custom_mask_is_added():
    model, (tokens, _) = make_model("llama"), make_batch("none")
    keep = torch.rand(3, 1, 20, 20) > 0.3
    keep |= torch.eye(20, dtype=torch.bool)
    custom = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    ours, eager = (run(model, name, tokens, None)[0] for name in ("flashattn", "eager"))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    logits = []
    for implementation in ("flashattn", "eager"):
        model.set_attn_implementation(implementation)
        logits.append(model(input_ids=tokens, attention_mask=custom).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert (logits[0] - ours).abs().max() > 0.1


def test_dropout_is_used_in_training():
    model, (tokens, _) = make_model("llama"), make_batch("none")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train().set_attn_implementation("flashattn")
    assert not torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)
    model.eval()
    assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)


@needs_minilm
def test_minilm_as_eager():
    """Real weights, and real sentences of different lengths."""
    path, outs = locate("minilm"), []
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentences = ["A man is eating food.", "A man is eating a piece of bread with a lot of butter on top of it."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    for implementation in ("flashattn", "eager"):
        model = transformers.AutoModel.from_pretrained(path, attn_implementation=implementation).eval()
        with torch.no_grad():
            outs.append(model(**batch).last_hidden_state[batch["attention_mask"].bool()])
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_no_mask_is_made_where_none_is_needed():
    options = dict(batch_size=2, q_length=5, kv_length=5)
    ones = torch.ones(2, 5, dtype=torch.bool)
    assert compat.attention_mask(**options, attention_mask=ones) is None
    assert compat.attention_mask(**options, local_size=5) is None
    assert compat.attention_mask(**options, local_size=4).shape == (2, 1, 5, 5)
    assert compat.attention_mask(batch_size=2, q_length=2, kv_length=5, q_offset=3) is None
    assert compat.attention_mask(batch_size=2, q_length=2, kv_length=8, q_offset=3).shape == (2, 1, 2, 8)


def test_weights_are_not_there():
    """As under "sdpa", which warns and answers."""
    backends.warn_once.cache_clear()
    model, (tokens, _) = make_model("llama"), make_batch("none")
    model.set_attn_implementation("flashattn")
    with pytest.warns(UserWarning, match="has no output_attentions"):
        result = model(input_ids=tokens, output_attentions=True)
    assert not any(x is not None for x in result.attentions)
    assert torch.equal(result.logits, model(input_ids=tokens).logits)
