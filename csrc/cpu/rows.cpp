// residual = x + gate * y
// out = (norm(residual) * weight + bias) * (1 + scale) + shift, norm = layer norm, RMS norm or none
//
//   x, y, gate, scale, shift   rows of `width` contiguous columns in up to three dimensions, each
//                              with strides of its own; y and gate, scale, shift may be absent
//   weight, bias               [width]; each may be absent
//   residual, out              contiguous
//
// A thread takes one row after the other through all passes while the row is in the first cache: x
// and y are read from memory once, each result written once. The residual has PyTorch's bits: the
// product is rounded to the wider dtype of gate and y, the sum to x's, nothing is contracted.
// Statistics are fp32, of a few hundred terms per lane, and centred: the second pass also sums what
// the rounding of the mean left. Affine and modulation are folded into y = d * slope + offset, again
// only when a row's differ from those of the row before.
#include "../rows.h"

#include <cmath>

#include "../parallel.h"
#include "../simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t kParallelGrain = 16384;  // elements that repay handing work to another thread
constexpr int kWays = 4;                   // sums that do not wait for each other

template <class T>
FASTDIFF_INLINE void widen_row(float* to, const void* from, int64_t width) {
  const T* p = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(to + i, load(p + i));
  if (i < width) store_first(to + i, load_first(p + i, int(width - i)), int(width - i));
}

void widen_row(float* to, const void* from, DType dtype, int64_t width) {
  switch (dtype) {
    case DType::f16: return widen_row<f16_t>(to, from, width);
    case DType::bf16: return widen_row<bf16_t>(to, from, width);
    default: return widen_row<float>(to, from, width);
  }
}

// Where each tensor's current row is, counted along instead of divided out.
struct Place {
  int64_t at[kRowDims];

  FASTDIFF_METHOD Place(const int64_t* size, int64_t row) {
    for (int d = kRowDims - 1; d >= 0; --d) {
      at[d] = row % size[d];
      row /= size[d];
    }
  }
  FASTDIFF_METHOD void next(const int64_t* size) {
    for (int d = kRowDims - 1; d >= 0; --d) {
      if (++at[d] < size[d]) return;
      at[d] = 0;
    }
  }
  FASTDIFF_METHOD int64_t offset(const RowTensor& tensor) const {
    int64_t sum = 0;
    for (int d = 0; d < kRowDims; ++d) sum += at[d] * tensor.stride[d];
    return sum;
  }
};

FASTDIFF_INLINE const void* element(const RowTensor& tensor, int64_t offset, DType dtype) {
  if (!tensor.data) return nullptr;
  return static_cast<const char*>(tensor.data) + offset * dtype_size(dtype);
}

template <class T, bool kRound>
FASTDIFF_INLINE vfloat gated(vfloat x, vfloat y, vfloat gate) {
  vfloat product = gate * y;
  if (kRound) product = round_to<T>(product);
  return x + product;
}

template <class T, bool kRound>
FASTDIFF_INLINE void gate_row(const T* x, const T* y, const float* gate, T* out, int64_t width) {
  int64_t i = 0;
  for (; i + kBlock * kLanes <= width; i += kBlock * kLanes) {
    vfloat sum[kBlock];
    for (int v = 0; v < kBlock; ++v) {
      const int64_t at = i + v * kLanes;
      sum[v] = gated<T, kRound>(load(x + at), load(y + at), load(gate + at));
    }
    store_block(out + i, sum);
  }
  for (; i < width; i += kLanes) {
    const int n = int(width - i < kLanes ? width - i : kLanes);
    store_first(
        out + i,
        gated<T, kRound>(load_first(x + i, n), load_first(y + i, n), load_first(gate + i, n)), n);
  }
}

struct Moments {
  float mean, rest, rstd;
};

