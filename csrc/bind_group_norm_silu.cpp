// Python binding of group_norm_silu: pointers as integers (0 for an absent argument), strides in
// elements of the batch dimension. fastdiff/ops/group_norm_silu.py has checked the arguments.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "group_norm_silu.h"

namespace py = pybind11;

namespace {

using fastdiff::ChannelVector;
using fastdiff::DType;

ChannelVector vector_of(uintptr_t pointer, int64_t stride) {
  ChannelVector vector;
  vector.data = reinterpret_cast<const void*>(pointer);
  vector.stride = stride;
  return vector;
}

DType float_dtype(int code, const char* name) {
  if (code < 0 || code > 2)
    throw py::value_error(std::string(name) + " must be 0 (fp32), 1 (fp16) or 2 (bf16), got " +
                          std::to_string(code));
  return DType(code);
}

void group_norm_silu(uintptr_t x, uintptr_t add, int64_t add_stride, uintptr_t weight,
                     uintptr_t bias, uintptr_t scale, int64_t scale_stride, uintptr_t shift,
                     int64_t shift_stride, uintptr_t out, int64_t batch, int64_t channels,
                     int64_t hw, int64_t groups, double eps, int act, bool channels_last,
                     int x_dtype, int param_dtype, int mod_dtype, int threads, uintptr_t skip,
                     int64_t skip_channels, uintptr_t residual, uintptr_t total) {
  if (groups <= 0 || channels % groups != 0)
    throw py::value_error("groups must divide " + std::to_string(channels) + " channels, got " +
                          std::to_string(groups));
  if (act != 0 && act != 1)
    throw py::value_error("act must be 0 (none) or 1 (silu), got " + std::to_string(act));
  if (skip_channels < 0 || skip_channels >= channels || (skip != 0) != (skip_channels != 0))
    throw py::value_error("skip_channels must be in 1.." + std::to_string(channels - 1) +
                          " with a skip and 0 without, got " + std::to_string(skip_channels));
  if ((residual != 0) != (total != 0) || (residual && skip))
    throw py::value_error("residual and total must come together, and without a skip");
  fastdiff::GroupNormSilu args;
  args.x = reinterpret_cast<const void*>(x);
  args.out = reinterpret_cast<void*>(out);
  args.add = vector_of(add, add_stride);
  args.weight = vector_of(weight, 0);
  args.bias = vector_of(bias, 0);
  args.scale = vector_of(scale, scale_stride);
  args.shift = vector_of(shift, shift_stride);
  args.batch = batch;
  args.channels = channels;
  args.hw = hw;
  args.groups = groups;
  args.eps = eps;
  args.silu = act == 1;
  args.channels_last = channels_last;
  args.x_dtype = float_dtype(x_dtype, "x_dtype");
  args.param_dtype = float_dtype(param_dtype, "param_dtype");
  args.mod_dtype = float_dtype(mod_dtype, "mod_dtype");
  args.threads = threads;
  args.skip = reinterpret_cast<const void*>(skip);
  args.skip_channels = skip_channels;
  args.residual = reinterpret_cast<const void*>(residual);
  args.total = reinterpret_cast<void*>(total);
  fastdiff::Workspace workspace;
  args.workspace = &workspace;
  if (batch <= 0 || channels <= 0 || hw <= 0) return;
  py::gil_scoped_release release;
  FASTDIFF_DISPATCH(group_norm_silu)(args);
}

}  // namespace

void bind_group_norm_silu(py::module_& module) {
  module.def(
      "group_norm_silu", &group_norm_silu, py::arg("x"), py::arg("add"), py::arg("add_stride"),
      py::arg("weight"), py::arg("bias"), py::arg("scale"), py::arg("scale_stride"),
      py::arg("shift"), py::arg("shift_stride"), py::arg("out"), py::arg("batch"),
      py::arg("channels"), py::arg("hw"), py::arg("groups"), py::arg("eps"), py::arg("act"),
      py::arg("channels_last"), py::arg("x_dtype"), py::arg("param_dtype"), py::arg("mod_dtype"),
      py::arg("threads"), py::arg("skip") = 0, py::arg("skip_channels") = 0,
      py::arg("residual") = 0, py::arg("total") = 0,
      "y = act((GroupNorm(x + add) * weight + bias) * (1 + scale) + shift) on raw pointers.");
}
