"""Whole models against `transformers` with its default attention (SDPA), on the same weights, in one run."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

import model
from model.families import gpt2
from model.inference.embed import embed
from model.inference.serving import Request, Server
from model.layers import initialise
from model.training.batches import random_windows
from model.training.train import Processes, Training, make_optimizer, train_step

from .environment import describe_environment
from .measure import Pair, measure_pair
from .table import collect, make_console, make_table

CPU = torch.device("cpu")
# Words of the sentences: their meaning does not matter to their time, and this text does not change.
TEXT = Path(__file__).parent.parent.joinpath("LICENSE")


class Row(NamedTuple):
    name: str
    target: float  # minimum ratio
    times: Pair
    speed: str
    same: bool  # whether both gave the same result


class Case(NamedTuple):
    name: str
    target: float
    prepare: Callable[[], tuple[Callable, Callable, Callable[[], bool], Callable[[float], str]]]


def load_in_transformers(ours: model.Transformer, kind: str):
    """The same weights in `transformers`."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        model.save(ours, Path(directory) / "model")
        return getattr(transformers, kind).from_pretrained(Path(directory) / "model", dtype=torch.float32).eval()


def prepare_generation():
    ours, tokenizer = model.load("smollm2")
    theirs = load_in_transformers(ours, "LlamaForCausalLM")
    prompt, count = tokenizer.encode("The three laws of motion are:"), 48

    def our_tokens() -> list[int]:
        return model.generate(ours, [prompt], count)[0]

    def their_tokens() -> list[int]:
        tokens = torch.tensor([prompt])
        out = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    same = lambda: our_tokens() == their_tokens()  # noqa: E731
    return our_tokens, their_tokens, same, lambda seconds: f"{count / seconds:.1f} tokens/s"


def make_sentences(lengths: list[int]) -> list[str]:
    words, rng = TEXT.read_text(encoding="utf-8").split(), random.Random(0)
    firsts = [rng.randrange(len(words) - n) for n in lengths]
    return [" ".join(words[first : first + n]) for first, n in zip(firsts, lengths, strict=True)]


def prepare_embedding(lengths: list[int]):
    ours, tokenizer = model.load("minilm")
    theirs = load_in_transformers(ours, "BertModel")
    texts = make_sentences(lengths)
    encoded = [torch.tensor(tokenizer.encode(text)) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
    valid = (torch.arange(tokens.shape[1]) < torch.tensor([len(e) for e in encoded])[:, None]).long()

    @torch.inference_mode()
    def their_vectors() -> torch.Tensor:
        hidden = theirs(tokens, attention_mask=valid).last_hidden_state
        mean = (hidden * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)

    our_vectors = partial(embed, ours, tokenizer, texts)
    same = lambda: torch.allclose(our_vectors(), their_vectors(), atol=1e-4)  # noqa: E731
    return our_vectors, their_vectors, same, lambda seconds: f"{len(texts) / seconds:.0f} texts/s"


def prepare_training():
    """A GPT-2 of 4 layers, 256 wide: forward, backward, clipping, AdamW on 8 pieces of 256 tokens."""
    hf = dict(vocab_size=4096, n_embd=256, n_layer=4, n_head=4, n_positions=256, resid_pdrop=0.0)
    ours = model.Transformer(gpt2.config(hf))
    torch.manual_seed(0)
    initialise(ours, 4)
    theirs = load_in_transformers(ours, "GPT2LMHeadModel")
    ours.train(), theirs.train()
    settings = Training(steps=1)
    optimizers = [make_optimizer(m, settings) for m in (ours, theirs)]
    batch = random_windows(torch.randint(0, 4096, (5000,)), 0, 8, 256, seed=0)

    def our_step() -> float:
        return train_step(ours, [batch], settings, optimizers[0], Processes())

    def their_step() -> float:
        optimizers[1].zero_grad()
        logits = theirs(batch.inputs["tokens"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.clip)
        optimizers[1].step()
        return loss.item()

    first = [our_step(), their_step()]
    same = lambda: abs(first[0] - first[1]) < 1e-4  # noqa: E731
    return our_step, their_step, same, lambda seconds: f"{batch.tokens / seconds:,.0f} tokens/s"


def prepare_batching():
    """32 requests of mixed lengths on SmolLM2: served together, and one by one."""
    ours, tokenizer = model.load("smollm2")
    rng = random.Random(0)
    prompts = [tokenizer.encode(text) for text in make_sentences([rng.randint(3, 40) for _ in range(32)])]
    counts = [rng.randint(4, 24) for _ in prompts]

    def together() -> list[list[int]]:
        server = Server(ours, pages=400, page_size=16)
        requests = [server.submit(Request(p, n)) for p, n in zip(prompts, counts, strict=True)]
        server.run()
        return [request.tokens for request in requests]

    def one_by_one() -> list[list[int]]:
        return [model.generate(ours, [p], n)[0] for p, n in zip(prompts, counts, strict=True)]

    same = lambda: together() == one_by_one()  # noqa: E731
    return together, one_by_one, same, lambda seconds: f"{sum(counts) / seconds:.1f} tokens/s"


NUMBERS = ["s", "theirs", "ratio", "quartiles", "target", "speed", "same"]
MIXED = [4, 6, 8, 8, 10, 10, 12, 14, 16, 20, 24, 30, 40, 60, 90, 150]
CASES = [
    Case("SmolLM2, 48 tokens greedy", 1.3, prepare_generation),
    Case("MiniLM, 16 texts of 24 words", 1.3, partial(prepare_embedding, [24] * 16)),
    Case("MiniLM, 16 texts of 4 to 150 words", 2.0, partial(prepare_embedding, MIXED)),
    Case("training step of a small GPT-2", 1.2, prepare_training),
    Case("32 requests together, to one by one", 3.0, prepare_batching),
]


def measure(words: list[str], seconds: float) -> Iterator[Row]:
    for case in CASES:
        if all(word in case.name for word in words):
            ours, theirs, same, speed = case.prepare()
            times = measure_pair(ours, theirs, CPU, seconds, min_runs=3)
            yield Row(case.name, case.target, times, speed(times.ours), same())


def print_rows(rows: Iterable[Row]) -> list[Row]:
    console = make_console()
    console.print(
        f"whole models on {describe_environment()}\nfloat32; s: median; ratio: transformers' time / ours (last row: one"
    )
    console.print("by one / together), median of interleaved pairs; target: the minimum ratio")
    done = collect(console, rows, lambda row: row.name)
    console.print(make_table(["case"], NUMBERS, map(format_row, done)))
    return done


def format_row(row: Row) -> list[str]:
    t = row.times
    return [
        row.name, f"{t.ours:.3f}", f"{t.theirs:.3f}", f"{t.ratio:.2f}x", f"{t.low:.2f}-{t.high:.2f}",
        f"{row.target}x", row.speed, "yes" if row.same else "WRONG",
    ]  # fmt: skip
