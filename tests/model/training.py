"""A model that learns to count, for the tests of training in one process and in several."""

from dataclasses import replace

import torch

import model
from model.layers import initialise
from model.training.batches import Batch

CONFIG = model.Config(
    "gpt2", vocab_size=31, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, ffn_width=64, context=64, causal=True,
    norm="layer", norm_eps=1e-5, norm_first=True, activation="gelu_tanh", gated=False, positions="learned",
)  # fmt: skip


def make_model(**changes):
    torch.manual_seed(0)
    ours = model.Transformer(replace(CONFIG, **changes))
    initialise(ours, CONFIG.layers)
    return ours


def make_batch(number, lengths=(9, 5, 17)):
    """Counting upwards from anywhere: what follows a token can be learned. Packed."""
    random = torch.Generator().manual_seed(number)
    firsts = torch.randint(0, 31, (len(lengths),), generator=random)
    rows = [(first + torch.arange(n + 1)) % 31 for first, n in zip(firsts, lengths, strict=True)]
    tokens, targets = torch.cat([row[:-1] for row in rows]), torch.cat([row[1:] for row in rows])
    return Batch(dict(tokens=tokens, lengths=torch.tensor(lengths)), targets)


def is_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
