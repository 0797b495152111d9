// The fields of `Score` (flashattn/score.py) that the engine reads, in the same order: X(C++ type, schema type, name).
// The bindings generate ScoreArgs and the parameters and schemas of the three attention operators from this list.
#pragma once

#define FLASHATTN_SCORE_FIELDS(X)                 \
  X(double, "float", scale)                       \
  X(std::optional<int64_t>, "int?", left)         \
  X(std::optional<int64_t>, "int?", right)        \
  X(OptionalTensor, "Tensor?", q_lengths)         \
  X(OptionalTensor, "Tensor?", kv_lengths)        \
  X(std::optional<double>, "float?", softcap)     \
  X(OptionalTensor, "Tensor?", alibi_slopes)      \
  X(OptionalTensor, "Tensor?", mask)              \
  X(double, "float", dropout_p)                   \
  X(OptionalTensor, "Tensor?", seed)              \
  X(OptionalTensor, "Tensor?", cu_seqlens)        \
  X(std::optional<int64_t>, "int?", max_seqlen_q) \
  X(std::optional<int64_t>, "int?", max_seqlen_k) \
  X(OptionalTensor, "Tensor?", bias)              \
  X(OptionalTensor, "Tensor?", sinks)
