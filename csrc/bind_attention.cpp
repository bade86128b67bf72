// Python binding of attention: pointers as integers (0 for an absent tensor), strides in elements.
// fastdiff/ops/attention.py has checked the arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <stdexcept>
#include <string>

#include "attention.h"

namespace py = pybind11;

namespace {

// [pointer, stride of images, of tokens, of heads].
using Rows = std::array<int64_t, 4>;

fastdiff::HeadRows rows_of(const Rows& rows) {
  return {reinterpret_cast<void*>(rows[0]), rows[1], rows[2], rows[3]};
}

void attention(const std::array<Rows, 8>& tensors, int64_t queries, int64_t keys,
               int64_t extra_queries, int64_t extra_keys, uintptr_t valid, uintptr_t lse,
               int64_t batch, int64_t heads, int64_t width, double scale, int dtype, int threads) {
  if (dtype < 0 || dtype > 2)
    throw py::value_error("dtype must be 0 (fp32), 1 (fp16) or 2 (bf16), got " +
                          std::to_string(dtype));
  if (width < 1 || width > 1024)
    throw py::value_error("width must be in 1..1024, got " + std::to_string(width));
  if (!(scale > 0) || !std::isfinite(scale))
    throw py::value_error("scale must be positive and finite, got " + std::to_string(scale));
  if (batch < 0 || heads < 0 || queries < 0 || keys < 0 || extra_queries < 0 || extra_keys < 0)
    throw py::value_error("sizes must be 0 or more");
  fastdiff::Attention args;
  const int64_t counts[2][2] = {{queries, keys}, {extra_queries, extra_keys}};
  for (int i = 0; i < 2; ++i) {
    fastdiff::AttentionSegment& segment = args.segments[i];
    segment.q = rows_of(tensors[4 * i]);
    segment.k = rows_of(tensors[4 * i + 1]);
    segment.v = rows_of(tensors[4 * i + 2]);
    segment.out = rows_of(tensors[4 * i + 3]);
    segment.queries = counts[i][0];
    segment.keys = counts[i][1];
    if ((segment.queries && !(segment.q.data && segment.out.data)) ||
        (segment.keys && !(segment.k.data && segment.v.data)))
      if (batch && heads) throw py::value_error("tensors with tokens must have a pointer, got 0");
  }
  args.valid = reinterpret_cast<const uint8_t*>(valid);
  args.lse = reinterpret_cast<float*>(lse);
  args.batch = batch;
  args.heads = heads;
  args.width = width;
  args.scale = scale;
  args.dtype = fastdiff::DType(dtype);
  args.threads = threads;
  fastdiff::Workspace workspace;
  args.workspace = &workspace;
  py::gil_scoped_release release;
  fastdiff::attention(args);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_level", &fastdiff::attention_level,
             "isa_level(), or 3 for AVX512_BF16, or 4 for AMX-BF16.");
  module.def("attention", &attention, py::arg("tensors"), py::arg("queries"), py::arg("keys"),
             py::arg("extra_queries"), py::arg("extra_keys"), py::arg("valid"), py::arg("lse"),
             py::arg("batch"), py::arg("heads"), py::arg("width"), py::arg("scale"),
             py::arg("dtype"), py::arg("threads"),
             "softmax(scale q k^T) v on raw pointers; tensors: q, k, v, out of both segments, each "
             "(pointer, stride of images, of tokens, of heads).");
}
