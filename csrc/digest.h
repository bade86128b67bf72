// 64 bits that tell contents of memory apart.
#pragma once

#include <cstdint>

namespace fastdiff {

// A change of one 8-byte word always shows, a random change of more all but once in 2^64. The same
// for any number of threads. Not for secrets: whoever wants to can find two equal ones.
uint64_t digest(const void* data, int64_t bytes, int threads);

}  // namespace fastdiff