template <class T>
FASTDIFF_INLINE Moments layer_moments(const T* x, int64_t width, double eps) {
  const float inverse = 1.0f / float(width);
  vfloat sum[kWays];
  for (int v = 0; v < kWays; ++v) sum[v] = splat(0.0f);
  int64_t i = 0;
  for (; i + kWays * kLanes <= width; i += kWays * kLanes)
    for (int v = 0; v < kWays; ++v) sum[v] = sum[v] + load(x + i + v * kLanes);
  for (; i + kLanes <= width; i += kLanes) sum[0] = sum[0] + load(x + i);
  if (i < width) sum[1] = sum[1] + load_first(x + i, int(width - i));
  const float mean = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) * inverse;

  const vfloat centre = splat(mean);
  vfloat rest[kWays], squares[kWays];
  for (int v = 0; v < kWays; ++v) rest[v] = squares[v] = splat(0.0f);
  for (i = 0; i + kWays * kLanes <= width; i += kWays * kLanes)
    for (int v = 0; v < kWays; ++v) {
      const vfloat d = load(x + i + v * kLanes) - centre;
      rest[v] = rest[v] + d;
      squares[v] = fma(d, d, squares[v]);
    }
  for (; i < width; i += kLanes) {
    const int n = int(width - i < kLanes ? width - i : kLanes);
    const vfloat d = keep_first(load_first(x + i, n) - centre, n);
    rest[0] = rest[0] + d;
    squares[0] = fma(d, d, squares[0]);
  }
  Moments moments;
  moments.mean = mean;
  moments.rest = sum_lanes((rest[0] + rest[1]) + (rest[2] + rest[3])) * inverse;
  const double square = double(sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])));
  double variance = square / double(width) - double(moments.rest) * double(moments.rest);
  if (variance < 0) variance = 0;
  moments.rstd = float(1.0 / std::sqrt(variance + eps));
  return moments;
}

template <class T>
FASTDIFF_INLINE Moments rms_moments(const T* x, int64_t width, double eps) {
  vfloat squares[kWays];
  for (int v = 0; v < kWays; ++v) squares[v] = splat(0.0f);
  int64_t i = 0;
  for (; i + kWays * kLanes <= width; i += kWays * kLanes)
    for (int v = 0; v < kWays; ++v) {
      const vfloat d = load(x + i + v * kLanes);
      squares[v] = fma(d, d, squares[v]);
    }
  for (; i < width; i += kLanes) {
    const vfloat d = load_first(x + i, int(width - i < kLanes ? width - i : kLanes));
    squares[0] = fma(d, d, squares[0]);
  }
  const double square = double(sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])));
  return {0.0f, 0.0f, float(1.0 / std::sqrt(square / double(width) + eps))};
}

// kSlope, kOffset: whether there are any; else they are 1 and 0.
template <class T, bool kCentre, bool kSlope, bool kOffset>
FASTDIFF_INLINE vfloat normed(vfloat x, vfloat mean, vfloat rest, vfloat rstd, const float* slope,
                              const float* offset, int n) {
  vfloat y = kCentre ? ((x - mean) - rest) * rstd : x * rstd;
  if (kSlope && kOffset) return fma(y, load_first(slope, n), load_first(offset, n));
  if (kSlope) y = y * load_first(slope, n);
  if (kOffset) y = y + load_first(offset, n);
  return y;
}

template <class T, bool kCentre, bool kSlope, bool kOffset>
void apply_row(const T* x, T* out, int64_t width, Moments moments, const float* slope,
               const float* offset) {
  const vfloat mean = splat(moments.mean), rest = splat(moments.rest), rstd = splat(moments.rstd);
  int64_t i = 0;
  for (; i + kBlock * kLanes <= width; i += kBlock * kLanes) {
    vfloat y[kBlock];
    for (int v = 0; v < kBlock; ++v) {
      const int64_t at = i + v * kLanes;
      y[v] = normed<T, kCentre, kSlope, kOffset>(load(x + at), mean, rest, rstd, slope + at,
                                                 offset + at, kLanes);
    }
    store_block(out + i, y);
  }
  for (; i < width; i += kLanes) {
    const int n = int(width - i < kLanes ? width - i : kLanes);
    store_first(out + i,
                normed<T, kCentre, kSlope, kOffset>(load_first(x + i, n), mean, rest, rstd,
                                                    slope + i, offset + i, n),
                n);
  }
}

