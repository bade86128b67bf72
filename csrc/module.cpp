// The Python module fastdiff._C: each area binds its own functions.
#include <pybind11/pybind11.h>

#include <string>

#include "digest.h"
#include "dispatch.h"
#include "parallel.h"

namespace py = pybind11;

void bind_attention(py::module_& module);
void bind_gated(py::module_& module);
void bind_group_norm_silu(py::module_& module);
void bind_rows(py::module_& module);
void bind_solver(py::module_& module);

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastdiff's C++/CUDA kernels; raw pointers in, nothing of PyTorch linked.";
  module.def("isa_level", &fastdiff::isa_level);
  module.def("isa_name", [] { return fastdiff::isa_name(fastdiff::isa_level()); });
  module.def("parallel_backend", &fastdiff::parallel_backend);
  module.def(
      "digest",
      [](uintptr_t data, int64_t bytes, int threads) {
        if (bytes < 0) throw py::value_error("bytes must not be negative, got " + std::to_string(bytes));
        if (data == 0 && bytes > 0) throw py::value_error("data must not be null");
        py::gil_scoped_release release;
        return fastdiff::digest(reinterpret_cast<const void*>(data), bytes, threads);
      },
      py::arg("data"), py::arg("bytes"), py::arg("threads"));
#if defined(FASTDIFF_WITH_CUDA)
  module.attr("with_cuda") = true;
#else
  module.attr("with_cuda") = false;
#endif
  bind_attention(module);
  bind_gated(module);
  bind_group_norm_silu(module);
  bind_rows(module);
  bind_solver(module);
}
