// What the CPU and the CUDA bindings of the solver step share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sampling_loop.h"
#include "solver_step.h"

// ValueError with `message` unless `condition` holds.
void require(bool condition, const std::string& message);

// A task with its sizes and pointers checked; the row's fields are still empty.
fastdiff::StepTask make_task(const fastdiff::PackedTable& table,
                             const std::vector<uintptr_t>& registers, int state_dtype,
                             int output_dtype, uintptr_t input, int input_dtype, int copies,
                             const std::vector<uint64_t>& seeds, int64_t images, int64_t per_image,
                             int64_t channels);

bool row_uses_noise(const fastdiff::StepTask& task);

#if defined(FASTDIFF_WITH_CUDA)
void bind_solver_cuda(pybind11::module_& module);
#endif
