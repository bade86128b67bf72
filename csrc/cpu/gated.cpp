// out = hidden * act(gate), act = GELU, its tanh form, or SiLU, in fp32, rounded once.
//
//   x    [outer, inner, 2 * width], hidden and gate (or gate and hidden) side by side; fp32, fp16,
//        bf16
//   out  [outer, inner, width]
//
// x is read once, out written once. Threads take rows.
//
// GELU(x) = x Phi(x) = max(x, 0) - |x| Phi(-|x|): no cancellation at either end, as 1 + erf has.
// Phi(-a) = exp(-a^2 / 2) R(a), and R is a polynomial in t = 1 / (1 + p a) without constant term.
// Coefficients: weighted least squares towards the smallest largest relative error over [0, 8].
#include "../gated.h"

#include "../parallel.h"
#include "../simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t kParallelGrain = 16384;  // elements that repay handing work to another thread

// Relative error of Phi(-a): 5e-8 for results in fp32, 2.3e-5 for those rounded to 16 bits.
template <class T>
struct Tail;
template <>
struct Tail<float> {
  static constexpr float p = 0.3f;
  static constexpr float coefficients[8] = {0x1.327484p-5f, -0x1.50bd28p-3f, 0x1.c01626p-3f,
                                            -0x1.0acc44p-4f, 0x1.13b564p-3f, 0x1.91b968p-4f,
                                            0x1.efcf56p-4f, 0x1.e9ec86p-4f};
};
struct TailShort {
  static constexpr float p = 0.35f;
  static constexpr float coefficients[5] = {-0x1.830d68p-4f, 0x1.125a2p-2f, 0x1.9a10a4p-6f,
                                            0x1.5085p-3f, 0x1.191144p-3f};
};
template <>
struct Tail<bf16_t> : TailShort {};
template <>
struct Tail<f16_t> : TailShort {};

template <class T, int N>
FASTDIFF_INLINE void exp_negative_for(const vfloat (&x)[N], vfloat (&power)[N]) {
  if (sizeof(T) == 2)
    exp_negative_short(x, power);
  else
    exp_negative(x, power);
}

// x becomes GELU(x).
template <class T, int N>
FASTDIFF_INLINE void gelu(vfloat (&x)[N]) {
  vfloat a[N], t[N], r[N], square[N], power[N];
  // Phi(-14) is below fp32; an infinite a would make inf * 0.
  for (int i = 0; i < N; ++i) a[i] = minimum(splat(14.0f), maximum(x[i], splat(0.0f) - x[i]));
  for (int i = 0; i < N; ++i) square[i] = a[i] * a[i] * splat(0.5f);
  exp_negative_for<T>(square, power);
  for (int i = 0; i < N; ++i) t[i] = splat(1.0f) / fma(a[i], splat(Tail<T>::p), splat(1.0f));
  for (int i = 0; i < N; ++i) r[i] = splat(0.0f);
  for (const float c : Tail<T>::coefficients)
    for (int i = 0; i < N; ++i) r[i] = fma(r[i], t[i], splat(c));
  for (int i = 0; i < N; ++i) r[i] = r[i] * t[i] * power[i];
  for (int i = 0; i < N; ++i) x[i] = fma(splat(0.0f) - a[i], r[i], maximum(splat(0.0f), x[i]));
}

// x becomes x / 2 (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class T, int N>
FASTDIFF_INLINE void gelu_tanh(vfloat (&x)[N]) {
  vfloat u[N], power[N];
  for (int i = 0; i < N; ++i) u[i] = fma(x[i] * x[i], splat(0x1.2444f2p-4f), splat(0x1.988454p+0f));
  for (int i = 0; i < N; ++i) u[i] = u[i] * x[i];
  exp_negative_for<T>(u, power);
  for (int i = 0; i < N; ++i) power[i] = power[i] + splat(1.0f);
  // The result is 0 from here on, and the exponential stops growing at 2^127 without AVX-512.
  for (int i = 0; i < N; ++i) x[i] = maximum(splat(-10.0f), x[i]) / power[i];
}

template <class T, Activation kActivation, int N>
FASTDIFF_INLINE void activate(vfloat (&x)[N]) {
  if (kActivation == Activation::gelu)
    gelu<T>(x);
  else if (kActivation == Activation::gelu_tanh)
    gelu_tanh<T>(x);
  else
    silu<T>(x);
}

template <class T, Activation kActivation>
void row(const T* hidden, const T* gate, T* out, int64_t width) {
  int64_t at = 0;
  for (; at + kBlock * kLanes <= width; at += kBlock * kLanes) {
    vfloat y[kBlock];
    for (int i = 0; i < kBlock; ++i) y[i] = load(gate + at + i * kLanes);
    activate<T, kActivation>(y);
    for (int i = 0; i < kBlock; ++i) y[i] = y[i] * load(hidden + at + i * kLanes);
    store_block(out + at, y);
  }
  for (; at < width; at += kLanes) {
    const int n = int(width - at < kLanes ? width - at : kLanes);
    vfloat y[1] = {load_first(gate + at, n)};
    activate<T, kActivation>(y);
    store_first(out + at, y[0] * load_first(hidden + at, n), n);
  }
}

template <class T, Activation kActivation>
void rows(const Gated& args) {
  const int64_t grain = (kParallelGrain + args.width - 1) / args.width;
  parallel_for(args.outer * args.inner, grain, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(args.x) + r / args.inner * args.outer_stride +
                   r % args.inner * args.inner_stride;
      const T *first = x, *second = x + args.width;
      row<T, kActivation>(args.gate_first ? second : first, args.gate_first ? first : second,
                          static_cast<T*>(args.out) + r * args.width, args.width);
    }
  });
}

template <class T>
void typed(const Gated& args) {
  switch (args.activation) {
    case Activation::gelu: return rows<T, Activation::gelu>(args);
    case Activation::gelu_tanh: return rows<T, Activation::gelu_tanh>(args);
    case Activation::silu: return rows<T, Activation::silu>(args);
  }
}

}  // namespace

void gated(const Gated& args) {
  switch (args.dtype) {
    case DType::f16: return typed<f16_t>(args);
    case DType::bf16: return typed<bf16_t>(args);
    default: return typed<float>(args);
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
