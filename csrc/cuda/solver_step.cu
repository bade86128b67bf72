// Memory-bound: every tensor of the row is read or written once, four elements a thread (16 bytes of
// float32), one Philox counter a thread. Products and sums are rounded one by one (mul_rn, add_rn), in
// the order of the table, so that the result has the CPU's bits.
#include "solver_step.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../philox.h"

namespace fastdiff {
namespace {

constexpr int kThreads = 256;
// Blocks per multiprocessor asked of ptxas; 0: its own choice, which with eight registers held is one
// block more than fits without spilling. Two leave it 128 registers a thread.
template <int R>
constexpr int kBlocks = R == 8 ? 2 : 0;

template <class T>
struct alignas(sizeof(T) * 4) Four {
  T v[4];
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class M>
__device__ __forceinline__ M narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) { return value; }
template <>
__device__ __forceinline__ __half narrow<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <class M>
__device__ __forceinline__ M narrow(double value) { return M(value); }

// A select the compiler cannot turn back into an indexed load.
__device__ __forceinline__ float select(bool condition, float yes, float no) {
  float out;
  asm("{ .reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p; }"
      : "=f"(out)
      : "f"(yes), "f"(no), "r"(int(condition)));
  return out;
}
__device__ __forceinline__ double select(bool condition, double yes, double no) {
  double out;
  asm("{ .reg .pred p; setp.ne.s32 p, %3, 0; selp.f64 %0, %1, %2, p; }"
      : "=d"(out)
      : "d"(yes), "d"(no), "r"(int(condition)));
  return out;
}

// `vector`: the four elements are whole and aligned. Else `count` of them are there.
template <class T, class S>
__device__ __forceinline__ void read4(T (&out)[4], const S* in, bool vector, int count) {
  if (vector) {
    const Four<S> four = *reinterpret_cast<const Four<S>*>(in);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = widen(four.v[k]);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = k < count ? T(widen(in[k])) : T(0);
  }
}

template <class M, class T>
__device__ __forceinline__ void write4(M* out, const T (&in)[4], bool vector, int count) {
  if (vector) {
    Four<M> four;
#pragma unroll
    for (int k = 0; k < 4; ++k) four.v[k] = narrow<M>(in[k]);
    *reinterpret_cast<Four<M>*>(out) = four;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < count) out[k] = narrow<M>(in[k]);
  }
}

// sum += coef*value, or sum = coef*value for the first term.
template <class T>
__device__ __forceinline__ void add_term(T (&sum)[4], bool& first, double coef, const T (&value)[4]) {
  const T c = T(coef);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const T product = mul_rn(value[k], c);
    sum[k] = first ? product : add_rn(sum[k], product);
  }
  first = false;
}

// out = value[index], as selects: an index known only at run time would put `value` in local memory.
template <class T, int R>
__device__ __forceinline__ void pick(T (&out)[4], const T (&value)[R][4], int index) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    out[k] = value[0][k];
#pragma unroll
    for (int r = 1; r < R; ++r) out[k] = select(index == r, value[r][k], out[k]);
  }
}

__device__ __forceinline__ void normal4(float (&z)[4], uint64_t seed, uint32_t draw, uint64_t group) {
  const Words w = philox4x32(uint32_t(group), draw, uint32_t(group >> 32), 0, uint32_t(seed),
                             uint32_t(seed >> 32));
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const Pair p = box_muller(w.v[2 * pair], w.v[2 * pair + 1]);
    z[2 * pair] = p.first;
    z[2 * pair + 1] = p.second;
  }
}

// The noise of four neighbours in channels-last memory; see StepTask::channels.
__device__ __forceinline__ void normal4_channels_last(float (&z)[4], uint64_t seed, uint32_t draw,
                                                      int64_t offset, int64_t channels,
                                                      int64_t spatial) {
  int64_t pixel = offset / channels, channel = offset - pixel * channels;
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {
    const float normal = normal_at(seed, draw, uint64_t(channel * spatial + pixel));
#pragma unroll
    for (int j = 0; j < 4; ++j) z[j] = select(j == k, normal, z[j]);
    if (++channel == channels) channel = 0, ++pixel;
  }
}

