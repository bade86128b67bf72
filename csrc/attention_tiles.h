// The matrix products of attention: C[rows][64] (+)= A[rows][units] B[units][64], in fp32.
//
// A unit is 4 bytes of A and of B: one float, or two neighbouring bf16 of the dimension that is
// summed over. The 64 columns are queries; a row is a key (scores) or a column of v (result). So one
// routine serves both products and nothing is padded: heads of any width, any number of keys.
#pragma once

#include "simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int kQueries = 64;  // columns of every block

#if defined(__AVX512BF16__)
using unit = uint32_t;
constexpr bool kPairs = true;
FASTDIFF_INLINE vfloat multiply_add(unit a, vfloat b, vfloat c) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
}
#else
using unit = float;
constexpr bool kPairs = false;
FASTDIFF_INLINE vfloat multiply_add(unit a, vfloat b, vfloat c) { return fma(splat(a), b, c); }
#endif
FASTDIFF_INLINE vfloat load_units(const unit* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// As many accumulators as the registers hold beside a row of B and a broadcast of A.
constexpr int kWide = kLanes == 16 ? 4 : 2;  // vectors of columns
constexpr int kHigh = kLanes == 4 ? 4 : 6;   // rows

template <int kRows, int kVectors, bool kAdd, bool kPeak>
FASTDIFF_INLINE void tile(const unit* a, int64_t a_row, const unit* b, int units, float* c,
                          vfloat (&peak)[kVectors]) {
  vfloat sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) sum[i][j] = splat(0.0f);
  for (int u = 0; u < units; ++u) {
    vfloat column[kVectors];
    for (int j = 0; j < kVectors; ++j) column[j] = load_units(b + u * kQueries + j * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j)
        sum[i][j] = multiply_add(a[i * a_row + u], column[j], sum[i][j]);
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      if (kAdd) sum[i][j] = sum[i][j] + load(c + i * kQueries + j * kLanes);
      store(c + i * kQueries + j * kLanes, sum[i][j]);
      if (kPeak) peak[j] = maximum(sum[i][j], peak[j]);
    }
}

template <int kVectors, bool kAdd, bool kPeak>
void columns(const unit* a, int64_t a_row, const unit* b, int rows, int units, float* c,
             float* peak) {
  vfloat top[kVectors];
  if (kPeak)
    for (int j = 0; j < kVectors; ++j) top[j] = load(peak + j * kLanes);
  int row = 0;
  for (; rows - row >= kHigh; row += kHigh)
    tile<kHigh, kVectors, kAdd, kPeak>(a + row * a_row, a_row, b, units, c + row * kQueries, top);
  switch (rows - row) {
#define FASTDIFF_REST(n)                                                                         \
  case n:                                                                                        \
    tile<n, kVectors, kAdd, kPeak>(a + row * a_row, a_row, b, units, c + row * kQueries, top);    \
    break;
    FASTDIFF_REST(1)
    FASTDIFF_REST(2)
    FASTDIFF_REST(3)
    FASTDIFF_REST(4)
    FASTDIFF_REST(5)
#undef FASTDIFF_REST
  }
  if (kPeak)
    for (int j = 0; j < kVectors; ++j) store(peak + j * kLanes, top[j]);
}

// kPeak: peak[64] becomes the largest of itself and of every column of C (NaN does not count).
// Only the first `vectors` vectors of columns are computed.
template <bool kAdd, bool kPeak>
FASTDIFF_INLINE void multiply(const unit* a, int64_t a_row, const unit* b, int rows, int units,
                              int vectors, float* c, float* peak) {
  for (int j = 0; j < vectors; j += kWide) {
    const int at = j * kLanes;
    float* top = kPeak ? peak + at : nullptr;
    switch (vectors - j < kWide ? vectors - j : kWide) {
      case 1: columns<1, kAdd, kPeak>(a, a_row, b + at, rows, units, c + at, top); break;
      case 2: columns<2, kAdd, kPeak>(a, a_row, b + at, rows, units, c + at, top); break;
      case 3: columns<kWide < 3 ? 2 : 3, kAdd, kPeak>(a, a_row, b + at, rows, units, c + at, top); break;
      default: columns<kWide, kAdd, kPeak>(a, a_row, b + at, rows, units, c + at, top);
    }
  }
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
