// Vectors as wide as the instruction set has them, and the conversions and functions that the kernels need.
// Arithmetic uses the vector types of GCC and clang, with intrinsics only for what these cannot express.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "engine.h"

namespace flashattn {
namespace FLASHATTN_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // float32 lanes in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#define FLASHATTN_UNROLL _Pragma("GCC unroll 16")
#define FLASHATTN_INLINE __attribute__((always_inline)) static inline

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

// Unaligned access, through a type of alignment 1.
template <class V>
struct __attribute__((packed, may_alias)) Unaligned {
  V v;
};
template <class V, class T>
static inline V load(const T* p) {
  return reinterpret_cast<const Unaligned<V>*>(p)->v;
}
template <class V, class T>
static inline void store(T* p, V v) {
  reinterpret_cast<Unaligned<V>*>(p)->v = v;
}
static inline vf broadcast(float x) { return x - vf{}; }
static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vu iota() {
  vu i;
  for (int lane = 0; lane < W; lane++) i[lane] = lane;
  return i;
}

constexpr float NEG_INF = -__builtin_inff();

// The lanes 0 .. W - 1 as template arguments (std::integer_sequence would be shared between instruction sets).
template <int... I>
struct LaneIndices {};
template <int N, int... I>
struct MakeLaneIndices : MakeLaneIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLaneIndices<0, I...> {
  using type = LaneIndices<I...>;
};
using AllLanes = MakeLaneIndices<W>::type;

// Lane i of the result is lane i ^ STEP.
template <int STEP, int... I>
static inline vf swap_lanes(vf v, LaneIndices<I...>) {
  return __builtin_shufflevector(v, v, (I ^ STEP)...);
}
template <int STEP = W / 2>
static inline float sum(vf v) {
  if constexpr (STEP == 0)
    return v[0];
  else
    return sum<STEP / 2>(v + swap_lanes<STEP>(v, AllLanes{}));
}

// x itself. The compiler cannot fuse a product passed through here into an addition, so it is rounded.
static inline vf round_product(vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

constexpr float LOG2E = 1.4426950408889634f;

// 2^f for |f| <= 1/2 by a polynomial that is exactly 1 at 0, so that a rescale by 2^0 changes nothing. Largest relative
// error: degree 6 2.0e-9 (with the rounding of float32, 1.2e-7), degree 4 2.8e-6. Minimax under that constraint.
template <int DEGREE>
static inline vf exp2_fraction(vf f) {
  static_assert(DEGREE == 4 || DEGREE == 6, "");
  if constexpr (DEGREE == 4) {
    vf p = f * 9.582853169e-3f + 5.590642504e-2f;
    p = p * f + 2.402409861e-1f;
    p = p * f + 6.931241934e-1f;
    return p * f + 1.0f;
  }
  vf p = f * 1.535336200e-4f + 1.339887445e-3f;
  p = p * f + 9.618437358e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  return p * f + 1.0f;
}

// 2^x for x < 128. x = n + f with n the nearest integer. Below -126 (and at -inf) the result is 0; a NaN stays a NaN.
template <int DEGREE = 6>
static inline vf exp2(vf x) {
#if defined(__AVX512F__)
  // VRNDSCALE and VSCALEF each replace five of the instructions below.
  vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vf f = x - n;
#else
  const vf shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf clamped = max(x, broadcast(-126.0f));
  vf shifted = clamped + shifter;
  vf f = clamped - (shifted - shifter);
#endif
  vf p = exp2_fraction<DEGREE>(f);
#if defined(__AVX512F__)
  // 0 below -126; a NaN does not compare below. At -inf f is a NaN, which the mask zeroes.
  __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  vi n = (vi)shifted - (vi)shifter;
  vf result = (vf)((vi)p + (n << 23));
  return x >= broadcast(-126.0f) ? result : (x == x ? vf{} : x);
#endif
}

// 1 / x to 2e-7.
static inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y * (2 - x * y);
#else
  return 1 / x;
#endif
}

// tanh = 1 - 2 / (e^2x + 1). DEGREE 6: near 0, where that cancels, an odd polynomial; largest relative error 3e-7.
// DEGREE 4, for scores of bfloat16 tensors: largest absolute error 3e-6.
template <int DEGREE>
static inline vf tanh(vf x) {
  vf magnitude = x < 0 ? -x : x, bounded = magnitude < 20 ? magnitude : vf{} + 20.0f;
  vf large = 1 - 2 * reciprocal(exp2<DEGREE>(bounded * (2 * LOG2E)) + 1);
  large = x == x ? (x < 0 ? -large : large) : x;
  if constexpr (DEGREE < 6) return large;
  vf square = x * x;
  vf p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  return magnitude < 0.625f ? p * square * x + x : large;
}

// Transpose W vectors of 32-bit lanes: W / 2 exchanges in each of log2(W) rounds.
template <int STEP, int... I>
static inline void exchange(vf& a, vf& b, LaneIndices<I...>) {
  vf low = __builtin_shufflevector(a, b, (I & STEP ? W + I - STEP : I)...);
  b = __builtin_shufflevector(a, b, (I & STEP ? W + I : I + STEP)...);
  a = low;
}
template <int STEP = W / 2>
static inline void transpose(vf (&v)[W]) {
  if constexpr (STEP > 0) {
    FLASHATTN_UNROLL for (int i = 0; i < W; i++) if (!(i & STEP)) exchange<STEP>(v[i], v[i + STEP], AllLanes{});
    transpose<STEP / 2>(v);
  }
}

// ---------------------------------------------------------------- 16-bit floats

// Round to nearest even; a NaN stays a (quiet) NaN. The instruction flushes numbers below 2^-126 to 0.
static inline vh float_to_bfloat16(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  vu bits = (vu)x;
  vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  vu quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector((vu)(x == x ? (vi)rounded : (vi)quiet), vh);
#endif
}

// 16-bit lanes as 32-bit ones. GCC 12 makes two halves of __builtin_convertvector.
static inline vu extend(vh x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}

static inline vf float16_to_float(vh x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  // The exponent is biased by 15, not 127: multiplying by 2^112 corrects it, for subnormal numbers too.
  vu bits = extend(x), magnitude = (bits & 0x7FFF) << 13;
  vf number = (vf)magnitude * 0x1p112f;
  vi special = magnitude >= 0x0F800000u;  // infinity or NaN
  return (vf)((special ? magnitude | 0x7F800000u : (vu)number) | (bits & 0x8000) << 16);
#endif
}

// Round to nearest even; a NaN stays a (quiet) NaN.
static inline vh float_to_float16(vf x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  vu bits = (vu)x, magnitude = bits & 0x7FFFFFFF;
  // Below 2^-14: adding 0.5, whose last place is that of a subnormal float16, rounds. Above: subtracting 112 << 23
  // corrects the exponent's bias, and adding 0xFFF and the last kept bit rounds off the 13 dropped bits; a carry into
  // the exponent is right, up to infinity.
  vu small = (vu)((vf)magnitude + 0.5f) - 0x3F000000;
  vu normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  vu special = magnitude > 0x7F800000u ? vu{} + 0x7E00 : vu{} + 0x7C00;
  vu half = magnitude < 0x38800000u ? small : magnitude < 0x47800000u ? normal : special;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000), vh);
