// Row-wise ops of transformer blocks on the CPU: gated residual, layer norm or RMS norm, affine and
// modulation in one pass; see cpu/rows.cpp.
#pragma once

#include "common.h"
#include "dispatch.h"

namespace fastdiff {

constexpr int kRowDims = 3;
constexpr int64_t kMaxRowWidth = 8192;

// A row for every index of the outer dimensions; columns are contiguous. data is null when the
// argument is absent.
struct RowTensor {
  const void* data = nullptr;
  int64_t stride[kRowDims] = {};
};

enum class Norm : int { none = 0, layer = 1, rms = 2 };

struct Rows {
  Norm norm;
  RowTensor x, y, gate, scale, shift;  // y and gate come together
  const void *weight, *bias;           // [width] or null
  void *residual, *out;                // contiguous; residual if there is y, out unless Norm::none
  int64_t size[kRowDims];
  int64_t width;  // at most kMaxRowWidth
  double eps;
  DType x_dtype;      // of x, y, residual and out
  DType param_dtype;  // of weight and bias
  DType mod_dtype;    // of gate, scale and shift: x_dtype or fp32
  int threads;
};

FASTDIFF_DECLARE_ISA(void, rows, (const Rows& args))

}  // namespace fastdiff
