// One vector of floats, as wide as the instruction set this file is compiled for, so that a CPU
// kernel is written once: 16 lanes with AVX-512, 8 with AVX2, else 4 lanes of compiler vectors.
//
// load/store convert between float lanes and fp32, fp16 and bf16 memory (stores round to nearest
// even, NaN stays NaN); *_first touch only the first n < kLanes elements and read zeros beyond
// them. fma() is fused where the hardware fuses and two operations elsewhere: kernels whose results
// must agree bit for bit between instruction sets use * and + instead.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"
#include "dispatch.h"

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's AVX-512 intrinsics warn about their own undefined operands.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#define FASTDIFF_METHOD inline __attribute__((always_inline))
#define FASTDIFF_INLINE static FASTDIFF_METHOD

namespace fastdiff {
namespace FASTDIFF_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

using vfloat = __m512;
constexpr int kLanes = 16;

FASTDIFF_INLINE __mmask16 first_mask(int n) { return __mmask16((1u << n) - 1u); }

FASTDIFF_INLINE vfloat splat(float value) { return _mm512_set1_ps(value); }
FASTDIFF_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
FASTDIFF_INLINE vfloat minimum(vfloat a, vfloat b) { return _mm512_min_ps(a, b); }
FASTDIFF_INLINE vfloat maximum(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
FASTDIFF_INLINE vfloat keep_first(vfloat v, int n) { return _mm512_maskz_mov_ps(first_mask(n), v); }
FASTDIFF_INLINE vfloat round_even(vfloat v) { return _mm512_roundscale_ps(v, 0x08); }

// 2^n for integral n; overflows to inf and underflows to 0.
FASTDIFF_INLINE vfloat scale_by_power(vfloat v, vfloat n) { return _mm512_scalef_ps(v, n); }

FASTDIFF_INLINE vfloat widen_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// The upper halves are the rounded results. NaN is left alone: what arithmetic returns is quiet, so
// its upper half is NaN as well.
FASTDIFF_INLINE __m512i round_bf16(vfloat v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i half =
      _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  return _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), bits, half);
}
FASTDIFF_INLINE __m256i narrow_bf16(vfloat v) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(v), 16));
}
FASTDIFF_INLINE __m512i narrow_bf16(vfloat first, vfloat second) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(round_bf16(first), _mm512_load_si512(kUpper),
                                   round_bf16(second));
}
FASTDIFF_INLINE __m256i narrow_f16(vfloat v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTDIFF_INLINE __m256i load_bits16(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

FASTDIFF_INLINE vfloat load(const float* p) { return _mm512_loadu_ps(p); }
FASTDIFF_INLINE vfloat load(const bf16_t* p) { return widen_bf16(load_bits16(p)); }
FASTDIFF_INLINE vfloat load(const f16_t* p) { return _mm512_cvtph_ps(load_bits16(p)); }
FASTDIFF_INLINE vfloat load_first(const float* p, int n) {
  return _mm512_maskz_loadu_ps(first_mask(n), p);
}
FASTDIFF_INLINE vfloat load_first(const bf16_t* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first_mask(n), p));
}
FASTDIFF_INLINE vfloat load_first(const f16_t* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_mask(n), p));
}
FASTDIFF_INLINE void store(float* p, vfloat v) { _mm512_storeu_ps(p, v); }
FASTDIFF_INLINE void store(bf16_t* p, vfloat v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v));
}
FASTDIFF_INLINE void store(f16_t* p, vfloat v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(v));
}
FASTDIFF_INLINE void store_first(float* p, vfloat v, int n) {
  _mm512_mask_storeu_ps(p, first_mask(n), v);
}
FASTDIFF_INLINE void store_first(bf16_t* p, vfloat v, int n) {
  _mm256_mask_storeu_epi16(p, first_mask(n), narrow_bf16(v));
}
FASTDIFF_INLINE void store_first(f16_t* p, vfloat v, int n) {
  _mm256_mask_storeu_epi16(p, first_mask(n), narrow_f16(v));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

using vfloat = __m256;
constexpr int kLanes = 8;

FASTDIFF_INLINE __m256i first_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FASTDIFF_INLINE vfloat splat(float value) { return _mm256_set1_ps(value); }
FASTDIFF_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
FASTDIFF_INLINE vfloat minimum(vfloat a, vfloat b) { return _mm256_min_ps(a, b); }
FASTDIFF_INLINE vfloat maximum(vfloat a, vfloat b) { return _mm256_max_ps(a, b); }
FASTDIFF_INLINE vfloat keep_first(vfloat v, int n) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(first_mask(n)));
}
FASTDIFF_INLINE vfloat round_even(vfloat v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// v * 2^n for integral n with v * 2^n a normal float.
FASTDIFF_INLINE vfloat scale_by_power(vfloat v, vfloat n) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

FASTDIFF_INLINE vfloat widen_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FASTDIFF_INLINE __m128i narrow_bf16(vfloat v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high =
      _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
FASTDIFF_INLINE __m128i narrow_f16(vfloat v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTDIFF_INLINE __m128i load_bits16(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
FASTDIFF_INLINE __m128i load_bits16_first(const void* p, int n) {
  alignas(16) uint16_t bits[8] = {};
  std::memcpy(bits, p, size_t(n) * 2);
  return load_bits16(bits);
}
FASTDIFF_INLINE void store_bits16_first(void* p, __m128i v, int n) {
  alignas(16) uint16_t bits[8];
  std::memcpy(bits, &v, sizeof bits);
  std::memcpy(p, bits, size_t(n) * 2);
}

FASTDIFF_INLINE vfloat load(const float* p) { return _mm256_loadu_ps(p); }
FASTDIFF_INLINE vfloat load(const bf16_t* p) { return widen_bf16(load_bits16(p)); }
FASTDIFF_INLINE vfloat load(const f16_t* p) { return _mm256_cvtph_ps(load_bits16(p)); }
FASTDIFF_INLINE vfloat load_first(const float* p, int n) {
  return _mm256_maskload_ps(p, first_mask(n));
}
FASTDIFF_INLINE vfloat load_first(const bf16_t* p, int n) {
  return widen_bf16(load_bits16_first(p, n));
}
FASTDIFF_INLINE vfloat load_first(const f16_t* p, int n) {
  return _mm256_cvtph_ps(load_bits16_first(p, n));
}
FASTDIFF_INLINE void store(float* p, vfloat v) { _mm256_storeu_ps(p, v); }
FASTDIFF_INLINE void store(bf16_t* p, vfloat v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v));
}
FASTDIFF_INLINE void store(f16_t* p, vfloat v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(v));
}
FASTDIFF_INLINE void store_first(float* p, vfloat v, int n) {
  _mm256_maskstore_ps(p, first_mask(n), v);
}
FASTDIFF_INLINE void store_first(bf16_t* p, vfloat v, int n) {
  store_bits16_first(p, narrow_bf16(v), n);
}
FASTDIFF_INLINE void store_first(f16_t* p, vfloat v, int n) {
  store_bits16_first(p, narrow_f16(v), n);
}

#else

typedef float vfloat __attribute__((vector_size(16)));
typedef int32_t vint __attribute__((vector_size(16)));
typedef uint32_t vuint __attribute__((vector_size(16)));
typedef uint16_t vuint16 __attribute__((vector_size(8)));
constexpr int kLanes = 4;

FASTDIFF_INLINE vfloat splat(float value) { return vfloat{value, value, value, value}; }
FASTDIFF_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }
// Where an operand is NaN the result is b, as with the instructions of x86.
FASTDIFF_INLINE vfloat minimum(vfloat a, vfloat b) { return a < b ? a : b; }
FASTDIFF_INLINE vfloat maximum(vfloat a, vfloat b) { return a > b ? a : b; }
FASTDIFF_INLINE vuint select(vint mask, vuint a, vuint b) {
  return (vuint(mask) & a) | (~vuint(mask) & b);
}
FASTDIFF_INLINE vfloat keep_first(vfloat v, int n) {
  const vint mask = vint{0, 1, 2, 3} < vint{n, n, n, n};
  return vfloat(vuint(mask) & vuint(v));
}
// For |v| < 2^22: the float adder rounds to an integer at this magnitude.
FASTDIFF_INLINE vfloat round_even(vfloat v) {
  const vfloat magic = splat(12582912.0f);
  return (v + magic) - magic;
}