struct Pointers {
  void* registers[kMaxRegisters];
  const void* output;
  const void* uncond;
  void* input;
  const void* noise;
  const uint64_t* seeds;
  int copies;
  int64_t images, per_image, channels;
  bool vector;
};

// T: registers. M: model input and output. R: registers the table has, rounded up to 1, 2, 4 or 8
// (array indices must be compile-time constants to stay out of local memory). LAST: channels-last
// memory, whose noise takes one Philox counter an element and twice the registers of a thread.
template <class T, class M, int R, bool LAST>
__device__ __forceinline__ void step_four(const Pointers& p, const DeviceRow& row, int registers,
                                          int64_t image, int64_t group) {
  const int64_t offset = group * 4;
  const int64_t left = p.per_image - offset;
  const int count = left < 4 ? int(left) : 4;
  const int64_t at = image * p.per_image + offset;
  const int width = registers + 2;

  T value[R][4] = {};
#pragma unroll
  for (int r = 0; r < R; ++r)
    if (row.reads >> r & 1u)
      read4(value[r], static_cast<const T*>(p.registers[r]) + at, p.vector, count);

  T prediction[4] = {T(0), T(0), T(0), T(0)};
  bool first = true;
  if (row.coef[1] != 0.0) {
    T fed[4];
    pick(fed, value, row.feed);
    add_term(prediction, first, row.coef[1], fed);
  }
  if (row.coef[2] != 0.0) {
    T output[4];
    read4(output, static_cast<const M*>(p.output) + at, p.vector, count);
    if (p.uncond) {
      T uncond[4];
      read4(uncond, static_cast<const M*>(p.uncond) + at, p.vector, count);
      const T guidance = T(row.coef[3]);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        output[k] = add_rn(uncond[k], mul_rn(sub_rn(output[k], uncond[k]), guidance));
    }
    add_term(prediction, first, row.coef[2], output);
  }

  bool uses_noise = false;
  for (int u = 0; u < row.num_updates; ++u) uses_noise |= row.coef[4 + u * width + width - 1] != 0.0;
  T noise[4] = {T(0), T(0), T(0), T(0)};
  if (uses_noise && p.noise) {
    read4(noise, static_cast<const T*>(p.noise) + at, p.vector, count);
  } else if (uses_noise) {
    float z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (LAST)
      normal4_channels_last(z, p.seeds[image], row.draw, offset, p.channels,
                            p.per_image / p.channels);
    else
      normal4(z, p.seeds[image], row.draw, uint64_t(group));
#pragma unroll
    for (int k = 0; k < 4; ++k) noise[k] = T(z[k]);
  }

  // `next` is the register that feeds the model next: its old value unless an update names it.
  T next[4];
  pick(next, value, row.next_feed);
#pragma unroll
  for (int u = 0; u < kMaxUpdates; ++u) {
    if (u >= row.num_updates) break;
    const double* coef = row.coef + 4 + u * width;
    T sum[4] = {T(0), T(0), T(0), T(0)};
    bool start = true;
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (r < registers && coef[r] != 0.0) add_term(sum, start, coef[r], value[r]);
    if (coef[registers] != 0.0) add_term(sum, start, coef[registers], prediction);
    if (coef[registers + 1] != 0.0) add_term(sum, start, coef[registers + 1], noise);
    write4(static_cast<T*>(p.registers[row.dest[u]]) + at, sum, p.vector, count);
    if (row.dest[u] == row.next_feed) {
#pragma unroll
      for (int k = 0; k < 4; ++k) next[k] = sum[k];
    }
  }
  if (p.input && row.next_feed >= 0) {
    const T scale = T(row.coef[0]);
#pragma unroll
    for (int k = 0; k < 4; ++k) next[k] = mul_rn(next[k], scale);  // a product by 1 is exact
    for (int copy = 0; copy < p.copies; ++copy)
      write4(static_cast<M*>(p.input) + copy * p.images * p.per_image + at, next, p.vector, count);
  }
}

