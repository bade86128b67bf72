// Counter-based normal noise, the same bits on every target.
//
// Philox4x32-10 (Salmon et al., SC 2011) gives four 32-bit words for a key (the image's seed) and a
// counter (element / 4, draw). Two words make two normals by Box-Muller, with a logarithm, a sine and
// a cosine of our own: only +, -, *, sqrt (all correctly rounded in IEEE 754) and integer operations, no
// FMA, in this order, so C++, CUDA, Triton and numpy agree bit for bit. fastdiff/solvers/noise.py and
// kernels/solver_step.py mirror this file.
//
//   u     = ((word0 >> 9) + 1/2) 2^-23                        in (0, 1), exact in float32
//   r     = sqrt(-2 ln u)
//   turn  = ((word1 >> 8) + 1/2) 2^-24                        quadrant = top two bits
//   theta = (pi/2) (fraction of the quadrant - 1/2)           in (-pi/4, pi/4)
//   z0, z1 = r (cos, sin)(theta + quadrant pi/2)
//
// z is within 8.3e-7 of these formulas in float64 (measured over all 2^24 angles at the largest r, 5.77,
// and all 2^23 radii); its tails end at 5.77, where a normal has 1 in 1.2e8.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTDIFF_HD static __host__ __device__ __forceinline__
#else
#include <cmath>
#define FASTDIFF_HD static inline
#endif

namespace fastdiff {

constexpr uint32_t kInitialDraw = 0xffffffffu;  // the draw of x_T

struct Words {
  uint32_t v[4];
};

FASTDIFF_HD Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                             uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
    const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// The few operations whose rounding must be pinned: nvcc would contract a*b+c otherwise.
#if defined(__CUDA_ARCH__)
FASTDIFF_HD float mul_rn(float a, float b) { return __fmul_rn(a, b); }
FASTDIFF_HD float add_rn(float a, float b) { return __fadd_rn(a, b); }
FASTDIFF_HD float sub_rn(float a, float b) { return __fsub_rn(a, b); }
FASTDIFF_HD double mul_rn(double a, double b) { return __dmul_rn(a, b); }
FASTDIFF_HD double add_rn(double a, double b) { return __dadd_rn(a, b); }
FASTDIFF_HD double sub_rn(double a, double b) { return __dsub_rn(a, b); }
FASTDIFF_HD float sqrt_rn(float a) { return __fsqrt_rn(a); }
FASTDIFF_HD float from_bits(uint32_t bits) { return __uint_as_float(bits); }
FASTDIFF_HD uint32_t to_bits(float value) { return __float_as_uint(value); }
#else
FASTDIFF_HD float mul_rn(float a, float b) { return a * b; }
FASTDIFF_HD float add_rn(float a, float b) { return a + b; }
FASTDIFF_HD float sub_rn(float a, float b) { return a - b; }
FASTDIFF_HD double mul_rn(double a, double b) { return a * b; }
FASTDIFF_HD double add_rn(double a, double b) { return a + b; }
FASTDIFF_HD double sub_rn(double a, double b) { return a - b; }
FASTDIFF_HD float sqrt_rn(float a) { return __builtin_sqrtf(a); }
FASTDIFF_HD float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FASTDIFF_HD uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
#endif

// ln u for u in [2^-24, 1): u = 2^e (1 + f) with 1 + f in [0.7071, 1.4142), then the minimax
// polynomial of Cephes' logf.
FASTDIFF_HD float log_unit(float u) {
  const uint32_t bits = to_bits(u) - 0x3f3504f3u;  // sqrt(1/2) becomes 0
  const int32_t e = int32_t(bits) >> 23;
  const float f = sub_rn(from_bits((bits & 0x007fffffu) + 0x3f3504f3u), 1.0f);
  const float f2 = mul_rn(f, f);
  float p = 7.0376836292e-2f;
  p = add_rn(mul_rn(p, f), -1.1514610310e-1f);
  p = add_rn(mul_rn(p, f), 1.1676998740e-1f);
  p = add_rn(mul_rn(p, f), -1.2420140846e-1f);
  p = add_rn(mul_rn(p, f), 1.4249322787e-1f);
  p = add_rn(mul_rn(p, f), -1.6668057665e-1f);
  p = add_rn(mul_rn(p, f), 2.0000714765e-1f);
  p = add_rn(mul_rn(p, f), -2.4999993993e-1f);
  p = add_rn(mul_rn(p, f), 3.3333331174e-1f);
  const float ef = float(e);
  float y = mul_rn(mul_rn(p, f), f2);
  y = add_rn(y, mul_rn(ef, -2.12194440e-4f));  // ln 2 in two parts
  y = sub_rn(y, mul_rn(0.5f, f2));
  return add_rn(add_rn(f, y), mul_rn(ef, 0.693359375f));
}

struct Pair {
  float first, second;
};

FASTDIFF_HD Pair box_muller(uint32_t word0, uint32_t word1) {
  const float u = mul_rn(add_rn(float(int32_t(word0 >> 9)), 0.5f), 1.1920928955078125e-7f);
  const float r = sqrt_rn(mul_rn(-2.0f, log_unit(u)));
  const uint32_t turn = word1 >> 8;
  const uint32_t quadrant = turn >> 22;
  const float centred = add_rn(float(int32_t(turn & 0x3fffffu) - 0x200000), 0.5f);
  const float theta = mul_rn(centred, 3.7450704e-7f);  // (pi/2) 2^-22
  const float t2 = mul_rn(theta, theta);
  float s = add_rn(mul_rn(-1.9515295891e-4f, t2), 8.3321608736e-3f);
  s = add_rn(mul_rn(s, t2), -1.6666654611e-1f);
  s = add_rn(mul_rn(mul_rn(s, t2), theta), theta);
  float c = add_rn(mul_rn(2.443315711809948e-5f, t2), -1.388731625493765e-3f);
  c = add_rn(mul_rn(c, t2), 4.166664568298827e-2f);
  c = add_rn(sub_rn(mul_rn(mul_rn(c, t2), t2), mul_rn(0.5f, t2)), 1.0f);
  // Rotating by quadrants swaps and negates: exact.
  const uint32_t odd = 0u - (quadrant & 1u);
  const uint32_t cb = to_bits(c), sb = to_bits(s);
  const uint32_t xb = (cb & ~odd) | (sb & odd);
  const uint32_t yb = (sb & ~odd) | (cb & odd);
  const uint32_t xsign = ((quadrant + 1u) & 2u) << 30;  // quadrants 1 and 2
  const uint32_t ysign = (quadrant & 2u) << 30;         // quadrants 2 and 3
  return Pair{mul_rn(r, from_bits(xb ^ xsign)), mul_rn(r, from_bits(yb ^ ysign))};
}

// The normal of one element; four neighbours share a counter, so whole groups are cheaper.
FASTDIFF_HD float normal_at(uint64_t seed, uint32_t draw, uint64_t element) {
  const uint64_t group = element >> 2;
  const Words w = philox4x32(uint32_t(group), draw, uint32_t(group >> 32), 0, uint32_t(seed),
                             uint32_t(seed >> 32));
  const bool upper = element & 2;
  const Pair p = box_muller(upper ? w.v[2] : w.v[0], upper ? w.v[3] : w.v[1]);
  return element & 1 ? p.second : p.first;
}

}  // namespace fastdiff
