// softmax(scale * q' k'^T) v per image and head (flash attention: no row of scores is kept).
//
//   q, out  [batch, queries, heads, width], k, v [batch, keys, heads, width]; any strides but the
//           last; fp32, fp16, bf16. Two segments are read as if one followed the other.
//
// A thread takes blocks of 64 queries of one head after the other and copies the keys and values
// that count once per head. Everything is computed transposed, queries along the lanes: scores[key]
// [query], so that maximum, exponential and sum need no operation across lanes, and heads of any
// width and any number of keys fill the registers.
//
// The maximum that is subtracted follows the true one lazily, so that no weight passes 2^8: most
// blocks of keys then rescale nothing. The score minus the maximum is exact where they are
// close, before it is scaled, so that ties of huge scores are ties.
#include "../attention.h"

#include <cmath>
#include <limits>

#include "../attention_tiles.h"
#include "../parallel.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int kKeys = 64;  // keys of a block: its scores and weights stay in the L1 cache
constexpr int kKeyUnits = kPairs ? kKeys / 2 : kKeys;
constexpr int kChain = 64;  // floats of a dot product that are summed in one chain
constexpr double kParallelFlops = 1e7;  // work that repays another thread: some 30 us of it
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

FASTDIFF_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What one thread works in. Rows of units are padded to 16.
struct Buffers {
  unit* keys;       // [keys][units]
  unit* values;     // [blocks of keys][width][kKeyUnits], v transposed
  unit* queries;    // [units][64], q transposed
  unit* weights;    // [kKeyUnits][64]; scores themselves where a unit is a float
  float* scores;    // [kKeys][64]
  float* result;    // [width][64]
  uint32_t* stage;  // [64][width]
  float *peak, *used, *limit, *total;  // [64]
};

