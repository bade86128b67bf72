// out = hidden * act(gate) on the CPU, the two halves of the last dimension: see cpu/gated.cpp.
#pragma once

#include "common.h"
#include "dispatch.h"

namespace fastdiff {

enum class Activation : int { gelu = 0, gelu_tanh = 1, silu = 2 };

struct Gated {
  const void* x;  // [outer, inner, 2 * width], rows contiguous, strides in elements
  void* out;      // [outer, inner, width], contiguous
  int64_t outer, inner, outer_stride, inner_stride, width;
  bool gate_first;
  Activation activation;
  DType dtype;  // of x and out: fp32, fp16 or bf16
  int threads;
};

FASTDIFF_DECLARE_ISA(void, gated, (const Gated& args))

}  // namespace fastdiff