template <class T, bool kCentre>
FASTDIFF_INLINE void apply_row(const T* x, T* out, int64_t width, Moments moments,
                               const float* slope, const float* offset) {
  if (slope && offset)
    apply_row<T, kCentre, true, true>(x, out, width, moments, slope, offset);
  else if (slope)
    apply_row<T, kCentre, true, false>(x, out, width, moments, slope, offset);
  else if (offset)
    apply_row<T, kCentre, false, true>(x, out, width, moments, slope, offset);
  else
    apply_row<T, kCentre, false, false>(x, out, width, moments, slope, offset);
}

// slope = weight * (1 + scale), offset = bias * (1 + scale) + shift.
struct Folded {
  alignas(64) float slope[kMaxRowWidth];
  alignas(64) float offset[kMaxRowWidth];
  alignas(64) float part[kMaxRowWidth];
  const void *scale, *shift;  // what they were folded from
};

FASTDIFF_INLINE void fold(const Rows& args, const void* scale, const void* shift, Folded* to) {
  const int64_t width = args.width;
  if (args.weight) widen_row(to->slope, args.weight, args.param_dtype, width);
  if (args.bias) widen_row(to->offset, args.bias, args.param_dtype, width);
  if (scale) {
    widen_row(to->part, scale, args.mod_dtype, width);
    for (int64_t i = 0; i < width; ++i) {
      const float factor = 1.0f + to->part[i];
      to->slope[i] = args.weight ? to->slope[i] * factor : factor;
      if (args.bias) to->offset[i] *= factor;
    }
  }
  if (shift) {
    widen_row(to->part, shift, args.mod_dtype, width);
    for (int64_t i = 0; i < width; ++i)
      to->offset[i] = args.bias ? to->offset[i] + to->part[i] : to->part[i];
  }
}

template <class T>
void some_rows(const Rows& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  const bool round = args.mod_dtype != DType::f32;  // the gate's dtype is the product's, T
  Folded folded;
  alignas(64) float gate[kMaxRowWidth];
  const void* gate_before = nullptr;
  bool first = true;
  Place place(args.size, begin);
  for (int64_t row = begin; row < end; ++row, place.next(args.size)) {
    const T* x = static_cast<const T*>(args.x.data) + place.offset(args.x);
    if (args.y.data) {
      const T* y = static_cast<const T*>(args.y.data) + place.offset(args.y);
      T* residual = static_cast<T*>(args.residual) + row * width;
      const void* g = element(args.gate, place.offset(args.gate), args.mod_dtype);
      if (g != gate_before) widen_row(gate, g, args.mod_dtype, width);
      gate_before = g;
      if (round)
        gate_row<T, true>(x, y, gate, residual, width);
      else
        gate_row<T, false>(x, y, gate, residual, width);
      x = residual;
    }
    if (args.norm == Norm::none) continue;
    const void* scale = element(args.scale, place.offset(args.scale), args.mod_dtype);
    const void* shift = element(args.shift, place.offset(args.shift), args.mod_dtype);
    if (first || scale != folded.scale || shift != folded.shift) fold(args, scale, shift, &folded);
    first = false;
    folded.scale = scale;
    folded.shift = shift;
    const float* slope = args.weight || scale ? folded.slope : nullptr;
    const float* offset = args.bias || shift ? folded.offset : nullptr;
    T* out = static_cast<T*>(args.out) + row * width;
    if (args.norm == Norm::layer)
      apply_row<T, true>(x, out, width, layer_moments(x, width, args.eps), slope, offset);
    else
      apply_row<T, false>(x, out, width, rms_moments(x, width, args.eps), slope, offset);
  }
}

template <class T>
void all_rows(const Rows& args) {
  const int64_t count = args.size[0] * args.size[1] * args.size[2];
  const int64_t grain = (kParallelGrain + args.width - 1) / args.width;
  parallel_for(count, grain, args.threads,
               [&](int64_t begin, int64_t end) { some_rows<T>(args, begin, end); });
}

}  // namespace

void rows(const Rows& args) {
  switch (args.x_dtype) {
    case DType::f16: return all_rows<f16_t>(args);
    case DType::bf16: return all_rows<bf16_t>(args);
    default: return all_rows<float>(args);
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
