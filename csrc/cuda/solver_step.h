// The CUDA twin of csrc/cpu/solver_step.cpp: the same bits, one launch per row.
#pragma once

#include <cstdint>

#include "../solver_step.h"

namespace fastdiff {

// One row in device memory, for launches that read the row's number there (captured graphs).
struct DeviceRow {
  int feed, next_feed, num_updates;
  uint32_t draw;
  uint32_t reads;  // bit r: register r is read
  int dest[kMaxUpdates];
  double coef[4 + kMaxUpdates * (kMaxRegisters + 2)];  // as in StepTask, at stride num_registers + 2
};

// What a graph replay advances: `step` is the next row, `done` counts the blocks of the running launch.
struct DeviceStep {
  int step;
  unsigned done;
};

DeviceRow make_device_row(const StepTask& task);

// Enqueues the row of `task` on `stream`; no synchronisation. seeds and noise are device pointers.
// Returns a cudaError_t (0: success). The model's output and input share one dtype here.
int cuda_solver_step(const StepTask& task, void* stream);

// The same with the row taken from rows[counter->step] at run time; the last block adds one to
// counter->step (back to 0 after num_rows), so that one captured launch serves every step.
int cuda_solver_step_indexed(const StepTask& task, const DeviceRow* rows, int num_rows,
                             DeviceStep* counter, void* stream);

// Fills out[images, per_image] with the normals of (seed, draw, element), as the CPU does.
int cuda_philox_normal(float* out, int64_t images, int64_t per_image, const uint64_t* seeds,
                       uint32_t draw, void* stream);

const char* cuda_error_text(int code);

}  // namespace fastdiff
