"""Faults that the tests have to find. Each is one replacement in one file, whose old text occurs there exactly once,
and the tests of which at least one has to fail. Add the fault here when a bug is fixed, or a check is written."""

from __future__ import annotations

from . import derivatives, engine, kernels, models, operators, ptx
from .mutant import Mutant

DECODE = "tests/attention/test_decode.py::"
FLEX = "tests/compat/test_flex.py::"
FLEX_MODS = "tests/compat/test_flex_mods.py::"
GENERATE = "tests/model/test_generate.py::"
NORM = "tests/norm/test_norm.py::"

MUTANTS = [
    Mutant(
        "a fork does not count as a user of its pages",
        "flashattn/cache.py",
        "            self._users[page] += 1\n",
        "            self._users[page] += 0\n",
        (DECODE + "test_forked_sequences_share_pages",),
    ),
    Mutant(
        "the last sequence of a shared page copies it too",
        "flashattn/cache.py",
        "if users[page] > 1:",
        "if users[page] > 0:",
        (DECODE + "test_the_last_of_those_that_share_a_page_keeps_it",),
    ),
    Mutant(
        "truncate keeps a page",
        "flashattn/cache.py",
        "in reversed(pages[kept:]):",
        "in reversed(pages[kept + 1 :]):",
        (DECODE + "test_truncate",),
    ),
    Mutant(
        "a pool gives one page more than it has",
        "flashattn/cache.py",
        "if needed > len(self._free):",
        "if needed > len(self._free) + 1:",
        (DECODE + "test_a_full_cache_is_left_as_it_is", DECODE + "test_a_batch_without_room_takes_no_page"),
    ),
    Mutant(
        "what depends on captured tensors alone stays in the graph of numbers",
        "flashattn/mod_graph.py",
        "depends = set(inputs[:arguments])",
        "depends = set(inputs)",
        (FLEX_MODS[:-2],),
    ),
    Mutant(
        "a chain of indices is not joined",
        "flashattn/mod_graph.py",
        "elif table in partial:",
        "elif table is None:",
        (FLEX_MODS[:-2],),
    ),
    Mutant(
        "a score_mod may change tensors",
        "flashattn/mod_graph.py",
        "if schema is not None and schema.is_mutable:",
        "if schema is None:",
        (FLEX + "test_wrong_arguments_are_named",),
    ),
    Mutant(
        "top_p leaves out the token that reaches it",
        "model/inference/sampling.py",
        "before = ordered.cumsum(-1) - ordered",
        "before = ordered.cumsum(-1)",
        (GENERATE + "test_top_p",),
    ),
    Mutant(
        "top_k keeps the likeliest token alone",
        "model/inference/sampling.py",
        ".values[:, -1:]",
        ".values[:, :1]",
        (GENERATE + "test_top_k",),
    ),
    Mutant(
        "negative logits are divided by the repetition penalty too",
        "model/inference/sampling.py",
        "logits * penalty",
        "logits / penalty",
        (GENERATE + "test_repetition_penalty",),
    ),
    Mutant(
        "a mean keeps what its sum lost to rounding",
        "csrc/norm.cpp",
        "n.mean[r] = mean += delta;",
        "n.mean[r] = mean;",
        (NORM + "test_rows_of_equal_numbers", NORM + "test_rows_far_from_zero"),
    ),
    Mutant(
        "the last number of a ragged row is not in the variance",
        "csrc/norm.cpp",
        "c < width; c++) {  // without the padding",
        "c < width - 1; c++) {  // without the padding",
        (NORM + "test_against_float64",),
    ),
    Mutant(
        "weight_offset is dropped",
        "csrc/norm.cpp",
        "x * (load_parameters(weight, c, width) + offset)",
        "x * (load_parameters(weight, c, width) + 0 * offset)",
        (NORM + "test_against_float64",),
    ),
]
MUTANTS += [*kernels.MUTANTS, *engine.MUTANTS, *operators.MUTANTS, *derivatives.MUTANTS, *ptx.MUTANTS, *models.MUTANTS]