// v * 2^n for integral n with v * 2^n a normal float.
FASTDIFF_INLINE vfloat scale_by_power(vfloat v, vfloat n) {
  return vfloat(vint(v) + (__builtin_convertvector(n, vint) << 23));
}

FASTDIFF_INLINE vfloat widen(vuint16 bits, bf16_t) {
  return vfloat(__builtin_convertvector(bits, vuint) << 16);
}
FASTDIFF_INLINE vfloat widen(vuint16 bits, f16_t) {
  const vuint half = __builtin_convertvector(bits, vuint);
  const vuint magnitude = half & 0x7fffu;
  // Scaling by 2^112 moves the exponent to the float's place and makes subnormals exact.
  const vuint scaled = vuint(vfloat(magnitude << 13) * splat(0x1p112f));
  const vuint special = vuint(magnitude > 0x7bffu) & 0x7f800000u;
  return vfloat(scaled | special | ((half & 0x8000u) << 16));
}
FASTDIFF_INLINE vuint16 narrow(vfloat v, bf16_t) {
  const vuint bits = vuint(v);
  const vuint rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const vuint quiet_nan = vuint{} + 0x7fc00000u;
  return __builtin_convertvector(select(v == v, rounded, quiet_nan) >> 16, vuint16);
}
FASTDIFF_INLINE vuint16 narrow(vfloat v, f16_t) {
  const vuint magnitude = vuint(v) & 0x7fffffffu;
  const vuint sign = (vuint(v) >> 16) & 0x8000u;
  const vuint normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // A subnormal half: the float adder rounds at its last place.
  const vuint subnormal = vuint(vfloat(magnitude) + splat(0.5f)) - 0x3f000000u;
  vuint half = select(magnitude < 0x38800000u, subnormal, normal);
  half = select(magnitude >= 0x477ff000u, vuint{} + 0x7c00u, half);
  half = select(magnitude > 0x7f800000u, vuint{} + 0x7e00u, half);
  return __builtin_convertvector(half | sign, vuint16);
}