// to[column][row] = from[row][column], both padded to multiples of 16; only `columns` are written.
#if defined(__AVX512F__)
FASTDIFF_INLINE void transpose_16(const uint32_t* from, int64_t from_row, uint32_t* to,
                                  int64_t to_row, int columns) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_row);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Lane j of a[4 g + i] is column 4 j + i of rows 4 g to 4 g + 3.
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    b[i] = _mm512_shuffle_i32x4(low, high, 0x88);
    b[i + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
    b[i + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
  for (int i = 0; i < 16; ++i)
    if (i < columns) _mm512_storeu_si512(to + i * to_row, b[i]);
}
void transpose(const uint32_t* from, int64_t from_row, int rows, int columns, uint32_t* to,
               int64_t to_row) {
  for (int column = 0; column < columns; column += 16)
    for (int row = 0; row < rows; row += 16)
      transpose_16(from + row * from_row + column, from_row, to + column * to_row + row, to_row,
                   columns - column);
}
#else
void transpose(const uint32_t* from, int64_t from_row, int rows, int columns, uint32_t* to,
               int64_t to_row) {
  for (int column = 0; column < columns; ++column)
    for (int row = 0; row < rows; ++row)
      to[column * to_row + row] = from[row * from_row + column];
}
#endif

// One row of q or k as units, zeros up to `padded`.
template <class T>
FASTDIFF_INLINE void read_row(const T* row, int width, void* to, int64_t padded) {
  if (kPairs) {
    const size_t bytes = size_t(width) * sizeof(T);
    std::memcpy(to, row, bytes);
    std::memset(static_cast<char*>(to) + bytes, 0, size_t(padded) * 4 - bytes);
    return;
  }
  float* out = static_cast<float*>(to);
  int at = 0;
  for (; at < width; at += kLanes)
    store(out + at, load_first(row + at, width - at < kLanes ? width - at : kLanes));
  for (; at < padded; at += kLanes) store(out + at, splat(0.0f));
}

// Pairs of rows of v as units (first, second); a null second is zeros.
#if defined(__AVX512BF16__)
FASTDIFF_INLINE void read_pair(const bf16_t* first, const bf16_t* second, int width, uint32_t* to) {
  for (int at = 0; at < width; at += 16) {
    const __mmask16 mask = first_mask(width - at < 16 ? width - at : 16);
    const __m256i zero = _mm256_setzero_si256();
    const __m256i low = _mm256_maskz_loadu_epi16(mask, first + at);
    const __m256i high = second ? _mm256_maskz_loadu_epi16(mask, second + at) : zero;
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    _mm512_storeu_si512(to + at, _mm512_or_si512(_mm512_cvtepu16_epi32(low), upper));
  }
}
#endif

#if defined(__AVX512BF16__)
// 2^x for weights that are rounded to bf16 next: relative error below 7.6e-5, a fiftieth of what
// rounding costs (the minimax polynomial of degree 3 over the fraction of x).
template <int N>
FASTDIFF_INLINE void power_of_two_bf16(const vfloat (&x)[N], vfloat (&power)[N]) {
  const float coefficients[] = {0x1.cefc4cp-3f, 0x1.64444cp-1f, 0x1.fff632p-1f};
  vfloat r[N];
  for (int i = 0; i < N; ++i) r[i] = _mm512_reduce_ps(x[i], 0x09);  // x - floor(x); 0 at infinity
  for (int i = 0; i < N; ++i) power[i] = splat(0x1.3f96a4p-4f);
  for (const float c : coefficients)
    for (int i = 0; i < N; ++i) power[i] = fma(power[i], r[i], splat(c));
  for (int i = 0; i < N; ++i) power[i] = scale_by_power(power[i], x[i]);  // takes the floor itself
}
#endif

FASTDIFF_INLINE bool any_greater(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#else
  const vint greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
#endif
}

// kShort: weights as exact as 16 bits are; else as fp32, as fp32 results and lse need them.
template <class T, bool kShort>
class Head {
 public:
  Head(const Attention& args, Buffers buffers)
      : args_(args), buffers_(buffers), width_(int(args.width)) {
    units_ = kPairs ? (width_ + 1) / 2 : width_;
    row_ = round_up(units_, 16);
    wide_row_ = round_up(width_, 16);
    const double most = std::numeric_limits<float>::max();
    const double factor = args.scale * (kShort ? 1.4426950408889634 : 1.0);
    factor_ = float(factor < most ? factor : most);
    slack_ = float(5.5 / args.scale);
  }

  // Copies the keys and values of an image and a head that count.
  void read(int64_t image, int64_t head) {
    image_ = image;
    head_ = head;
    keys_ = 0;
    const T* before = nullptr;  // the row of v that waits for its partner
    int64_t staged = 0;         // rows of the stage that are filled
    const uint8_t* valid = args_.valid;
    if (valid) valid += image * (args_.segments[0].keys + args_.segments[1].keys);
    for (const AttentionSegment& segment : args_.segments) {
      const T* k = at(segment.k, image, head);
      const T* v = at(segment.v, image, head);
      for (int64_t i = 0; i < segment.keys; ++i) {
        if (valid && !*valid++) continue;
        read_row(k + i * segment.k.token_stride, width_, buffers_.keys + keys_ * row_, row_);
        const T* row = v + i * segment.v.token_stride;
        if (!kPairs) {
          read_row(row, width_, buffers_.stage + staged++ * wide_row_, wide_row_);
        } else if (keys_ % 2) {
          pair(before, row, staged++);
        } else {
          before = row;
        }
        if (++keys_ % kKeys == 0) {
          put_values(keys_ / kKeys - 1);
          staged = 0;
        }
      }
    }
    if (keys_ % kKeys == 0) return;
    if (kPairs && keys_ % 2) pair(before, nullptr, staged++);
    if (kTiles && staged % 2)  // the tiles of an odd number of units reach one further
      std::memset(buffers_.stage + staged * wide_row_, 0, size_t(wide_row_) * 4);
    put_values(keys_ / kKeys);
  }

  // `queries` queries of a segment from `first` on; lse: of the first of them, or null.
  void attend(const AttentionSegment& segment, int64_t first, int queries, float* lse) {
    T* out = at(segment.out, image_, head_) + first * segment.out.token_stride;
    if (keys_ == 0) {
      for (int i = 0; i < queries; ++i) {
        std::memset(static_cast<void*>(out + i * segment.out.token_stride), 0,
                    size_t(width_) * sizeof(T));
        if (lse) lse[i] = -kInfinity;
      }
      return;
    }
    const T* q = at(segment.q, image_, head_) + first * segment.q.token_stride;
    const int vectors = (queries + kLanes - 1) / kLanes;
    const int padded = int(round_up(queries, 16));
    for (int i = 0; i < padded; ++i) {
      uint32_t* to = buffers_.stage + i * row_;
      if (i < queries)
        read_row(q + i * segment.q.token_stride, width_, to, row_);
      else
        std::memset(to, 0, size_t(row_) * 4);
    }
    transpose(buffers_.stage, row_, padded, kTiles ? int(row_) : units_,
              reinterpret_cast<uint32_t*>(buffers_.queries), kQueries);
    for (int i = 0; i < kQueries; ++i) {
      buffers_.peak[i] = buffers_.limit[i] = -kInfinity;
      buffers_.used[i] = buffers_.total[i] = 0.0f;
    }
    // While this block is computed: the queries of the next, and where this one's result goes. Rows
    // are far apart, and the hardware foresees no strides.
    for (int64_t i = 0; i < kQueries && first + kQueries + i < segment.queries; ++i)
      fetch(q + (kQueries + i) * segment.q.token_stride, false);
    for (int i = 0; i < queries; ++i) fetch(out + i * segment.out.token_stride, true);
    for (int64_t key = 0; key < keys_; key += kKeys)
      block(key, int(keys_ - key < kKeys ? keys_ - key : kKeys), vectors);
    finish(segment, out, queries, vectors, lse);
  }

 private:
  static T* at(const HeadRows& rows, int64_t image, int64_t head) {
    return static_cast<T*>(rows.data) + image * rows.batch_stride + head * rows.head_stride;
  }

  void fetch(const T* row, bool to_write) const {
    const char* at = reinterpret_cast<const char*>(row);
    for (size_t byte = 0; byte < size_t(width_) * sizeof(T); byte += 64) {
      if (to_write)
        __builtin_prefetch(at + byte, 1);
      else
        __builtin_prefetch(at + byte, 0);
    }
  }

  void pair(const T* first, const T* second, int64_t staged) {
#if defined(__AVX512BF16__)
    read_pair(first, second, width_, buffers_.stage + staged * wide_row_);
#else
    (void)first, (void)second, (void)staged;
#endif
  }

  void put_values(int64_t block) {
    transpose(buffers_.stage, wide_row_, kKeyUnits, width_,
              reinterpret_cast<uint32_t*>(buffers_.values) + block * wide_row_ * kKeyUnits,
              kKeyUnits);
  }

  void block(int64_t key, int keys, int vectors) {
    const Buffers& b = buffers_;
    score(b.keys + key * row_, keys, vectors);
    bool grows = false;
    for (int j = 0; j < vectors; ++j)
      grows |= any_greater(load(b.peak + j * kLanes), load(b.limit + j * kLanes));
    if (grows) rescale(key != 0, vectors);
    for (int j = 0; j < vectors; ++j) soften(keys, j * kLanes);
    const unit* values = b.values + key / kKeys * wide_row_ * kKeyUnits;
    const int units = kPairs ? (keys + 1) / 2 : keys;
    if (kTiles && units % 2) std::memset(b.weights + units * kQueries, 0, kQueries * 4);
    if (key == 0)
      multiply<false, false>(values, kKeyUnits, b.weights, width_, units, vectors, b.result,
                             nullptr);
    else
      multiply<true, false>(values, kKeyUnits, b.weights, width_, units, vectors, b.result,
                            nullptr);
  }

  // Sums of floats are taken in parts: one long chain of a wide head would lose a digit.
  void score(const unit* keys, int count, int vectors) {
    const Buffers& b = buffers_;
    const int step = kPairs ? units_ : kChain;
    if (units_ <= step)
      return multiply<false, true>(keys, row_, b.queries, count, units_, vectors, b.scores, b.peak);
    multiply<false, false>(keys, row_, b.queries, count, step, vectors, b.scores, nullptr);
    for (int at = step; at < units_; at += step) {
      const unit* queries = b.queries + at * kQueries;
      if (at + step < units_)
        multiply<true, false>(keys + at, row_, queries, count, step, vectors, b.scores, nullptr);
      else
        multiply<true, true>(keys + at, row_, queries, count, units_ - at, vectors, b.scores,
                             b.peak);
    }
  }

  // From now on the maxima of today are subtracted; 0 for a query that has seen only -inf, or
  // +inf, and whose result is NaN.
  void rescale(bool scale_result, int vectors) {
    const Buffers& b = buffers_;
    alignas(64) float change[kQueries];
    for (int i = 0; i < vectors * kLanes; ++i) {
      const bool first = b.limit[i] == -kInfinity;
      const float now = std::fabs(b.peak[i]) < kInfinity ? b.peak[i] : 0.0f;
      change[i] = first ? kInfinity : (now - b.used[i]) * float(args_.scale);
      b.used[i] = now;
      b.limit[i] = b.peak[i] + slack_;
    }
    for (int j = 0; j < vectors; ++j) {
      vfloat x[1] = {load(change + j * kLanes)}, factor[1];
      exp_negative(x, factor);
      store(b.total + j * kLanes, load(b.total + j * kLanes) * factor[0]);
      if (!scale_result) continue;
      for (int i = 0; i < width_; ++i) {
        float* result = b.result + i * kQueries + j * kLanes;
        store(result, load(result) * factor[0]);
      }
    }
  }

  // Scores become weights, in one vector of columns.
  void soften(int keys, int column) {
    const Buffers& b = buffers_;
    const vfloat used = load(b.used + column);
    vfloat total = load(b.total + column);
    constexpr int kStep = 4;
    int key = 0;
    for (; key + kStep <= keys; key += kStep) soften<kStep>(key, column, used, total);
    if (keys - key >= 2) {
      soften<2>(key, column, used, total);
      key += 2;
    }
    if (key < keys) soften<1>(key, column, used, total);
    store(b.total + column, total);
  }

  template <int N>
  FASTDIFF_METHOD void soften(int key, int column, vfloat used, vfloat& total) {
    float* scores = buffers_.scores + key * kQueries + column;
    vfloat x[N], power[N];
    for (int i = 0; i < N; ++i) x[i] = load(scores + i * kQueries);
    if (kShort) {
      for (int i = 0; i < N; ++i) x[i] = (x[i] - used) * splat(factor_);
#if defined(__AVX512BF16__)
      power_of_two_bf16(x, power);
#else
      power_of_two_short(x, power);
#endif
    } else {
      for (int i = 0; i < N; ++i) x[i] = (used - x[i]) * splat(factor_);
      exp_negative(x, power);
    }
#if defined(__AVX512BF16__)
    alignas(64) static constexpr uint16_t kInterleave[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kInterleave);
    unit* weights = buffers_.weights + key / 2 * kQueries + column;
    for (int i = 0; i < N; i += 2) {
      const vfloat second = i + 1 < N ? power[i + 1 < N ? i + 1 : 0] : splat(0.0f);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, power[i]);
      const __m512i pair = _mm512_permutexvar_epi16(order, both);
      _mm512_storeu_si512(weights + i / 2 * kQueries, pair);
      // The sum of the rounded weights: one key that outweighs all others gets exactly its value.
      if (kShort) total = multiply_add(0x3f803f80u, (vfloat)pair, total);
    }
#else
    for (int i = 0; i < N; ++i) store(scores + i * kQueries, power[i]);
#endif
    if (kPairs && kShort) return;
    vfloat sum = power[0];
    for (int i = 1; i < N; ++i) sum = sum + power[i];
    total = total + sum;
  }

  void finish(const AttentionSegment& segment, T* out, int queries, int vectors, float* lse) {
    const Buffers& b = buffers_;
    for (int i = 0; i < vectors * kLanes; ++i) {
      // Without AVX-512 the exponential has neither 0 nor inf at its ends; NaN stays.
      float total = b.total[i];
      if (b.peak[i] == kInfinity) total = total + kInfinity;
      if (b.peak[i] == -kInfinity) total = total * 0.0f;
      if (lse && i < queries) lse[i] = b.used[i] * float(args_.scale) + std::log(total);
      if (std::fabs(b.peak[i]) == kInfinity) b.total[i] = kNaN;
    }
    for (int j = 0; j < vectors; ++j) {
      const vfloat total = load(b.total + j * kLanes);
      const vfloat factor = splat(1.0f) / total;
      for (int i = 0; i < width_; ++i) {
        float* result = b.result + i * kQueries + j * kLanes;
        store(result, load(result) * factor);
      }
    }
    transpose(reinterpret_cast<const uint32_t*>(b.result), kQueries, int(wide_row_),
              int(round_up(queries, kLanes)), b.stage, wide_row_);
    for (int i = 0; i < queries; ++i) {
      const float* row = reinterpret_cast<const float*>(b.stage) + i * wide_row_;
      T* to = out + i * segment.out.token_stride;
      int column = 0;
      for (; column + kLanes <= width_; column += kLanes) store(to + column, load(row + column));
      if (column < width_) store_first(to + column, load(row + column), width_ - column);
    }
  }

  const Attention& args_;
  const Buffers buffers_;
  const int width_;
  int units_;          // of a row of q or k
  int64_t row_;        // units_ padded
  int64_t wide_row_;   // width_ padded
  float factor_;       // of differences of scores, before the exponential
  float slack_;        // what a score may exceed the subtracted one by
  int64_t image_ = 0, head_ = 0, keys_ = 0;
};

