// softmax(scale * q' k'^T) v per image and head, on the CPU: see cpu/attention.cpp.
#pragma once

#include "common.h"
#include "dispatch.h"
#include "workspace.h"

namespace fastdiff {

// [batch, tokens, heads, width] with unit stride along the width; strides in elements. data is null
// when the tensor is absent.
struct HeadRows {
  void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

// One of the two runs of tokens; queries without keys and keys without queries are allowed.
struct AttentionSegment {
  HeadRows q, k, v, out;
  int64_t queries = 0, keys = 0;
};

struct Attention {
  AttentionSegment segments[2];
  const uint8_t* valid = nullptr;  // [batch, keys of both segments], 0: left out; or null
  float* lse = nullptr;            // [batch, heads, queries of both segments], or null
  int64_t batch, heads, width;
  double scale;
  DType dtype;
  int threads;
  Workspace* workspace;
};

// The instruction set of this op: isa_level(), or 3 where the processor has AVX512_BF16, or 4 where
// FASTDIFF_ISA_MAX is 4, it has AMX-BF16, and the kernel lets this process use it. A lower
// FASTDIFF_ISA_MAX lowers it.
int attention_level();

void attention(const Attention& args);

FASTDIFF_DECLARE_ISA(void, attention_kernel, (const Attention& args))
// Compiled for these two as well; they take bf16 only.
namespace isa_avx512bf16 {
void attention_kernel(const Attention& args);
}
namespace isa_amx {
void attention_kernel(const Attention& args);
}

}  // namespace fastdiff
