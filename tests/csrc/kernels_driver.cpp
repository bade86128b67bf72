// Every CPU kernel of one instruction set on small shapes, as a program for valgrind: tensors lie on
// heaps that end where they do, results begin undefined, and every byte of them is looked at. Built
// by test_valgrind.py with -DFASTDIFF_ISA and the flags of that set; values are judged elsewhere.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/attention.h"
#include "../../csrc/digest.h"
#include "../../csrc/gated.h"
#include "../../csrc/group_norm_silu.h"
#include "../../csrc/rows.h"
#include "../../csrc/solver_step.h"

using namespace fastdiff;

static int cases = 0, wrong = 0;
static uint32_t state = 1;

static float draw() {  // in (-2, 2)
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / float(1 << 22) - 2.0f;
}

static double read_as(const void* data, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::f16: return to_float(static_cast<const f16_t*>(data)[i]);
    case DType::bf16: return to_float(static_cast<const bf16_t*>(data)[i]);
    case DType::f64: return static_cast<const double*>(data)[i];
    default: return static_cast<const float*>(data)[i];
  }
}

static void write_as(void* data, int64_t i, DType dtype, float value) {
  switch (dtype) {
    case DType::f16: static_cast<f16_t*>(data)[i] = to_f16(value); break;
    case DType::bf16: static_cast<bf16_t*>(data)[i] = to_bf16(value); break;
    case DType::f64: static_cast<double*>(data)[i] = value; break;
    default: static_cast<float*>(data)[i] = value;
  }
}

// What one case works on; freed with it.
class Heap {
 public:
  // Undefined, and expected to be written.
  void* result(int64_t count, DType dtype) {
    void* data = take(count, dtype);
    results_.push_back({data, count, dtype});
    return data;
  }
  void* random(int64_t count, DType dtype) {
    void* data = take(count, dtype);
    for (int64_t i = 0; i < count; ++i) write_as(data, i, dtype, draw());
    return data;
  }
  // A branch on undefined memory is what valgrind reports.
  void check(const char* what) {
    ++cases;
    for (const Result& result : results_)
      for (int64_t i = 0; i < result.count; ++i)
        if (!std::isfinite(read_as(result.data, i, result.dtype))) {
          std::printf("%s: element %lld is not finite\n", what, static_cast<long long>(i));
          ++wrong;
          return;
        }
  }

 private:
  struct Result {
    void* data;
    int64_t count;
    DType dtype;
  };
  void* take(int64_t count, DType dtype) {
    blocks_.emplace_back(std::malloc(size_t(count * dtype_size(dtype))), &std::free);
    return blocks_.back().get();
  }
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
  std::vector<Result> results_;
};

static const DType kHalves[] = {DType::f32, DType::f16, DType::bf16};

static void group_norms(DType dtype, DType params, int threads) {
  for (const bool last : {false, true})
    for (const int64_t hw : {1, 5, 17, 67})
      for (const int kind : {0, 1, 2, 3, 4}) {
        Heap heap;
        Workspace workspace;
        GroupNormSilu args;
        args.batch = 2, args.channels = 36, args.groups = 3, args.hw = hw;
        const int64_t whole = args.batch * args.channels * hw;
        args.skip_channels = kind == 1 ? 7 : 0;  // its border lies within a group
        const int64_t skipped = args.batch * args.skip_channels * hw;
        args.x = heap.random(whole - skipped, dtype);
        args.out = heap.result(whole, dtype);
        if (kind == 1) args.skip = heap.random(skipped, dtype);
        if (kind == 2) {
          args.residual = heap.random(whole, dtype);
          args.total = heap.result(whole, dtype);
        }
        const auto vector = [&](int64_t count, int64_t stride, DType of) {
          ChannelVector found;
          found.data = heap.random(count, of);
          found.stride = stride;
          return found;
        };
        const auto rows = [&] {
          return vector(args.batch * args.channels, args.channels, params);
        };
        if (kind) args.weight = vector(args.channels, 0, params);
        if (kind) args.bias = vector(args.channels, 0, params);
        if (kind == 3) args.add = rows();
        if (kind == 4) args.scale = rows(), args.shift = rows();
        args.eps = 1e-5, args.silu = kind % 2 == 1, args.channels_last = last;
        args.x_dtype = dtype, args.param_dtype = args.mod_dtype = params;
        args.threads = threads, args.workspace = &workspace;
        FASTDIFF_ISA::group_norm_silu(args);
        heap.check("group_norm_silu");
      }
}

static void all_rows(DType dtype, DType params, int threads) {
  for (const Norm norm : {Norm::none, Norm::layer, Norm::rms})
    for (const int64_t width : {1, 7, 8, 33, 130})
      for (const bool gated : {false, true}) {
        if (norm == Norm::none && !gated) continue;
        Heap heap;
        Rows args;
        args.norm = norm;
        args.size[0] = 1, args.size[1] = 2, args.size[2] = 5;
        args.width = width;
        const auto tokens = [&](RowTensor& tensor) {
          tensor.data = heap.random(10 * width, dtype);
          tensor.stride[1] = 5 * width, tensor.stride[2] = width;
        };
        const auto modulation = [&](RowTensor& tensor) {
          tensor.data = heap.random(2 * width, params);
          tensor.stride[1] = width;
        };
        tokens(args.x);
        args.residual = nullptr;
        if (gated) {
          tokens(args.y);
          modulation(args.gate);
          args.residual = heap.result(10 * width, dtype);
        }
        const bool normed = norm != Norm::none;
        if (normed) modulation(args.scale), modulation(args.shift);
        args.weight = normed ? heap.random(width, params) : nullptr;
        args.bias = norm == Norm::layer ? heap.random(width, params) : nullptr;
        args.out = normed ? heap.result(10 * width, dtype) : nullptr;
        args.eps = 1e-6;
        args.x_dtype = dtype, args.param_dtype = args.mod_dtype = params;
        args.threads = threads;
        FASTDIFF_ISA::rows(args);
        heap.check("rows");
      }
}