FASTDIFF_INLINE vfloat load_first(const float* p, int n) {
  vfloat v = {};
  std::memcpy(&v, p, size_t(n) * sizeof(float));
  return v;
}
template <class T>
FASTDIFF_INLINE vfloat load_first(const T* p, int n) {
  vuint16 bits = {};
  std::memcpy(&bits, p, size_t(n) * sizeof(T));
  return widen(bits, T{});
}
FASTDIFF_INLINE void store_first(float* p, vfloat v, int n) {
  std::memcpy(p, &v, size_t(n) * sizeof(float));
}
template <class T>
FASTDIFF_INLINE void store_first(T* p, vfloat v, int n) {
  const vuint16 bits = narrow(v, T{});
  std::memcpy(p, &bits, size_t(n) * sizeof(T));
}
template <class T>
FASTDIFF_INLINE vfloat load(const T* p) {
  return load_first(p, kLanes);
}
template <class T>
FASTDIFF_INLINE void store(T* p, vfloat v) {
  store_first(p, v, kLanes);
}

#endif

// v, rounded to what memory of type T holds.
template <class T>
struct Rounded;
template <>
struct Rounded<float> {
  FASTDIFF_METHOD static vfloat of(vfloat v) { return v; }
};
#if defined(__AVX512F__)
template <>
struct Rounded<bf16_t> {
  FASTDIFF_METHOD static vfloat of(vfloat v) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(round_bf16(v), upper));
  }
};
template <>
struct Rounded<f16_t> {
  FASTDIFF_METHOD static vfloat of(vfloat v) { return _mm512_cvtph_ps(narrow_f16(v)); }
};
#elif defined(__AVX2__)
template <>
struct Rounded<bf16_t> {
  FASTDIFF_METHOD static vfloat of(vfloat v) { return widen_bf16(narrow_bf16(v)); }
};
template <>
struct Rounded<f16_t> {
  FASTDIFF_METHOD static vfloat of(vfloat v) { return _mm256_cvtph_ps(narrow_f16(v)); }
};
#else
template <>
struct Rounded<bf16_t> {
  FASTDIFF_METHOD static vfloat of(vfloat v) { return widen(narrow(v, bf16_t{}), bf16_t{}); }
};
template <>
struct Rounded<f16_t> {
  FASTDIFF_METHOD static vfloat of(vfloat v) { return widen(narrow(v, f16_t{}), f16_t{}); }
};
#endif
template <class T>
FASTDIFF_INLINE vfloat round_to(vfloat v) {
  return Rounded<T>::of(v);
}

