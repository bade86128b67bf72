// One row of a solver table as one pass over memory; see fastdiff/solvers/table.py for its meaning.
#pragma once

#include <cstdint>

#include "common.h"
#include "dispatch.h"

namespace fastdiff {

constexpr int kMaxRegisters = 8;
constexpr int kMaxUpdates = 4;

struct StepTask {
  int num_registers;
  void* registers[kMaxRegisters];  // [images, per_image] each, float32 or float64
  DType state;

  const void* output;  // the model's output; with guidance the conditioned half
  const void* uncond;  // null without guidance
  DType output_dtype;

  void* input;  // the next model input, [copies, images, per_image]; null: not written
  DType input_dtype;
  int copies;

  const void* noise;      // this row's draw in the registers' dtype, or null
  const uint64_t* seeds;  // one per image: draw from Philox; used when `noise` is null
  uint32_t draw;

  int64_t images, per_image;
  // 1: memory order is the order in which an image's noise is numbered (contiguous [C, spatial]).
  // C > 1: memory is channels last, [spatial, C] per image.
  int64_t channels = 1;

  int feed, next_feed, num_updates;  // next_feed -1: last row
  int dest[kMaxUpdates];
  // [next_input_scale, from_state, from_output, guidance, per update: registers.., prediction, noise]
  const double* coef;
};

FASTDIFF_DECLARE_ISA(void, solver_step, (const StepTask& task, int threads))
// Fills out[image * per_image + e] with the normal of (seeds[image], draw, e).
FASTDIFF_DECLARE_ISA(void, philox_normal,
                     (float* out, int64_t images, int64_t per_image, const uint64_t* seeds,
                      uint32_t draw, int threads))

}  // namespace fastdiff
