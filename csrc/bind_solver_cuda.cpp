// Python bindings of the CUDA solver step and of graph launches; empty in a build without nvcc.
#if defined(FASTDIFF_WITH_CUDA)

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "bind_solver.h"
#include "cuda/graph.h"
#include "cuda/solver_step.h"

namespace py = pybind11;
using namespace fastdiff;

namespace {

void check(int code) {
  if (code != 0) throw std::runtime_error(std::string("CUDA: ") + cuda_error_text(code));
}

}  // namespace

void bind_solver_cuda(py::module_& module) {
  module.def(
      "cuda_solver_step",
      [](const PackedTable& table, int row, const std::vector<uintptr_t>& registers,
         int state_dtype, uintptr_t output, uintptr_t uncond, int output_dtype, uintptr_t input,
         int input_dtype, int copies, uintptr_t noise, uintptr_t seeds, int64_t images,
         int64_t per_image, uintptr_t stream, int64_t channels) {
        StepTask task = make_task(table, registers, state_dtype, output_dtype, input, input_dtype,
                                  copies, {}, images, per_image, channels);
        require(row >= 0 && row < table.rows, "row must be in 0..rows-1, got " + std::to_string(row));
        table.fill(task, row);
        require(output != 0 || images * per_image == 0, "output must not be null");
        task.output = reinterpret_cast<const void*>(output);
        task.uncond = reinterpret_cast<const void*>(uncond);
        task.noise = reinterpret_cast<const void*>(noise);
        task.seeds = reinterpret_cast<const uint64_t*>(seeds);
        require(!row_uses_noise(task) || task.noise || task.seeds,
                "noise or seeds must be given for a row that uses noise");
        check(cuda_solver_step(task, reinterpret_cast<void*>(stream)));
      },
      py::arg("table"), py::arg("row"), py::arg("registers"), py::arg("state_dtype"),
      py::arg("output"), py::arg("uncond"), py::arg("output_dtype"), py::arg("input"),
      py::arg("input_dtype"), py::arg("copies"), py::arg("noise"), py::arg("seeds"),
      py::arg("images"), py::arg("per_image"), py::arg("stream"),
      py::arg("channels") = 1,
      "One row on the GPU; seeds is a device pointer to uint64[images] or 0. Does not synchronise.");

  module.def(
      "cuda_device_rows",
      [](const PackedTable& table, bool with_input) {
        std::string bytes(size_t(table.rows) * sizeof(DeviceRow), '\0');
        StepTask task{};
        task.num_registers = table.num_registers;
        task.input = with_input ? &task : nullptr;  // only whether there is one matters here
        for (int i = 0; i < table.rows; ++i) {
          table.fill(task, i);
          const DeviceRow row = make_device_row(task);
          std::memcpy(bytes.data() + size_t(i) * sizeof row, &row, sizeof row);
        }
        return py::bytes(bytes);
      },
      py::arg("table"), py::arg("with_input"),
      "The table as the bytes cuda_solver_step_indexed reads; copy them to the GPU once.");

  module.def(
      "cuda_solver_step_indexed",
      [](const PackedTable& table, uintptr_t rows, uintptr_t counter,
         const std::vector<uintptr_t>& registers, int state_dtype, uintptr_t output,
         uintptr_t uncond, int output_dtype, uintptr_t input, int input_dtype, int copies,
         uintptr_t noise, uintptr_t seeds, int64_t images, int64_t per_image, uintptr_t stream,
         int64_t channels) {
        StepTask task = make_task(table, registers, state_dtype, output_dtype, input, input_dtype,
                                  copies, {}, images, per_image, channels);
        require(rows != 0 && counter != 0, "rows and counter must not be null");
        require(output != 0 || images * per_image == 0, "output must not be null");
        task.output = reinterpret_cast<const void*>(output);
        task.uncond = reinterpret_cast<const void*>(uncond);
        task.noise = reinterpret_cast<const void*>(noise);
        task.seeds = reinterpret_cast<const uint64_t*>(seeds);
        for (int i = 0; i < table.rows; ++i) {
          table.fill(task, i);
          require(!row_uses_noise(task) || task.noise || task.seeds,
                  "noise or seeds must be given for a table that uses noise");
        }
        check(cuda_solver_step_indexed(task, reinterpret_cast<const DeviceRow*>(rows), table.rows,
                                       reinterpret_cast<DeviceStep*>(counter),
                                       reinterpret_cast<void*>(stream)));
      },
      py::arg("table"), py::arg("rows"), py::arg("counter"), py::arg("registers"),
      py::arg("state_dtype"), py::arg("output"), py::arg("uncond"), py::arg("output_dtype"),
      py::arg("input"), py::arg("input_dtype"), py::arg("copies"), py::arg("noise"),
      py::arg("seeds"), py::arg("images"), py::arg("per_image"), py::arg("stream"),
      py::arg("channels") = 1,
      "The row counter[0] (int32 on the GPU) of the table; advances counter[0]. counter: int32[2], zeroed.");

  module.def(
      "cuda_philox_normal",
      [](uintptr_t out, int64_t images, int64_t per_image, uintptr_t seeds, uint32_t draw,
         uintptr_t stream) {
        check(cuda_philox_normal(reinterpret_cast<float*>(out), images, per_image,
                                 reinterpret_cast<const uint64_t*>(seeds), draw,
                                 reinterpret_cast<void*>(stream)));
      },
      py::arg("out"), py::arg("images"), py::arg("per_image"), py::arg("seeds"), py::arg("draw"),
      py::arg("stream"));

  module.def(
      "cuda_launch_graph",
      [](uintptr_t exec, uintptr_t stream, int times) {
        require(exec != 0, "exec must not be null");
        require(times >= 0, "times must be at least 0, got " + std::to_string(times));
        int code;
        {
          py::gil_scoped_release released;
          code = cuda_launch_graph(reinterpret_cast<void*>(exec), reinterpret_cast<void*>(stream), times);
        }
        check(code);
      },
      py::arg("exec"), py::arg("stream"), py::arg("times"),
      "Launches an instantiated graph (cudaGraphExec_t) so many times in a row, without Python.\n"
      "Does not synchronise; the caller keeps the graph and its memory until they have run.");
}

#endif  // FASTDIFF_WITH_CUDA