#endif
}

static inline vf widen(vh x, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? (vf)(extend(x) << 16) : float16_to_float(x);
}

// A dtype as a type. with_dtype calls f with the tag of a dtype.
template <Dtype DTYPE>
struct DtypeTag {
  static constexpr Dtype value = DTYPE;
};
template <class F>
static inline void with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::float32) return f(DtypeTag<Dtype::float32>{});
  if (dtype == Dtype::bfloat16) return f(DtypeTag<Dtype::bfloat16>{});
  f(DtypeTag<Dtype::float16>{});
}

// W elements of a row, from column c on, as float32.
template <Dtype DTYPE>
static inline vf load_as_f32(const char* row, int64_t c) {
  if constexpr (DTYPE == Dtype::float32) return load<vf>((const float*)row + c);
  return widen(load<vh>((const uint16_t*)row + c), DTYPE);
}

template <Dtype DTYPE>
static inline void store_from_f32(char* row, int64_t c, vf x) {
  if constexpr (DTYPE == Dtype::float32)
    store((float*)row + c, x);
  else
    store((uint16_t*)row + c, DTYPE == Dtype::bfloat16 ? float_to_bfloat16(x) : float_to_float16(x));
}

// Convert n elements of any dtype to float32. `dst` has room for n rounded up to whole vectors; the excess is set to 0.
static inline void load_floats(float* dst, const void* src, Dtype dtype, int64_t n) {
  int64_t i = 0;
  if (dtype == Dtype::float32) {
    const float* x = (const float*)src;
    for (; i + W <= n; i += W) store(dst + i, load<vf>(x + i));
    if (i == n) return;
    store(dst + i, vf{});
    for (; i < n; i++) dst[i] = x[i];
    return;
  }
  const uint16_t* x = (const uint16_t*)src;
  for (; i + W <= n; i += W) store(dst + i, widen(load<vh>(x + i), dtype));
  if (i == n) return;
  vh tail = {};
  for (int64_t j = i; j < n; j++) tail[j - i] = x[j];
  store(dst + i, widen(tail, dtype));
}

// Convert n floats to any dtype, rounded to nearest even. `src` is readable up to whole vectors.
static inline void store_floats(void* dst, const float* src, Dtype dtype, int64_t n) {
  int64_t i = 0;
  if (dtype == Dtype::float32) {
    float* y = (float*)dst;
    for (; i + W <= n; i += W) store(y + i, load<vf>(src + i));
    for (; i < n; i++) y[i] = src[i];
    return;
  }
  uint16_t* y = (uint16_t*)dst;
  auto narrow = [dtype](vf v) { return dtype == Dtype::bfloat16 ? float_to_bfloat16(v) : float_to_float16(v); };
  for (; i + W <= n; i += W) store(y + i, narrow(load<vf>(src + i)));
  if (i == n) return;
  vh tail = narrow(load<vf>(src + i));
  for (int64_t j = i; j < n; j++) y[j] = tail[j - i];
}

static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
