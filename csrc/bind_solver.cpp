// Python bindings of the solver step, the noise stream and the sampling loop. Pointers are integers
// (tensor.data_ptr()); the Python callers check shapes and dtypes, these check what memory safety needs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bind_solver.h"
#include "philox.h"

namespace py = pybind11;
using namespace fastdiff;

void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

namespace {

DType dtype_of(int code, const char* argument) {
  if (code < 0 || code > 3)
    throw py::value_error(std::string(argument) + " must be a dtype code in 0..3, got " +
                          std::to_string(code));
  return DType(code);
}

DType state_of(int code) {
  const DType dtype = dtype_of(code, "state_dtype");
  if (dtype != DType::f32 && dtype != DType::f64)
    throw py::value_error("state_dtype must be float32 or float64, got code " + std::to_string(code));
  return dtype;
}

// Copies and checks the arrays of a PackedTable, so that no index of it can leave the registers.
PackedTable make_table(const py::buffer& index, const py::buffer& coef, int num_registers,
                       int max_updates) {
  require(num_registers >= 1 && num_registers <= kMaxRegisters,
          "num_registers must be in 1..8, got " + std::to_string(num_registers));
  require(max_updates >= 1 && max_updates <= kMaxUpdates,
          "max_updates must be in 1..4, got " + std::to_string(max_updates));
  PackedTable table;
  table.num_registers = num_registers;
  table.max_updates = max_updates;
  const py::buffer_info rows = index.request(), numbers = coef.request();
  require(rows.ndim == 2 && rows.shape[1] == table.index_width() && rows.itemsize == 4 &&
              rows.strides[1] == 4 && rows.strides[0] == 4 * rows.shape[1],
          "index must be a contiguous int32 array [rows, 4 + max_updates]");
  require(numbers.ndim == 2 && numbers.shape[0] == rows.shape[0] &&
              numbers.shape[1] == table.coef_width() && numbers.itemsize == 8 &&
              numbers.strides[1] == 8 && numbers.strides[0] == 8 * numbers.shape[1],
          "coef must be a contiguous float64 array [rows, 4 + max_updates*(num_registers + 2)]");
  table.rows = int(rows.shape[0]);
  const auto* first = static_cast<const int32_t*>(rows.ptr);
  const auto* number = static_cast<const double*>(numbers.ptr);
  table.index.assign(first, first + rows.size);
  table.coef.assign(number, number + numbers.size);
  for (int i = 0; i < table.rows; ++i) {
    const int32_t* row = table.index.data() + size_t(i) * table.index_width();
    const std::string where = "index row " + std::to_string(i);
    require(row[0] >= 0 && row[0] < num_registers, where + ": feed must be a register");
    require(row[2] >= 1 && row[2] <= max_updates, where + ": updates must be in 1..max_updates");
    require(row[3] >= -1 && row[3] < num_registers, where + ": next_feed must be a register or -1");
    for (int u = 0; u < row[2]; ++u)
      require(row[4 + u] >= 0 && row[4 + u] < num_registers, where + ": dest must be a register");
  }
  return table;
}

}  // namespace

StepTask make_task(const PackedTable& table, const std::vector<uintptr_t>& registers,
                   int state_dtype, int output_dtype, uintptr_t input, int input_dtype, int copies,
                   const std::vector<uint64_t>& seeds, int64_t images, int64_t per_image,
                   int64_t channels) {
  require(int(registers.size()) == table.num_registers,
          "registers must hold " + std::to_string(table.num_registers) + " pointers, got " +
              std::to_string(registers.size()));
  require(images >= 0 && per_image >= 0, "images and per_image must not be negative");
  require(channels >= 1 && per_image % channels == 0,
          "channels must divide per_image, got " + std::to_string(channels));
  require(copies == 1 || copies == 2, "copies must be 1 or 2, got " + std::to_string(copies));
  require(seeds.empty() || int64_t(seeds.size()) == images,
          "seeds must be empty or one per image (" + std::to_string(images) + "), got " +
              std::to_string(seeds.size()));
  StepTask task{};
  task.num_registers = table.num_registers;
  for (size_t r = 0; r < registers.size(); ++r) {
    require(registers[r] != 0 || images * per_image == 0,
            "registers[" + std::to_string(r) + "] must not be null");
    task.registers[r] = reinterpret_cast<void*>(registers[r]);
  }
  task.state = state_of(state_dtype);
  task.output_dtype = dtype_of(output_dtype, "output_dtype");
  task.input = reinterpret_cast<void*>(input);
  task.input_dtype = dtype_of(input_dtype, "input_dtype");
  task.copies = copies;
  task.seeds = seeds.empty() ? nullptr : seeds.data();
  task.images = images;
  task.per_image = per_image;
  task.channels = channels;
  return task;
}

bool row_uses_noise(const StepTask& task) {
  const int width = task.num_registers + 2;
  for (int u = 0; u < task.num_updates; ++u)
    if (task.coef[4 + u * width + width - 1] != 0.0) return true;
  return false;
}

