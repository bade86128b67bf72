#include "attention.h"

#include <cstdlib>

#if defined(FASTDIFF_X86_VARIANTS) && defined(FASTDIFF_BF16_VARIANTS)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastdiff {
namespace {

#if defined(FASTDIFF_X86_VARIANTS) && defined(FASTDIFF_BF16_VARIANTS)
bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return isa_level() == 2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1u);
}

// AMX's registers are 8 KiB of state that a process has to ask for, once. Threads started later
// inherit the permission, and so do those already running: it belongs to the process.
bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned tile = 1u << 24, bf16 = 1u << 22;
  if (!(d & tile) || !(d & bf16)) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

int detect() {
  int level = isa_level();
#if defined(FASTDIFF_X86_VARIANTS) && defined(FASTDIFF_BF16_VARIANTS)
  const char* text = std::getenv("FASTDIFF_ISA_MAX");
  // AMX has to be asked for until it has run on a processor that has it.
  const int cap = text ? std::atoi(text) : 3;
  if (cap >= 3 && has_avx512_bf16()) level = 3;
  if (cap >= 4 && level == 3 && has_amx_bf16()) level = 4;
#endif
  return level;
}

}  // namespace

int attention_level() {
  static const int level = detect();
  return level;
}

void attention(const Attention& args) {
#if defined(FASTDIFF_X86_VARIANTS) && defined(FASTDIFF_BF16_VARIANTS)
  if (args.dtype == DType::bf16 && attention_level() == 4) return isa_amx::attention_kernel(args);
  if (args.dtype == DType::bf16 && attention_level() == 3)
    return isa_avx512bf16::attention_kernel(args);
#endif
  FASTDIFF_DISPATCH(attention_kernel)(args);
}

}  // namespace fastdiff
