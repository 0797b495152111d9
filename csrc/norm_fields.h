// The fields of `Norm` (flashattn/score.py), in the same order: X(C++ type, schema type, name). The bindings
// generate NormArgs and the parameters and schemas of the norm operators from this list.
#pragma once

#define FLASHATTN_NORM_FIELDS(X)    \
  X(bool, "bool", center)           \
  X(double, "float", eps)           \
  X(double, "float", weight_offset) \
  X(double, "float", dropout_p)     \
  X(OptionalTensor, "Tensor?", seed)