FASTDIFF_INLINE float sum_lanes(vfloat v) {
  alignas(64) float lane[kLanes];
  std::memcpy(lane, &v, sizeof lane);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// What follows works on several vectors at a time, step by step: one vector after the other, the
// latencies would fill the processor's scheduler before it saw independent work.
constexpr int kBlock = kLanes == 16 ? 4 : 2;

// power = exp(-x) to about 1 ulp; at the ends 0 or inf (a number beyond 1e38 without AVX-512).
// x = r - n ln 2 with |r| <= ln 2 / 2; the polynomial is the minimax one of degree 6 for exp(-r),
// whose relative error is 3e-9. ln 2 is split so that n times its upper part is exact.
template <int N>
FASTDIFF_INLINE void exp_negative(const vfloat (&x)[N], vfloat (&power)[N]) {
#if defined(__AVX512F__)
  const float low = -104.0f, high = 104.0f;
#else
  const float low = -88.37f, high = 87.33f;
#endif
  const float coefficients[] = {-0x1.1239d4p-7f, 0x1.5558f2p-5f, -0x1.555492p-3f,
                                0x1.fffffcp-2f,  -1.0f,          1.0f};
  vfloat n[N], r[N];
  for (int i = 0; i < N; ++i) r[i] = maximum(splat(low), minimum(splat(high), x[i]));
  for (int i = 0; i < N; ++i) n[i] = round_even(r[i] * splat(-0x1.715476p+0f));
  for (int i = 0; i < N; ++i) r[i] = fma(n[i], splat(0x1.62e400p-1f), r[i]);
  for (int i = 0; i < N; ++i) r[i] = fma(n[i], splat(0x1.7f7d1cp-20f), r[i]);
  for (int i = 0; i < N; ++i) power[i] = splat(0x1.6a244cp-10f);
  for (const float c : coefficients)
    for (int i = 0; i < N; ++i) power[i] = fma(power[i], r[i], splat(c));
  for (int i = 0; i < N; ++i) power[i] = scale_by_power(power[i], n[i]);
}

// 2^r for results that are rounded to 16 bits: relative error below 4e-6 for |r| < 28 (the minimax
// polynomial of degree 4 over |r| <= 1/2). Without AVX-512 it stays within 2^-126 and 2^127.5.
template <int N>
FASTDIFF_INLINE void power_of_two_short(vfloat (&r)[N], vfloat (&power)[N]) {
  const float coefficients[] = {0x1.c9fc46p-5f, 0x1.ec0378p-3f, 0x1.62e12cp-1f, 1.0f};
  vfloat n[N];
#if defined(__AVX512F__)
  for (int i = 0; i < N; ++i) n[i] = round_even(r[i]);
  for (int i = 0; i < N; ++i) r[i] = _mm512_reduce_ps(r[i], 0x08);  // r - n, 0 for infinite r
#else
  for (int i = 0; i < N; ++i) r[i] = maximum(splat(-125.99f), minimum(splat(127.49f), r[i]));
  for (int i = 0; i < N; ++i) n[i] = round_even(r[i]);
  for (int i = 0; i < N; ++i) r[i] = r[i] - n[i];
#endif
  for (int i = 0; i < N; ++i) power[i] = splat(0x1.3a02ccp-7f);
  for (const float c : coefficients)
    for (int i = 0; i < N; ++i) power[i] = fma(power[i], r[i], splat(c));
  for (int i = 0; i < N; ++i) power[i] = scale_by_power(power[i], n[i]);
}

// exp(-x), as power_of_two_short.
template <int N>
FASTDIFF_INLINE void exp_negative_short(const vfloat (&x)[N], vfloat (&power)[N]) {
  vfloat r[N];
  for (int i = 0; i < N; ++i) r[i] = x[i] * splat(-0x1.715476p+0f);
  power_of_two_short(r, power);
}

// x becomes SiLU(x) = x / (1 + exp(-x)), accurate enough for a result of type T.
template <class T, int N>
FASTDIFF_INLINE void silu(vfloat (&x)[N]) {
  vfloat power[N];
  if (sizeof(T) == 2)
    exp_negative_short(x, power);
  else
    exp_negative(x, power);
  for (int i = 0; i < N; ++i) power[i] = power[i] + splat(1.0f);
#if !defined(__AVX512F__)
  // The exponential stops growing at 2^127 here, so the numerator has to, too.
  for (int i = 0; i < N; ++i) x[i] = maximum(splat(-88.37f), x[i]);
#endif
  for (int i = 0; i < N; ++i) x[i] = x[i] / power[i];
}

// Consecutive vectors.
template <int N, class T>
FASTDIFF_INLINE void store_block(T* p, const vfloat (&v)[N]) {
  for (int i = 0; i < N; ++i) store(p + i * kLanes, v[i]);
}
#if defined(__AVX512F__)
template <int N>
FASTDIFF_INLINE void store_block(bf16_t* p, const vfloat (&v)[N]) {
  int i = 0;
  for (; i + 2 <= N; i += 2) _mm512_storeu_si512(p + i * kLanes, narrow_bf16(v[i], v[i + 1]));
  if (i < N) store(p + i * kLanes, v[i]);
}
#endif

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
