#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace fastdiff {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string name = "std::thread";
};

#if defined(__linux__)
struct Candidate {
  std::string path;
  int rank = 0;  // PyTorch's own runtime first; scikit-learn and others bring theirs
};

int collect(dl_phdr_info* info, size_t, void* data) {
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const std::string base = path.substr(path.rfind('/') + 1);
  int rank = 0;
  for (const char* prefix : {"libgomp", "libiomp5", "libomp"})
    if (base.rfind(prefix, 0) == 0) rank = 1;
  if (rank && path.find("/torch") != std::string::npos) rank = 2;
  auto* best = static_cast<Candidate*>(data);
  if (rank > best->rank) *best = {path, rank};
  return 0;
}

Runtime find_runtime() {
  Runtime runtime;
  Candidate best;
  dl_iterate_phdr(collect, &best);
  if (!best.rank) return runtime;
  // Already in the process: this only takes a reference to it.
  void* handle = dlopen(best.path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return runtime;
  if (void* symbol = dlsym(handle, "GOMP_parallel")) {
    runtime.parallel = reinterpret_cast<GompParallel>(symbol);
    runtime.name = best.path.substr(best.path.rfind('/') + 1);
  }
  return runtime;
}
#else
Runtime find_runtime() { return {}; }
#endif

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct Job {
  RangeFunction body;
  void* context;
  int64_t n, chunk;
  std::atomic<int64_t> next{0};
};

// Each member of the team takes ranges until none is left, so a team smaller than asked for (nested
// regions, thread limits) still covers everything.
void work(void* data) {
  auto* job = static_cast<Job*>(data);
  for (;;) {
    const int64_t begin = job->next.fetch_add(job->chunk, std::memory_order_relaxed);
    if (begin >= job->n) return;
    job->body(job->context, begin, std::min(begin + job->chunk, job->n));
  }
}

}  // namespace

void parallel_ranges(int64_t n, int64_t grain, int threads, RangeFunction body, void* context) {
  grain = std::max<int64_t>(grain, 1);
  const int64_t team = std::min<int64_t>(threads, (n + grain - 1) / grain);
  if (team <= 1) {
    body(context, 0, n);
    return;
  }
  Job job{body, context, n, (n + team - 1) / team};
  if (runtime().parallel) {
    runtime().parallel(work, &job, unsigned(team), 0);
    return;
  }
  std::vector<std::thread> helpers;
  helpers.reserve(size_t(team - 1));
  for (int64_t i = 1; i < team; ++i) helpers.emplace_back(work, &job);
  work(&job);
  for (auto& helper : helpers) helper.join();
}

const char* parallel_backend() { return runtime().name.c_str(); }

}  // namespace fastdiff
