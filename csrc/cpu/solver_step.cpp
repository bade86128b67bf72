// The solver step on the CPU: blocks that stay in the first-level cache, one fused pass over the terms
// of each update. Compiled once per instruction set without FMA contraction, so every level gives
// the same bits.
#include "../solver_step.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../parallel.h"
#include "../philox.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t kBlock = 512;          // elements; a multiple of 4 (one Philox counter)
constexpr int64_t kGrain = 128 * 1024;   // below this a second thread costs more than it brings
constexpr int kMaxTerms = kMaxRegisters + 2;

template <class T, class S>
inline void load(T* out, const S* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = T(to_float(in[i]));
}

template <class T, class S>
inline void store(T* out, const S* in, S scale, bool scaled, int64_t n) {
  if (scaled) {
    for (int64_t i = 0; i < n; ++i) out[i] = Cast<T, S>::run(in[i] * scale);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = Cast<T, S>::run(in[i]);
  }
}

#if defined(__F16C__)
template <>
inline void load<float, f16_t>(float* out, const f16_t* in, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) out[i] = to_float(in[i]);
}

template <>
inline void store<f16_t, float>(f16_t* out, const float* in, float scale, bool scaled, int64_t n) {
  const __m256 factor = _mm256_set1_ps(scaled ? scale : 1.0f);  // a product by 1 is exact
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(in + i), factor);
    const __m128i half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
  for (; i < n; ++i) out[i] = to_f16(scaled ? in[i] * scale : in[i]);
}
#endif

template <class T>
void load_as(T* out, const void* in, DType dtype, int64_t at, int64_t n) {
  switch (dtype) {
    case DType::f32: load(out, static_cast<const float*>(in) + at, n); return;
    case DType::f64: load(out, static_cast<const double*>(in) + at, n); return;
    case DType::f16: load(out, static_cast<const f16_t*>(in) + at, n); return;
    case DType::bf16: load(out, static_cast<const bf16_t*>(in) + at, n); return;
  }
}

template <class T>
void store_as(void* out, const T* in, double scale, DType dtype, int64_t at, int64_t n) {
  const T factor = T(scale);
  const bool scaled = scale != 1.0;
  switch (dtype) {
    case DType::f32: store(static_cast<float*>(out) + at, in, factor, scaled, n); return;
    case DType::f64: store(static_cast<double*>(out) + at, in, factor, scaled, n); return;
    case DType::f16: store(static_cast<f16_t*>(out) + at, in, factor, scaled, n); return;
    case DType::bf16: store(static_cast<bf16_t*>(out) + at, in, factor, scaled, n); return;
  }
}

// out = c0*s0 + c1*s1 + ... in this order. `out` may be one of the sources: element i is read before
// it is written.
template <int N, class T>
inline void combine_n(T* out, const T* const* sources, const T* coef, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T sum = sources[0][i] * coef[0];
    for (int k = 1; k < N; ++k) sum = sum + sources[k][i] * coef[k];
    out[i] = sum;
  }
}

template <class T>
void combine(T* out, const T* const* sources, const T* coef, int terms, int64_t n) {
  switch (terms) {
    case 0:
      for (int64_t i = 0; i < n; ++i) out[i] = T(0);
      return;
    case 1: combine_n<1>(out, sources, coef, n); return;
    case 2: combine_n<2>(out, sources, coef, n); return;
    case 3: combine_n<3>(out, sources, coef, n); return;
    case 4: combine_n<4>(out, sources, coef, n); return;
    case 5: combine_n<5>(out, sources, coef, n); return;
    case 6: combine_n<6>(out, sources, coef, n); return;
    case 7: combine_n<7>(out, sources, coef, n); return;
    case 8: combine_n<8>(out, sources, coef, n); return;
    case 9: combine_n<9>(out, sources, coef, n); return;
    default: combine_n<10>(out, sources, coef, n); return;
  }
}

// Normals of elements [begin, begin + n) of one image; begin is a multiple of 4.
void normals(float* out, uint64_t seed, uint32_t draw, int64_t begin, int64_t n) {
  constexpr int64_t kGroups = kBlock / 4;
  uint32_t words[4][kGroups];
  const int64_t groups = (n + 3) / 4;
  const uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  const uint64_t first = uint64_t(begin) / 4;
  for (int64_t g = 0; g < groups; ++g) {
    const Words w = philox4x32(uint32_t(first + g), draw, uint32_t((first + g) >> 32), 0, k0, k1);
    for (int k = 0; k < 4; ++k) words[k][g] = w.v[k];
  }
  float z[4][kGroups];
  for (int pair = 0; pair < 2; ++pair)
    for (int64_t g = 0; g < groups; ++g) {
      const Pair p = box_muller(words[2 * pair][g], words[2 * pair + 1][g]);
      z[2 * pair][g] = p.first;
      z[2 * pair + 1][g] = p.second;
    }
  const int64_t whole = n / 4;
  for (int64_t g = 0; g < whole; ++g)
    for (int k = 0; k < 4; ++k) out[4 * g + k] = z[k][g];
  for (int64_t i = 4 * whole; i < n; ++i) out[i] = z[i & 3][i >> 2];
}