void bind_solver(py::module_& module) {
  py::class_<PackedTable>(module, "PackedTable")
      .def(py::init(&make_table), py::arg("index"), py::arg("coef"), py::arg("num_registers"),
           py::arg("max_updates"))
      .def_readonly("rows", &PackedTable::rows);

  module.def(
      "sampling_loop",
      [](const PackedTable& table, py::object evaluate, py::list inputs, py::object like,
         py::object accept, py::object draw, py::object on_step,
         const std::vector<uintptr_t>& registers, int state_dtype, int output_dtype,
         uintptr_t input, int input_dtype, int copies, const std::vector<uint64_t>& seeds,
         int64_t images, int64_t per_image, int threads, int64_t channels,
         std::optional<uintptr_t> stream, uintptr_t device_seeds, int first) {
        require(first >= 0 && first < table.rows, "first must be a row, got " + std::to_string(first));
        StepTask task = make_task(table, registers, state_dtype, output_dtype, input, input_dtype,
                                  copies, seeds, images, per_image, channels);
        if (stream) task.seeds = reinterpret_cast<const uint64_t*>(device_seeds);
        require(int(inputs.size()) == table.rows, "inputs must hold one tensor per row");
        for (int i = 0; i < table.rows; ++i) {
          table.fill(task, i);
          require(!row_uses_noise(task) || task.seeds || !draw.is_none(),
                  "draw or seeds must be given for a table that uses noise");
        }
        return run_loop(table, task,
                        {std::move(evaluate), std::move(inputs), std::move(like), std::move(accept),
                         std::move(draw), std::move(on_step), stream.has_value(),
                         reinterpret_cast<void*>(stream.value_or(0))},
                        threads, first);
      },
      py::arg("table"), py::arg("evaluate"), py::arg("inputs"), py::arg("like"), py::arg("accept"),
      py::arg("draw"), py::arg("on_step"), py::arg("registers"), py::arg("state_dtype"),
      py::arg("output_dtype"), py::arg("input"), py::arg("input_dtype"), py::arg("copies"),
      py::arg("seeds"), py::arg("images"), py::arg("per_image"), py::arg("threads"),
      py::arg("channels") = 1, py::arg("stream") = py::none(), py::arg("device_seeds") = 0,
      py::arg("first") = 0,
      "Runs the table from row `first`; returns the row after the last one run. channels: 1, or C for channels-last memory (drawn noise "
      "is numbered in contiguous order). stream: a CUDA stream for tensors on the current GPU (no "
      "synchronisation; the seeds are then uint64[images] on the GPU at device_seeds), None on the "
      "CPU.");

  module.def(
      "solver_step",
      [](const PackedTable& table, int row, const std::vector<uintptr_t>& registers,
         int state_dtype, uintptr_t output, uintptr_t uncond, int output_dtype, uintptr_t input,
         int input_dtype, int copies, uintptr_t noise, const std::vector<uint64_t>& seeds,
         int64_t images, int64_t per_image, int threads, int64_t channels) {
        require(row >= 0 && row < table.rows, "row must be in 0..rows-1, got " + std::to_string(row));
        StepTask task = make_task(table, registers, state_dtype, output_dtype, input, input_dtype,
                                  copies, seeds, images, per_image, channels);
        table.fill(task, row);
        require(output != 0 || images * per_image == 0, "output must not be null");
        task.output = reinterpret_cast<const void*>(output);
        task.uncond = reinterpret_cast<const void*>(uncond);
        task.noise = reinterpret_cast<const void*>(noise);
        require(!row_uses_noise(task) || task.noise || task.seeds,
                "noise or seeds must be given for a row that uses noise");
        py::gil_scoped_release released;
        FASTDIFF_DISPATCH(solver_step)(task, threads);
      },
      py::arg("table"), py::arg("row"), py::arg("registers"), py::arg("state_dtype"),
      py::arg("output"), py::arg("uncond"), py::arg("output_dtype"), py::arg("input"),
      py::arg("input_dtype"), py::arg("copies"), py::arg("noise"), py::arg("seeds"),
      py::arg("images"), py::arg("per_image"), py::arg("threads"), py::arg("channels") = 1,
      "One row on the CPU, in place on the registers and the input.");

  module.def(
      "philox_normal",
      [](uintptr_t out, int64_t images, int64_t per_image, const std::vector<uint64_t>& seeds,
         uint32_t draw, int threads) {
        require(int64_t(seeds.size()) == images, "seeds must hold one number per image");
        py::gil_scoped_release released;
        FASTDIFF_DISPATCH(philox_normal)
        (reinterpret_cast<float*>(out), images, per_image, seeds.data(), draw, threads);
      },
      py::arg("out"), py::arg("images"), py::arg("per_image"), py::arg("seeds"), py::arg("draw"),
      py::arg("threads"),
      "Fills out[images, per_image] (float32) with the normals of (seed, draw, element).");

  module.def(
      "philox4x32",
      [](std::vector<uint32_t> c, std::vector<uint32_t> k) {
        require(c.size() == 4 && k.size() == 2, "counter must hold 4 words and key 2");
        const Words w = philox4x32(c[0], c[1], c[2], c[3], k[0], k[1]);
        return std::vector<uint32_t>(w.v, w.v + 4);
      },
      py::arg("counter"), py::arg("key"), "Philox4x32-10: four words for a counter and a key.");

#if defined(FASTDIFF_WITH_CUDA)
  bind_solver_cuda(module);
#endif
}
