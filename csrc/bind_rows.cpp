// Python binding of the row-wise ops: a tensor of rows is (pointer, three strides in elements), 0
// for an absent one. fastdiff/ops/_rows.py has checked the arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "rows.h"

namespace py = pybind11;

namespace {

using fastdiff::DType;
using Packed = std::array<int64_t, 1 + fastdiff::kRowDims>;

fastdiff::RowTensor tensor_of(const Packed& packed) {
  fastdiff::RowTensor tensor;
  tensor.data = reinterpret_cast<const void*>(uintptr_t(packed[0]));
  for (int i = 0; i < fastdiff::kRowDims; ++i) tensor.stride[i] = packed[size_t(1 + i)];
  return tensor;
}

DType float_dtype(int code, const char* name) {
  if (code < 0 || code > 2)
    throw py::value_error(std::string(name) + " must be 0 (fp32), 1 (fp16) or 2 (bf16), got " +
                          std::to_string(code));
  return DType(code);
}

void rows(int norm, const Packed& x, const Packed& y, const Packed& gate, const Packed& scale,
          const Packed& shift, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out,
          const std::array<int64_t, fastdiff::kRowDims>& sizes, int64_t width, double eps,
          int x_dtype, int param_dtype, int mod_dtype, int threads) {
  if (norm < 0 || norm > 2)
    throw py::value_error("norm must be 0 (none), 1 (layer) or 2 (rms), got " +
                          std::to_string(norm));
  if (width < 1 || width > fastdiff::kMaxRowWidth)
    throw py::value_error("width must be in 1.." + std::to_string(fastdiff::kMaxRowWidth) +
                          ", got " + std::to_string(width));
  fastdiff::Rows args;
  args.norm = fastdiff::Norm(norm);
  args.x = tensor_of(x);
  args.y = tensor_of(y);
  args.gate = tensor_of(gate);
  args.scale = tensor_of(scale);
  args.shift = tensor_of(shift);
  args.weight = reinterpret_cast<const void*>(weight);
  args.bias = reinterpret_cast<const void*>(bias);
  args.residual = reinterpret_cast<void*>(residual);
  args.out = reinterpret_cast<void*>(out);
  for (int i = 0; i < fastdiff::kRowDims; ++i) args.size[i] = sizes[size_t(i)];
  args.width = width;
  args.eps = eps;
  args.x_dtype = float_dtype(x_dtype, "x_dtype");
  args.param_dtype = float_dtype(param_dtype, "param_dtype");
  args.mod_dtype = float_dtype(mod_dtype, "mod_dtype");
  args.threads = threads < 1 ? 1 : threads;
  py::gil_scoped_release release;
  FASTDIFF_DISPATCH(rows)(args);
}

}  // namespace

void bind_rows(py::module_& module) {
  module.def("rows", &rows, py::arg("norm"), py::arg("x"), py::arg("y"), py::arg("gate"),
             py::arg("scale"), py::arg("shift"), py::arg("weight"), py::arg("bias"),
             py::arg("residual"), py::arg("out"), py::arg("sizes"), py::arg("width"),
             py::arg("eps"), py::arg("x_dtype"), py::arg("param_dtype"), py::arg("mod_dtype"),
             py::arg("threads"),
             "residual = x + gate * y; out = norm(residual) with affine and modulation; on raw "
             "pointers.");
}