// The same in channels-last memory: memory element m is number (m % channels)*spatial + m / channels.
// Each channel's run of pixels is drawn whole and scattered.
void normals_channels_last(float* out, uint64_t seed, uint32_t draw, int64_t begin, int64_t n,
                           int64_t channels, int64_t spatial) {
  const int64_t first = begin / channels, last = (begin + n - 1) / channels;  // pixels, inclusive
  float run[kBlock];
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t pixel = first; pixel <= last;) {
      const int64_t element = c * spatial + pixel, skip = element & 3;
      const int64_t wanted = last - pixel + 1, room = kBlock - skip;
      const int64_t count = wanted < room ? wanted : room;
      normals(run, seed, draw, element - skip, skip + count);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (pixel + i) * channels + c - begin;
        if (at >= 0 && at < n) out[at] = run[skip + i];
      }
      pixel += count;
    }
}

// Whether any update after `k` reads register `dest`, whose old value must then outlive update k.
bool read_later(const StepTask& task, int k, int dest) {
  const int width = task.num_registers + 2;
  for (int later = k + 1; later < task.num_updates; ++later)
    if (task.coef[4 + later * width + dest] != 0.0) return true;
  return false;
}

template <class T>
void block(const StepTask& task, int64_t image, int64_t offset, int64_t n) {
  const int64_t at = image * task.per_image + offset;
  const int width = task.num_registers + 2;
  const double* coef = task.coef;
  T output[kBlock], prediction[kBlock], drawn[kBlock];
  T held[kMaxUpdates][kBlock];

  const T* registers[kMaxRegisters];
  for (int r = 0; r < task.num_registers; ++r)
    registers[r] = static_cast<const T*>(task.registers[r]) + at;

  bool uses_noise = false;
  for (int u = 0; u < task.num_updates; ++u) uses_noise |= coef[4 + u * width + width - 1] != 0.0;
  const T* noise = drawn;
  if (uses_noise && task.noise) {
    noise = static_cast<const T*>(task.noise) + at;
  } else if (uses_noise) {
    float z[kBlock];
    if (task.channels > 1)
      normals_channels_last(z, task.seeds[image], task.draw, offset, n, task.channels,
                            task.per_image / task.channels);
    else
      normals(z, task.seeds[image], task.draw, offset, n);
    for (int64_t i = 0; i < n; ++i) drawn[i] = T(z[i]);
  }

  {
    const T* sources[2];
    T factors[2];
    int terms = 0;
    if (coef[1] != 0.0) {
      sources[terms] = registers[task.feed];
      factors[terms++] = T(coef[1]);
    }
    if (coef[2] != 0.0) {
      load_as(output, task.output, task.output_dtype, at, n);
      if (task.uncond) {
        T* uncond = prediction;  // free until the sum below
        load_as(uncond, task.uncond, task.output_dtype, at, n);
        const T guidance = T(coef[3]);
        for (int64_t i = 0; i < n; ++i)
          output[i] = uncond[i] + (output[i] - uncond[i]) * guidance;
      }
      sources[terms] = output;
      factors[terms++] = T(coef[2]);
    }
    combine(prediction, sources, factors, terms, n);
  }

  bool holds[kMaxUpdates];
  for (int u = 0; u < task.num_updates; ++u) {
    const double* row = coef + 4 + u * width;
    const T* sources[kMaxTerms];
    T factors[kMaxTerms];
    int terms = 0;
    for (int r = 0; r < task.num_registers; ++r)
      if (row[r] != 0.0) {
        sources[terms] = registers[r];
        factors[terms++] = T(row[r]);
      }
    if (row[task.num_registers] != 0.0) {
      sources[terms] = prediction;
      factors[terms++] = T(row[task.num_registers]);
    }
    if (row[task.num_registers + 1] != 0.0) {
      sources[terms] = noise;
      factors[terms++] = T(row[task.num_registers + 1]);
    }
    holds[u] = read_later(task, u, task.dest[u]);
    T* target = holds[u] ? held[u] : static_cast<T*>(task.registers[task.dest[u]]) + at;
    combine(target, sources, factors, terms, n);
  }
  for (int u = 0; u < task.num_updates; ++u)
    if (holds[u])
      std::memcpy(static_cast<T*>(task.registers[task.dest[u]]) + at, held[u], size_t(n) * sizeof(T));

  if (task.input && task.next_feed >= 0)
    for (int copy = 0; copy < task.copies; ++copy)
      store_as(task.input, registers[task.next_feed], coef[0], task.input_dtype,
               copy * task.images * task.per_image + at, n);
}

}  // namespace

void solver_step(const StepTask& task, int threads) {
  const int64_t blocks = (task.per_image + kBlock - 1) / kBlock;  // of one image
  parallel_for(task.images * blocks, kGrain / kBlock, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t image = b / blocks, offset = b % blocks * kBlock;
      const int64_t left = task.per_image - offset;
      const int64_t n = left < kBlock ? left : kBlock;
      if (task.state == DType::f64)
        block<double>(task, image, offset, n);
      else
        block<float>(task, image, offset, n);
    }
  });
}

void philox_normal(float* out, int64_t images, int64_t per_image, const uint64_t* seeds,
                   uint32_t draw, int threads) {
  const int64_t blocks = (per_image + kBlock - 1) / kBlock;
  parallel_for(images * blocks, 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t image = b / blocks, offset = b % blocks * kBlock;
      const int64_t left = per_image - offset;
      normals(out + image * per_image + offset, seeds[image], draw, offset,
              left < kBlock ? left : kBlock);
    }
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
