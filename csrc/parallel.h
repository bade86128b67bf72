// Data-parallel loops on the OpenMP runtime that PyTorch has already loaded.
//
// A second pool of threads beside PyTorch's would fight it for the cores: OpenMP workers spin for a
// while after each region. So the runtime in the process is looked up once (no link-time dependency)
// and its team is used; where none is found, threads are started for the call.
#pragma once

#include <cstdint>

namespace fastdiff {

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

// Calls body on disjoint ranges that cover [0, n), at most `threads` at a time, none of them shorter
// than `grain` but the last. Runs inline when one range is enough.
void parallel_ranges(int64_t n, int64_t grain, int threads, RangeFunction body, void* context);

// "torch/lib/libgomp.so.1" or the like; "std::thread" when no OpenMP runtime is loaded.
const char* parallel_backend();

template <class Body>
static inline void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  if (n <= 0) return;
  if (threads <= 1 || n <= grain) {
    body(int64_t(0), n);
    return;
  }
  parallel_ranges(
      n, grain, threads,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

}  // namespace fastdiff
