#include "workspace.h"

#include <new>

namespace fastdiff {

constexpr std::align_val_t kCacheLine{64};

struct alignas(64) Workspace::Block {
  Block* before;
};

void* Workspace::take(size_t bytes) {
  void* memory = ::operator new(sizeof(Block) + bytes, kCacheLine);
  last_ = new (memory) Block{last_};
  return last_ + 1;
}

Workspace::~Workspace() {
  while (last_) {
    Block* before = last_->before;
    ::operator delete(last_, kCacheLine);
    last_ = before;
  }
}

}  // namespace fastdiff
