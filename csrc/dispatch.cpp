#include "dispatch.h"

#include <cstdlib>

namespace fastdiff {

static int detect() {
  int level = 0;
#if defined(FASTDIFF_X86_VARIANTS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    level = 2;
#endif
  if (const char* text = std::getenv("FASTDIFF_ISA_MAX")) {
    const int cap = std::atoi(text);
    if (cap < level) level = cap < 0 ? 0 : cap;
  }
  return level;
}

int isa_level() {
  static const int level = detect();
  return level;
}

const char* isa_name(int level) {
  return level == 2 ? "AVX-512" : level == 1 ? "AVX2" : "portable";
}

}  // namespace fastdiff
