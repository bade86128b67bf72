// Memory for one call of a kernel. Kernels compiled per instruction set take it from here and never
// free it: destructors of their own would need the exception tables and weak symbols that csrc/cpu/
// must not export.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastdiff {

class Workspace {
 public:
  Workspace() = default;
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Aligned to a cache line, valid as long as the workspace; throws std::bad_alloc.
  void* take(size_t bytes);

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take(size_t(count) * sizeof(T)));
  }

 private:
  struct Block;
  Block* last_ = nullptr;
};

}  // namespace fastdiff