template <class T, class M, int R, bool LAST>
__device__ __forceinline__ void step_all(const Pointers& p, const DeviceRow& row, int registers) {
  const int64_t groups = (p.per_image + 3) / 4;
  for (int64_t image = blockIdx.y; image < p.images; image += gridDim.y)
    for (int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x; group < groups;
         group += int64_t(gridDim.x) * kThreads)
      step_four<T, M, R, LAST>(p, row, registers, image, group);
}

template <class T, class M, int R, bool LAST>
__global__ void __launch_bounds__(kThreads, kBlocks<R>)
    solver_step_kernel(const __grid_constant__ Pointers p, const __grid_constant__ DeviceRow row,
                       int registers) {
  step_all<T, M, R, LAST>(p, row, registers);
}

template <class T, class M, int R, bool LAST>
__global__ void __launch_bounds__(kThreads, kBlocks<R>)
    solver_step_indexed_kernel(const __grid_constant__ Pointers p, const DeviceRow* rows,
                               int num_rows, DeviceStep* counter, int registers) {
  __shared__ DeviceRow row;
  const int step = *const_cast<volatile int*>(&counter->step);
  const auto* source = reinterpret_cast<const uint32_t*>(rows + step);
  auto* target = reinterpret_cast<uint32_t*>(&row);
  for (int i = threadIdx.x; i < int(sizeof(DeviceRow) / 4); i += kThreads) target[i] = source[i];
  __syncthreads();
  step_all<T, M, R, LAST>(p, row, registers);
  if (threadIdx.x == 0) {
    // Every block has read `step` before it adds itself here, so the last one may advance it.
    __threadfence();
    const unsigned blocks = gridDim.x * gridDim.y;
    if (atomicAdd(&counter->done, 1u) == blocks - 1) {
      counter->done = 0;
      counter->step = step + 1 == num_rows ? 0 : step + 1;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    philox_normal_kernel(float* out, int64_t images, int64_t per_image, const uint64_t* seeds,
                         uint32_t draw) {
  const int64_t groups = (per_image + 3) / 4;
  for (int64_t image = blockIdx.y; image < images; image += gridDim.y)
    for (int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x; group < groups;
         group += int64_t(gridDim.x) * kThreads) {
      float z[4];
      normal4(z, seeds[image], draw, uint64_t(group));
      const int64_t left = per_image - group * 4;
      write4(out + image * per_image + group * 4, z, false, left < 4 ? int(left) : 4);
    }
}

dim3 grid_of(int64_t images, int64_t per_image) {
  const int64_t groups = (per_image + 3) / 4;
  const int64_t x = (groups + kThreads - 1) / kThreads;
  return dim3(unsigned(x < 1 ? 1 : x > 0x7fffffff ? 0x7fffffff : x),
              unsigned(images > 65535 ? 65535 : images));
}

bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % uintptr_t(bytes) == 0;
}

Pointers pointers_of(const StepTask& task) {
  Pointers p{};
  const int64_t state = 4 * dtype_size(task.state), model = 4 * dtype_size(task.output_dtype);
  p.vector = task.per_image % 4 == 0 && aligned(task.output, model) && aligned(task.uncond, model) &&
             aligned(task.input, model) && aligned(task.noise, state);
  for (int r = 0; r < task.num_registers; ++r) {
    p.registers[r] = task.registers[r];
    p.vector = p.vector && aligned(task.registers[r], state);
  }
  p.output = task.output;
  p.uncond = task.uncond;
  p.input = task.input;
  p.noise = task.noise;
  p.seeds = task.seeds;
  p.copies = task.copies;
  p.images = task.images;
  p.per_image = task.per_image;
  p.channels = task.channels;
  return p;
}

// How one row is launched: by value, or by its number in device memory.
struct Source {
  const DeviceRow* rows = nullptr;  // device
  int num_rows = 0;
  DeviceStep* counter = nullptr;
  DeviceRow row{};  // host, when rows is null
};

template <class T, class M, int R, bool LAST>
int launch_r(const StepTask& task, const Source& source, cudaStream_t stream) {
  const dim3 grid = grid_of(task.images, task.per_image);
  const Pointers p = pointers_of(task);
  if (source.rows)
    solver_step_indexed_kernel<T, M, R, LAST><<<grid, kThreads, 0, stream>>>(
        p, source.rows, source.num_rows, source.counter, task.num_registers);
  else
    solver_step_kernel<T, M, R, LAST><<<grid, kThreads, 0, stream>>>(p, source.row, task.num_registers);
  return int(cudaGetLastError());
}

template <class T, class M>
int launch_t(const StepTask& task, const Source& source, cudaStream_t stream) {
  // The order of memory matters to drawn noise alone.
  if (task.channels > 1 && task.seeds && !task.noise)
    return launch_r<T, M, 8, true>(task, source, stream);
  if (task.num_registers <= 1) return launch_r<T, M, 1, false>(task, source, stream);
  if (task.num_registers <= 2) return launch_r<T, M, 2, false>(task, source, stream);
  if (task.num_registers <= 4) return launch_r<T, M, 4, false>(task, source, stream);
  return launch_r<T, M, 8, false>(task, source, stream);
}

int launch(const StepTask& task, const Source& source, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (task.images == 0 || task.per_image == 0) return int(cudaSuccess);
  if (task.input && task.input_dtype != task.output_dtype) return int(cudaErrorInvalidValue);
  if (task.state == DType::f64)
    return task.output_dtype == DType::f64 ? launch_t<double, double>(task, source, stream)
                                           : int(cudaErrorInvalidValue);
  switch (task.output_dtype) {
    case DType::f32: return launch_t<float, float>(task, source, stream);
    case DType::f16: return launch_t<float, __half>(task, source, stream);
    case DType::bf16: return launch_t<float, __nv_bfloat16>(task, source, stream);
    default: return int(cudaErrorInvalidValue);
  }
}

}  // namespace

DeviceRow make_device_row(const StepTask& task) {
  DeviceRow row{};
  const int width = task.num_registers + 2;
  row.feed = task.feed;
  row.next_feed = task.next_feed;
  row.num_updates = task.num_updates;
  row.draw = task.draw;
  for (int k = 0; k < 4 + task.num_updates * width; ++k) row.coef[k] = task.coef[k];
  if (task.coef[1] != 0.0) row.reads |= 1u << task.feed;
  bool rewritten = false;
  for (int u = 0; u < task.num_updates; ++u) {
    row.dest[u] = task.dest[u];
    rewritten |= task.dest[u] == task.next_feed;
    for (int r = 0; r < task.num_registers; ++r)
      if (task.coef[4 + u * width + r] != 0.0) row.reads |= 1u << r;
  }
  if (task.input && task.next_feed >= 0 && !rewritten) row.reads |= 1u << task.next_feed;
  return row;
}

int cuda_solver_step(const StepTask& task, void* stream) {
  Source source;
  source.row = make_device_row(task);
  return launch(task, source, stream);
}

int cuda_solver_step_indexed(const StepTask& task, const DeviceRow* rows, int num_rows,
                             DeviceStep* counter, void* stream) {
  Source source;
  source.rows = rows;
  source.num_rows = num_rows;
  source.counter = counter;
  return launch(task, source, stream);
}

int cuda_philox_normal(float* out, int64_t images, int64_t per_image, const uint64_t* seeds,
                       uint32_t draw, void* stream) {
  if (images == 0 || per_image == 0) return int(cudaSuccess);
  philox_normal_kernel<<<grid_of(images, per_image), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      out, images, per_image, seeds, draw);
  return int(cudaGetLastError());
}

const char* cuda_error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }

}  // namespace fastdiff