template <class T, bool kShort>
void run(const Attention& args) {
  const AttentionSegment *main = &args.segments[0], *extra = &args.segments[1];
  const int64_t main_blocks = (main->queries + kQueries - 1) / kQueries;
  const int64_t blocks = main_blocks + (extra->queries + kQueries - 1) / kQueries;
  const int64_t items = args.batch * args.heads * blocks, keys = main->keys + extra->keys;
  if (items == 0) return;
  const double flops = 4.0 * kQueries * double(keys) * double(args.width);
  const int64_t grain = int64_t(kParallelFlops / (flops + 1)) + 1;
  int teams = int((items + grain - 1) / grain);
  if (teams > args.threads) teams = args.threads;
  const int64_t row = round_up(args.width, 16), padded_keys = round_up(keys, kKeys);
  Buffers* buffers = args.workspace->take<Buffers>(teams);
  for (int i = 0; i < teams; ++i) {
    Buffers& b = buffers[i];
    b.keys = args.workspace->take<unit>(padded_keys * row);
    b.values = args.workspace->take<unit>(padded_keys / kKeys * kKeyUnits * row);
    b.queries = args.workspace->take<unit>(row * kQueries);
    b.scores = args.workspace->take<float>(kKeys * kQueries);
    b.weights = kPairs ? args.workspace->take<unit>(kKeyUnits * kQueries)
                       : reinterpret_cast<unit*>(b.scores);
    b.result = args.workspace->take<float>(row * kQueries);
    b.stage = args.workspace->take<uint32_t>(row * kQueries);
    b.peak = args.workspace->take<float>(4 * kQueries);
    b.used = b.peak + kQueries;
    b.limit = b.used + kQueries;
    b.total = b.limit + kQueries;
  }
  int taken = 0;  // a range of items has buffers of its own
  parallel_for(items, grain, teams, [&](int64_t begin, int64_t end) {
    Head<T, kShort> head(args, buffers[__atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)]);
    int64_t current = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t pair = item / blocks, block = item % blocks;
      if (pair != current) head.read(pair / args.heads, pair % args.heads);
      current = pair;
      const bool is_main = block < main_blocks;
      const AttentionSegment& segment = is_main ? *main : *extra;
      const int64_t first = (is_main ? block : block - main_blocks) * kQueries;
      const int64_t left = segment.queries - first;
      float* lse = args.lse;
      if (lse) lse += pair * (main->queries + extra->queries) + first;
      if (lse && !is_main) lse += main->queries;
      head.attend(segment, first, int(left < kQueries ? left : kQueries), lse);
    }
    release_tiles();
  });
}

template <class T>
void run_16_bits(const Attention& args) {
  return args.lse ? run<T, false>(args) : run<T, true>(args);
}

}  // namespace

void attention_kernel(const Attention& args) {
#if defined(__AVX512BF16__)
  run_16_bits<bf16_t>(args);
#else
  switch (args.dtype) {
    case DType::f16: return run_16_bits<f16_t>(args);
    case DType::bf16: return run_16_bits<bf16_t>(args);
    default: return run<float, false>(args);
  }
#endif
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
