// GroupNorm with an optional added term, modulation and SiLU, on the CPU: see
// cpu/group_norm_silu.cpp.
#pragma once

#include "common.h"
#include "dispatch.h"
#include "workspace.h"

namespace fastdiff {

// A per-channel argument: [channels], or [batch, channels] with the given element stride of the
// batch dimension (0 for the former). data is null when the argument is absent.
struct ChannelVector {
  const void* data = nullptr;
  int64_t stride = 0;
};

struct GroupNormSilu {
  const void* x;
  void* out;
  const void* skip = nullptr;      // the last skip_channels of the channels, or null
  const void* residual = nullptr;  // added to x, the sum is written to total; or null
  void* total = nullptr;
  int64_t skip_channels = 0;
  ChannelVector add, weight, bias, scale, shift;
  int64_t batch, channels, hw, groups;
  double eps;
  bool silu, channels_last;
  DType x_dtype;      // of x and out
  DType param_dtype;  // of weight and bias
  DType mod_dtype;    // of add, scale and shift
  int threads;
  Workspace* workspace;
};

FASTDIFF_DECLARE_ISA(void, group_norm_silu, (const GroupNormSilu& args))

}  // namespace fastdiff
