// Types shared by every kernel: dtype codes and scalar conversions. No PyTorch headers anywhere in
// csrc/: pointers, sizes, dtype codes and a stream are all that crosses the boundary, so one build
// serves every PyTorch.
//
// Everything here is `static inline`: csrc/cpu/*.cpp is compiled once per instruction set, and a
// shared weak symbol could hand AVX-512 code to a CPU that has none.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastdiff {

// The codes fastdiff/_ext.py maps torch dtypes to.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

static inline int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::f32: return 4;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::f64: return 8;
  }
  return 0;
}

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float to_float(bf16_t value) { return bits_float(uint32_t(value.bits) << 16); }

// Round to nearest even; NaN stays NaN (quieted), as PyTorch does.
static inline bf16_t to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bf16_t{uint16_t(is_nan ? ((bits >> 16) | 0x40u) : rounded)};
}

static inline float to_float(f16_t value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Scaling by 2^112 moves the half exponent to the float's place and makes subnormals exact.
  const float scaled = bits_float(magnitude << 13) * bits_float(0x77800000u);
  const uint32_t is_special = magnitude >= 0x7c00u;
  return bits_float(sign | (is_special ? (float_bits(scaled) | 0x7f800000u) : float_bits(scaled)));
}

static inline f16_t to_f16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal half: let the float adder round
    const float shifted = bits_float(magnitude) + 0.5f;
    half = float_bits(shifted) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return f16_t{uint16_t(sign | half)};
}

static inline float to_float(float value) { return value; }
static inline double to_float(double value) { return value; }

template <class T, class S>
struct Cast;
template <class S>
struct Cast<float, S> {
  static inline float run(S value) { return float(value); }
};
template <class S>
struct Cast<double, S> {
  static inline double run(S value) { return double(value); }
};
template <class S>
struct Cast<bf16_t, S> {
  static inline bf16_t run(S value) { return to_bf16(float(value)); }
};
template <class S>
struct Cast<f16_t, S> {
  static inline f16_t run(S value) { return to_f16(float(value)); }
};

}  // namespace fastdiff
