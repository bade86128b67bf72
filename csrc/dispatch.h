// Run-time choice of instruction set. csrc/cpu/*.cpp is compiled once per level into its own
// namespace (FASTDIFF_ISA), so one binary serves every x86-64; other processors have isa_base only.
#pragma once

#ifndef FASTDIFF_ISA
#define FASTDIFF_ISA isa_base
#endif

namespace fastdiff {

// 0: portable, 1: AVX2 + FMA + F16C, 2: AVX-512 F/BW/DQ/VL. Read once; FASTDIFF_ISA_MAX lowers it.
int isa_level();
const char* isa_name(int level);

}  // namespace fastdiff

#if defined(FASTDIFF_X86_VARIANTS)
#define FASTDIFF_DECLARE_ISA(ret, fn, args) \
  namespace isa_base {                      \
  ret fn args;                              \
  }                                         \
  namespace isa_avx2 {                      \
  ret fn args;                              \
  }                                         \
  namespace isa_avx512 {                    \
  ret fn args;                              \
  }
#define FASTDIFF_DISPATCH(fn)                              \
  (::fastdiff::isa_level() == 2   ? ::fastdiff::isa_avx512::fn \
   : ::fastdiff::isa_level() == 1 ? ::fastdiff::isa_avx2::fn   \
                                  : ::fastdiff::isa_base::fn)
#else
#define FASTDIFF_DECLARE_ISA(ret, fn, args) \
  namespace isa_base {                      \
  ret fn args;                              \
  }
#define FASTDIFF_DISPATCH(fn) (::fastdiff::isa_base::fn)
#endif
