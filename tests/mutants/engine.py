"""Faults of the CPU engine."""

from .mutant import Mutant

MUTANTS = [
    Mutant(
        "a shorter batch row has the longest one's diagonal",
        "csrc/score.h",
        "int64_t moved = a.seq_k - query_end(a, batch) - a.score.diagonal;",
        "int64_t moved = 0;",
        ("tests/attention/test_varlen.py::test_against_float64",),
    ),
    Mutant(
        "queries past a length attend",
        "csrc/forward_tile.h",
        "float l = t.tile.rows.begin + i < t.valid.end ? softmax.l[i] : 0;",
        "float l = softmax.l[i];",
        ("tests/attention/test_attention.py::test_against_float64[q_lengths-torch.float32-cpu]",),
    ),
    Mutant(
        "a window is a key too wide",
        "csrc/score.h",
        "key - a.score.first - query));",
        "key - a.score.first - query + 1));",
        ("tests/attention/test_attention.py::test_against_float64[window-torch.float32-cpu]",),
    ),
    Mutant(
        "tanh is computed by its low degree",
        "csrc/simd.h",
        "if constexpr (DEGREE < 6) return large;",
        "return large;",
        ("tests/backends/test_engine.py::test_softcap_keeps_small_scores",),
    ),
    Mutant(
        "a mask's bytes are read as bits",
        "csrc/score_mods.h",
        "eight = (((eight & low) + low) | eight) >> 7 & 0x0101010101010101u;",
        "eight = eight & 0x0101010101010101u;",
        ("tests/attention/test_attention.py::test_a_mask_of_any_bytes",),
    ),
    Mutant(
        "a bias of keys is that of the first",
        "csrc/score_mods.h",
        "if (!x.stride_q) return broadcast(bias[x.stride_k ? key : 0]);",
        "if (!x.stride_q) return broadcast(bias[0]);",
        ("tests/attention/test_attention.py::test_against_float64[bias_of_keys-torch.float32-cpu]",),
    ),
    Mutant(
        "the next key is always in the same page",
        "csrc/decode.cpp",
        "bool next = key / a.pages.size == page && i > 0;",
        "bool next = i > 0;",
        ("tests/attention/test_decode.py::test_against_float64[pages-torch.float32-cpu]",),
    ),
    Mutant(
        "a merge does not rescale a sum",
        "csrc/decode.cpp",
        "l += first.l[i * stride] * factor[0];",
        "l += first.l[i * stride];",
        ("tests/attention/test_decode.py::test_long_caches",),
    ),
    Mutant(
        "delta forgets the gradient of lse in the engine",
        "csrc/backward.cpp",
        "total[lane] - (grad_lse ? grad_lse[query + lane] : 0)",
        "total[lane]",
        ("tests/attention/test_attention.py::test_only_lse_is_used[cpu]",),
    ),
]
