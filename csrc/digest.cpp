#include "digest.h"

#include <cstring>
#include <vector>

#include "parallel.h"

namespace fastdiff {
namespace {

constexpr int64_t kBlock = 1 << 18;  // bytes that one thread digests at a time
constexpr int kLanes = 8;            // independent chains: a multiplication takes several cycles
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;

// Both steps are invertible in the state and in the word, so no change of a single one is lost.
inline uint64_t mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * kOdd;
  return state ^ (state >> 32);
}

uint64_t digest_block(const unsigned char* data, int64_t bytes) {
  uint64_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = uint64_t(i + 1) * kOdd;
  int64_t at = 0;
  for (; at + 8 * kLanes <= bytes; at += 8 * kLanes) {
    uint64_t word[kLanes];
    std::memcpy(word, data + at, sizeof word);
    for (int i = 0; i < kLanes; ++i) lane[i] = mix(lane[i], word[i]);
  }
  for (int i = 0; at < bytes; at += 8, ++i) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, size_t(bytes - at < 8 ? bytes - at : 8));
    lane[i] = mix(lane[i], word);
  }
  uint64_t state = uint64_t(bytes);
  for (int i = 0; i < kLanes; ++i) state = mix(state, lane[i]);
  return state;
}

}  // namespace

uint64_t digest(const void* data, int64_t bytes, int threads) {
  if (bytes <= 0) return 0;
  const auto* start = static_cast<const unsigned char*>(data);
  const int64_t blocks = (bytes + kBlock - 1) / kBlock;
  std::vector<uint64_t> found(size_t(blocks), 0);
  parallel_for(blocks, 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t rest = bytes - b * kBlock;
      found[size_t(b)] = digest_block(start + b * kBlock, rest < kBlock ? rest : kBlock);
    }
  });
  uint64_t state = 0;
  for (uint64_t block : found) state = mix(state, block);
  return state;
}

}  // namespace fastdiff
