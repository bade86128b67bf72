// Python binding of geglu and swiglu: pointers as integers, strides in elements.
// fastdiff/ops/_gated.py has checked the arguments.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "gated.h"

namespace py = pybind11;

namespace {

void gated(uintptr_t x, uintptr_t out, int64_t outer, int64_t inner, int64_t outer_stride,
           int64_t inner_stride, int64_t width, bool gate_first, int activation, int dtype,
           int threads) {
  if (activation < 0 || activation > 2)
    throw py::value_error("activation must be 0 (gelu), 1 (gelu_tanh) or 2 (silu), got " +
                          std::to_string(activation));
  if (dtype < 0 || dtype > 2)
    throw py::value_error("dtype must be 0 (fp32), 1 (fp16) or 2 (bf16), got " +
                          std::to_string(dtype));
  if (outer <= 0 || inner <= 0 || width <= 0) return;
  fastdiff::Gated args;
  args.x = reinterpret_cast<const void*>(x);
  args.out = reinterpret_cast<void*>(out);
  args.outer = outer;
  args.inner = inner;
  args.outer_stride = outer_stride;
  args.inner_stride = inner_stride;
  args.width = width;
  args.gate_first = gate_first;
  args.activation = fastdiff::Activation(activation);
  args.dtype = fastdiff::DType(dtype);
  args.threads = threads;
  py::gil_scoped_release release;
  FASTDIFF_DISPATCH(gated)(args);
}

}  // namespace

void bind_gated(py::module_& module) {
  module.def("gated", &gated, py::arg("x"), py::arg("out"), py::arg("outer"), py::arg("inner"),
             py::arg("outer_stride"), py::arg("inner_stride"), py::arg("width"),
             py::arg("gate_first"), py::arg("activation"), py::arg("dtype"), py::arg("threads"),
             "out = hidden * act(gate) on raw pointers.");
}
