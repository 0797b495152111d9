"""An n-gram model with modified Kneser-Ney smoothing, the baseline of a language model.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3, equations 25-26.
"""

from __future__ import annotations

import numpy as np


class KneserNey:
    """Trained on tokens (total,) below vocab_size; vocab_size ** order must fit 63 bits.

    >>> tokens = np.array([0, 1, 2, 0, 1, 2, 0, 1, 3])
    >>> model = KneserNey(tokens, vocab_size=4, order=2)
    >>> float(np.round(sum(model.compute_probabilities(np.array([1, t]))[1] for t in range(4)), 6))
    1.0
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int = 5):
        if order * np.log2(vocab_size) > 63:
            raise ValueError(f"vocab_size ** order must fit 63 bits, got {vocab_size} ** {order}")
        self.vocab_size, self.order, self.levels = vocab_size, order, []
        keys = make_ngram_keys(tokens, order, vocab_size)
        keys, counts = np.unique(keys[order - 1 :], return_counts=True)
        for n in range(order, 0, -1):  # the highest order has counts, lower ones the number of different tokens before
            self.levels.append(Level(keys, counts, vocab_size))
            if n > 1:  # a key's first token is its highest digit
                keys, counts = np.unique(keys % vocab_size ** (n - 1), return_counts=True)
        self.levels.reverse()

    def compute_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Of each token, given the up to order - 1 tokens before it."""
        p = np.full(len(tokens), 1 / self.vocab_size)
        for n, level in enumerate(self.levels, 1):
            keys = make_ngram_keys(tokens, n, self.vocab_size)
            p[n - 1 :] = level.interpolate(keys[n - 1 :], p[n - 1 :])
        return p


class Level:
    """The n-grams of one order: keys, their counts, and for each context their sum and the sum of the discounts."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, vocab_size: int):
        self.keys, self.counts, self.vocab_size = keys, counts, vocab_size
        n = [max(1, int((counts == i).sum())) for i in (1, 2, 3, 4)]
        y = n[0] / (n[0] + 2 * n[1])
        self.discounts = np.clip(
            [0, 1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2]], 0, None
        )
        self.contexts, first = np.unique(keys // vocab_size, return_index=True)
        self.sums = np.add.reduceat(counts, first)
        self.left = np.add.reduceat(self.discount(counts), first)

    def discount(self, counts: np.ndarray) -> np.ndarray:
        return np.minimum(self.discounts[np.minimum(counts, 3)], counts)

    def interpolate(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """p(token | context) of these n-grams; lower: p(token | context without its first token)."""
        counts = look_up(self.keys, self.counts, keys)
        contexts = keys // self.vocab_size
        sums, left = look_up(self.contexts, self.sums, contexts), look_up(self.contexts, self.left, contexts)
        seen = np.maximum(sums, 1)
        return np.where(sums > 0, (counts - self.discount(counts) + left * lower) / seen, lower)


def make_ngram_keys(tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """The n tokens that end at each position, as one number; the first n - 1 are incomplete."""
    keys = np.zeros(len(tokens), np.int64)
    for back in range(n - 1, -1, -1):
        keys *= vocab_size
        keys[back:] += tokens[: len(tokens) - back]
    return keys


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of the wanted keys, 0 for missing ones."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
