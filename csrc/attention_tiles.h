// The matrix products of attention: C[rows][64] (+)= A[rows][units] B[units][64], in fp32.
//
// A unit is 4 bytes of A and of B: one float, or two neighbouring bf16 of the dimension that is
// summed over. The 64 columns are queries; a row is a key (scores) or a column of v (result). One
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

#if defined(__AMX_BF16__)

#if defined(FASTDIFF_TILE_INSTRUCTIONS)  // the emulation of tests/csrc
#include FASTDIFF_TILE_INSTRUCTIONS
#endif

// Tiles of equal size, as few as fit: 40 columns of a head are two tiles of 20, 72 three of 24.
struct Split {
  int count, size;
  explicit Split(int n) : count((n + 15) / 16), size((n + count - 1) / count) {}
};

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are the sums, 4 and 5 two tiles of A, 6 and 7 two of B.
template <int kRows, int kColumns, bool kAdd>
FASTDIFF_INLINE void tile(const unit* a, int64_t a_row, const unit* b, Split rows, Split units,
                          float* c) {
  constexpr int kStride = kQueries * 4;
  float* below = c + rows.size * kQueries;
#define FASTDIFF_SUM(n, p)              \
  if (kAdd)                             \
    _tile_loadd(n, p, kStride);         \
  else                                  \
    _tile_zero(n);
  FASTDIFF_SUM(0, c)
  if (kColumns == 2) { FASTDIFF_SUM(1, c + 16) }
  if (kRows == 2) { FASTDIFF_SUM(2, below) }
  if (kRows == 2 && kColumns == 2) { FASTDIFF_SUM(3, below + 16) }
#undef FASTDIFF_SUM
  for (int u = 0; u < units.count; ++u) {
    const unit* row = b + u * units.size * kQueries;
    _tile_loadd(4, a + u * units.size, a_row * 4);
    _tile_loadd(6, row, kStride);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumns == 2) {
      _tile_loadd(7, row + 16, kStride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRows == 2) {
      _tile_loadd(5, a + rows.size * a_row + u * units.size, a_row * 4);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, kStride);
  if (kColumns == 2) _tile_stored(1, c + 16, kStride);
  if (kRows == 2) _tile_stored(2, below, kStride);
  if (kRows == 2 && kColumns == 2) _tile_stored(3, below + 16, kStride);
}

template <int kColumns, bool kAdd>
void columns(const unit* a, int64_t a_row, const unit* b, Split rows, Split units, float* c) {
  int i = 0;
  for (; i + 2 <= rows.count; i += 2)
    tile<2, kColumns, kAdd>(a + i * rows.size * a_row, a_row, b, rows, units,
                            c + i * rows.size * kQueries);
  if (i < rows.count)
    tile<1, kColumns, kAdd>(a + i * rows.size * a_row, a_row, b, rows, units,
                            c + i * rows.size * kQueries);
}

// kPeak: peak[64] becomes the largest of itself and of every column of C (NaN does not count).
// Only the first `vectors` vectors of columns are computed. With tiles, whole
// ones: A, B and C have up to 15 rows and units more than asked for, the units with zeros in them.
template <bool kAdd, bool kPeak>
FASTDIFF_INLINE void multiply(const unit* a, int64_t a_row, const unit* b, int rows, int units,
                              int vectors, float* c, float* peak) {
  const Split high(rows), deep(units);
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) {
    shapes.rows[i] = uint8_t(i < 6 ? high.size : deep.size);
    shapes.bytes[i] = uint16_t(i == 4 || i == 5 ? deep.size * 4 : 64);
  }
  // GCC's intrinsics do not say that they read memory: what was stored before must be there.
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
  for (int j = 0; j < vectors; j += 2) {
    if (vectors - j == 1)
      columns<1, kAdd>(a, a_row, b + j * 16, high, deep, c + j * 16);
    else
      columns<2, kAdd>(a, a_row, b + j * 16, high, deep, c + j * 16);
  }
  __asm__ volatile("" : : : "memory");
  if (!kPeak) return;
  for (int j = 0; j < vectors * kLanes; j += kLanes) {
    vfloat top = load(peak + j);
    for (int i = 0; i < rows; ++i) top = maximum(load(c + i * kQueries + j), top);
    store(peak + j, top);
  }
}

constexpr bool kTiles = true;
FASTDIFF_INLINE void release_tiles() { _tile_release(); }

#else

constexpr bool kTiles = false;
FASTDIFF_INLINE void release_tiles() {}

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
  constexpr int kThree = kWide < 3 ? kWide : 3;
  for (int j = 0; j < vectors; j += kWide) {
    const int at = j * kLanes;
    float* top = kPeak ? peak + at : nullptr;
    switch (vectors - j < kWide ? vectors - j : kWide) {
      case 1: columns<1, kAdd, kPeak>(a, a_row, b + at, rows, units, c + at, top); break;
      case 2: columns<2, kAdd, kPeak>(a, a_row, b + at, rows, units, c + at, top); break;
      case 3: columns<kThree, kAdd, kPeak>(a, a_row, b + at, rows, units, c + at, top); break;
      default: columns<kWide, kAdd, kPeak>(a, a_row, b + at, rows, units, c + at, top);
    }
  }
}

#endif

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
