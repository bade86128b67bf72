// What both layouts of group_norm_silu.cpp share: sums in fp32 and double, the
// moments they give, and everything per channel folded into one multiplication and one addition.
#pragma once

#include <cmath>

#include "../group_norm_silu.h"
#include "../simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

FASTDIFF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTDIFF_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTDIFF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sums over x - centre.
struct Sums {
  double sum = 0, squares = 0;
};

struct Moments {
  double mean, rstd;
};

// Channels first: a group's elements lie at x up to `boundary`, from there on at skip.
template <class T>
struct GroupRun {
  const T *x, *skip;
  int64_t boundary;

  FASTDIFF_METHOD const T* from(int64_t at) const {
    return at < boundary ? x + at : skip + (at - boundary);
  }
  // Where what is contiguous from `at` on ends, `end` at the latest.
  FASTDIFF_METHOD int64_t stop(int64_t at, int64_t end) const {
    return at < boundary ? smaller(end, boundary) : end;
  }
};

// Channels last: one of the tensors that are joined; its channels start at `begin` of the whole.
template <class T>
struct ColumnPart {
  const T* data;
  int64_t begin, channels;
};

// total = x + residual, rounded to T, or nothing where total is null.
template <class T>
struct Addition {
  const T *x, *residual;
  T* total;

  FASTDIFF_METHOD void write(int64_t begin, int64_t n) const {
    if (!total) return;
    const int64_t end = begin + n;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(total + i, load(x + i) + load(residual + i));
    if (i < end) {
      const int rest = int(end - i);
      store_first(total + i, load_first(x + i, rest) + load_first(residual + i, rest), rest);
    }
  }
};

// y = act((x - centre) * slope + offset), per channel.
struct Affine {
  float *centre, *slope, *offset;
};

template <class T>
FASTDIFF_INLINE void widen_all(float* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_first(to + i, load_first(from + i, int(n - i)), int(n - i));
}

// Elements [begin, begin + n) of a per-channel argument as floats.
void read_channels(float* to, ChannelVector from, DType dtype, int64_t image, int64_t begin,
                   int64_t n) {
  const int64_t at = image * from.stride + begin;
  switch (dtype) {
    case DType::f16: return widen_all(to, static_cast<const f16_t*>(from.data) + at, n);
    case DType::bf16: return widen_all(to, static_cast<const bf16_t*>(from.data) + at, n);
    default: return widen_all(to, static_cast<const float*>(from.data) + at, n);
  }
}

void fill(float* to, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

// centre[c] = group_centre - add[c] for `groups` groups from channel `begin` of `image` on. add
// goes into the centres instead of into x. Returned in `error`, per group: the sum over its
// channels of what rounding the centres took away.
void centre_channels(const GroupNormSilu& args, int64_t image, int64_t begin, int64_t groups,
                     const float* group_centre, float* centre, double* error) {
  const int64_t width = args.channels / args.groups;
  if (args.add.data) read_channels(centre, args.add, args.mod_dtype, image, begin, groups * width);
  for (int64_t g = 0; g < groups; ++g, centre += width) {
    error[g] = 0;
    if (!args.add.data) {
      fill(centre, group_centre[g], width);
      continue;
    }
    for (int64_t c = 0; c < width; ++c) {
      const double exact = double(group_centre[g]) - double(centre[c]);
      centre[c] = float(exact);
      error[g] += exact - double(centre[c]);
    }
  }
}

// Everything per channel for `groups` groups from channel `begin` of `image` on.
void fold_channels(const GroupNormSilu& args, int64_t image, int64_t begin, int64_t groups,
                   const Moments* moments, Affine to) {
  constexpr int64_t kPiece = 256;
  alignas(64) float add[kPiece], weight[kPiece], bias[kPiece], scale[kPiece], shift[kPiece];
  const int64_t width = args.channels / args.groups;
  for (int64_t g = 0; g < groups; ++g) {
    const double mean = moments[g].mean;
    const float rstd = float(moments[g].rstd);
    for (int64_t at = 0; at < width; at += kPiece) {
      const int64_t n = smaller(kPiece, width - at), c0 = g * width + at;
      float *centre = to.centre + c0, *slope = to.slope + c0, *offset = to.offset + c0;
      const auto read = [&](float* into, ChannelVector from, DType dtype, float missing) {
        if (from.data) return read_channels(into, from, dtype, image, begin + c0, n);
        fill(into, missing, n);
      };
      read(weight, args.weight, args.param_dtype, 1.0f);
      read(bias, args.bias, args.param_dtype, 0.0f);
      if (args.scale.data) {
        read(scale, args.scale, args.mod_dtype, 0.0f);
        for (int64_t c = 0; c < n; ++c) {
          weight[c] *= 1.0f + scale[c];
          bias[c] *= 1.0f + scale[c];
        }
      }
      if (args.shift.data) {
        read(shift, args.shift, args.mod_dtype, 0.0f);
        for (int64_t c = 0; c < n; ++c) bias[c] += shift[c];
      }
      if (args.add.data) {
        read(add, args.add, args.mod_dtype, 0.0f);
        for (int64_t c = 0; c < n; ++c) {
          const double exact = mean - double(add[c]);
          centre[c] = float(exact);
          slope[c] = weight[c] * rstd;
          offset[c] = bias[c] - slope[c] * float(exact - double(centre[c]));
        }
      } else {
        const float rounded = float(mean), rest = float(mean - double(rounded));
        for (int64_t c = 0; c < n; ++c) {
          centre[c] = rounded;
          slope[c] = weight[c] * rstd;
          offset[c] = bias[c] - slope[c] * rest;
        }
      }
    }
  }
}

// The mean and 1 / standard deviation from sums over `count` elements; false when the centre was
// too far from the mean, which is then the centre to use instead.
bool finish(Sums sums, double centre_error, int64_t count, double eps, float* centre, Moments* to) {
  const double n = double(count);
  const double sum = sums.sum - centre_error;
  const double distance = sum / n;
  const double mean = double(*centre) + distance;
  double variance = sums.squares / n - distance * distance;
  const bool good = !(distance * distance > variance);
  if (variance < 0) variance = 0;
  to->mean = mean;
  to->rstd = 1.0 / std::sqrt(variance + eps);
  *centre = float(mean);
  return good;
}

FASTDIFF_INLINE void add_lanes(vfloat v, double* to) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) to[i] += double(lanes[i]);
}

struct PairSums {
  vfloat sum, squares;
  FASTDIFF_METHOD PairSums() : sum(splat(0.0f)), squares(splat(0.0f)) {}
  FASTDIFF_METHOD void take(vfloat d) {
    sum = sum + d;
    squares = fma(d, d, squares);
  }
  // Four vectors, added to each other first: a quarter of the roundings at the size of the sum.
  template <class T>
  FASTDIFF_METHOD void take4(const T* x, int64_t step, vfloat centre) {
    const vfloat a = load(x) - centre, b = load(x + step) - centre;
    const vfloat c = load(x + 2 * step) - centre, d = load(x + 3 * step) - centre;
    sum = sum + ((a + b) + (c + d));
    squares = squares + fma(d, d, fma(c, c, fma(b, b, a * a)));
  }
};

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