static void all_gated(DType dtype, int threads) {
  for (const int activation : {0, 1, 2})
    for (const int64_t width : {1, 7, 16, 33})
      for (const bool first : {false, true}) {
        Heap heap;
        Gated args;
        args.outer = 2, args.inner = 3, args.width = width;
        args.inner_stride = 2 * width, args.outer_stride = 6 * width;
        args.x = heap.random(12 * width, dtype);
        args.out = heap.result(6 * width, dtype);
        args.gate_first = first, args.activation = Activation(activation);
        args.dtype = dtype, args.threads = threads;
        FASTDIFF_ISA::gated(args);
        heap.check("gated");
      }
}

static void attentions(DType dtype, int threads) {
  for (const int64_t width : {1, 8, 33, 40, 72})
    for (const int64_t keys : {1, 67, 130})
      for (const int kind : {0, 1, 2}) {  // plain; masked; two segments, with lse
        Heap heap;
        Workspace workspace;
        Attention args;
        const int64_t heads = 2, queries = 17, extra = kind == 2 ? 5 : 0;
        const auto rows = [&](void* data, int64_t tokens) {
          return HeadRows{data, tokens * heads * width, heads * width, width};
        };
        const auto segment = [&](AttentionSegment& to, int64_t q, int64_t k) {
          to.queries = q, to.keys = k;
          to.q = rows(heap.random(q * heads * width, dtype), q);
          to.k = rows(heap.random(k * heads * width, dtype), k);
          to.v = rows(heap.random(k * heads * width, dtype), k);
          to.out = rows(heap.result(q * heads * width, dtype), q);
        };
        segment(args.segments[0], queries, keys);
        if (extra) segment(args.segments[1], extra, extra);
        std::vector<uint8_t> valid(size_t(keys), 0);
        for (size_t i = 0; i < valid.size(); ++i) valid[i] = i % 3 == 0;
        if (kind == 1) args.valid = valid.data();
        if (kind == 2)
          args.lse = static_cast<float*>(heap.result(heads * (queries + extra), DType::f32));
        args.batch = 1, args.heads = heads, args.width = width;
        args.scale = 1 / std::sqrt(double(width)), args.dtype = dtype;
        args.threads = threads, args.workspace = &workspace;
        FASTDIFF_ISA::attention_kernel(args);
        heap.check("attention");
      }
}

static void solver_steps(DType held, DType output, int threads) {
  for (const int64_t channels : {1, 3})
    for (const int64_t spatial : {1, 37, 700})
      for (const int kind : {0, 1, 2}) {  // plain; guided, next input twice; noise that was drawn
        Heap heap;
        StepTask task{};
        const int64_t images = 2, per_image = channels * spatial, all = images * per_image;
        task.num_registers = 3;
        for (int r = 0; r < 3; ++r) task.registers[r] = heap.random(all, held);
        task.state = held;
        task.output = heap.random(all, output);
        if (kind == 1) task.uncond = heap.random(all, output);
        task.output_dtype = task.input_dtype = output;
        task.copies = kind == 1 ? 2 : 1;
        task.input = heap.result(task.copies * all, output);
        const uint64_t seeds[] = {7, 1ull << 40};
        if (kind == 2) task.noise = heap.random(all, held);
        task.seeds = seeds, task.draw = 3;
        task.images = images, task.per_image = per_image, task.channels = channels;
        task.feed = 0, task.next_feed = 1, task.num_updates = 2;
        task.dest[0] = 1, task.dest[1] = 0;
        const double coef[] = {0.5, 1.0,  -0.5, 2.0,                // next input, prediction
                               0.5, 0.25, 0.0,  1.0, kind ? 0.5 : 0.0,  // register 1
                               1.0, 0.0,  0.5,  0.0, 0.25};         // register 0
        task.coef = coef;
        FASTDIFF_ISA::solver_step(task, threads);
        heap.check("solver_step");
        auto* normals = static_cast<float*>(heap.result(all, DType::f32));
        FASTDIFF_ISA::philox_normal(normals, images, per_image, seeds, 1, threads);
        heap.check("philox_normal");
      }
}

static void digests() {
  for (const int64_t bytes : {1, 7, 8, 63, 64, 65, 1000, (2 << 18) + 3}) {
    Heap heap;
    auto* data = static_cast<unsigned char*>(heap.random((bytes + 3) / 4, DType::f32));
    data += (4 - bytes % 4) % 4;  // ends where the heap does
    const uint64_t one = digest(data, bytes, 1), three = digest(data, bytes, 3);
    data[bytes - 1] ^= 1;
    const bool fine = one == three && digest(data, bytes, 1) != one;
    if (!fine) std::printf("digest of %lld bytes\n", static_cast<long long>(bytes));
    wrong += !fine;
    ++cases;
  }
}

int main() {
  for (const int threads : {1, 3}) {
    for (const DType dtype : kHalves) {
      group_norms(dtype, dtype, threads);
      all_rows(dtype, dtype, threads);
      all_gated(dtype, threads);
      attentions(dtype, threads);
    }
    group_norms(DType::bf16, DType::f32, threads);
    all_rows(DType::bf16, DType::f32, threads);
    for (const DType output : kHalves) solver_steps(DType::f32, output, threads);
    solver_steps(DType::f64, DType::f32, threads);
  }
  digests();
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong ? 1 : 0;
}
