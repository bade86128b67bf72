// The attention kernel of one instruction set as a program: compared with float64 on heaps that end
// where the tensors do, so that the sanitizers see every access outside. Built by
// test_attention_cpu.py with -DFASTDIFF_ISA and the flags of that set.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cpu/attention.cpp"
#include "../../csrc/dispatch.cpp"
#include "../../csrc/parallel.cpp"

// Instead of csrc/workspace.cpp: memory that is NaN until it is written, whatever its type.
namespace fastdiff {
struct Workspace::Block {
  Block* before;
  void* memory;
};
void* Workspace::take(size_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  last_ = new Block{last_, memory};
  return std::memset(memory, 0xff, bytes);
}
Workspace::~Workspace() {
  for (Block* block = last_; block;) {
    Block* before = block->before;
    std::free(block->memory);
    delete block;
    block = before;
  }
}
}  // namespace fastdiff

using namespace fastdiff;

static uint32_t state = 1;
static float draw() {  // in (-2, 2)
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / float(1 << 22) - 2.0f;
}

static void raise_to(double& worst, double error) {  // NaN is the worst
  if (!(error <= worst) && worst == worst) worst = error;
}

static int compare(int batch, int heads, int queries, int keys, int width, bool masked,
                   int threads) {
  const auto fill = [](size_t n, float magnitude) {
    std::vector<bf16_t> x(n);
    for (auto& value : x) value = to_bf16(magnitude * draw());
    return x;
  };
  const size_t step = size_t(heads) * size_t(width);
  // Masked cases are sharp as well: maxima that grow from block to block.
  auto q = fill(size_t(batch) * size_t(queries) * step, masked ? 4.0f : 1.0f);
  auto k = fill(size_t(batch) * size_t(keys) * step, 1.0f), v = fill(k.size(), 1.0f);
  std::vector<bf16_t> out(q.size());
  std::vector<uint8_t> valid(size_t(batch) * size_t(keys));
  for (auto& one : valid) one = !masked || draw() > 0;
  std::vector<float> lse(size_t(batch) * size_t(heads) * size_t(queries));
  Attention args;
  const auto rows = [&](std::vector<bf16_t>& x, int tokens) {
    return HeadRows{x.data(), int64_t(size_t(tokens) * step), int64_t(step), width};
  };
  args.segments[0].q = rows(q, queries);
  args.segments[0].out = rows(out, queries);
  args.segments[0].k = rows(k, keys);
  args.segments[0].v = rows(v, keys);
  args.segments[0].queries = queries;
  args.segments[0].keys = keys;
  args.valid = masked ? valid.data() : nullptr;
  args.lse = threads == 1 ? lse.data() : nullptr;
  args.batch = batch;
  args.heads = heads;
  args.width = width;
  args.scale = 1 / std::sqrt(double(width));
  args.dtype = DType::bf16;
  args.threads = threads;
  Workspace workspace;
  args.workspace = &workspace;
  FASTDIFF_ISA::attention_kernel(args);

  double worst = 0, worst_lse = 0;
  std::vector<double> weight(size_t(keys), 0.0);
  for (int b = 0; b < batch; ++b)
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < queries; ++i) {
        const auto place = [&](int token, int tokens) {
          return (size_t(b) * size_t(tokens) + size_t(token)) * step + size_t(h) * size_t(width);
        };
        double total = 0;
        for (int j = 0; j < keys; ++j) {
          double score = 0;
          for (int d = 0; d < width; ++d)
            score += double(to_float(q[place(i, queries) + size_t(d)])) *
                     double(to_float(k[place(j, keys) + size_t(d)]));
          const bool counts = valid[size_t(b) * size_t(keys) + size_t(j)];
          weight[size_t(j)] = counts ? std::exp(score * args.scale) : 0.0;
          total += weight[size_t(j)];
        }
        for (int d = 0; d < width; ++d) {
          double right = 0;
          for (int j = 0; j < keys; ++j)
            right += weight[size_t(j)] * double(to_float(v[place(j, keys) + size_t(d)]));
          right = total > 0 ? right / total : 0;
          const double mine = to_float(out[place(i, queries) + size_t(d)]);
          raise_to(worst, std::fabs(mine - right));
        }
        const double right = std::log(total);
        const size_t at = (size_t(b) * size_t(heads) + size_t(h)) * size_t(queries) + size_t(i);
        if (args.lse && total > 0) raise_to(worst_lse, std::fabs(lse[at] - right));
      }
  // |v| <= 2: rounding the weights costs at most 2^-8 of the distance of v and the result, below 4;
  // rounding the result another 2^-8. Scores are below 256: lse is as exact as a float that large.
  const bool fine = worst < 5 * 0x1p-8 && worst_lse < 0x1p-15;
  if (!fine)
    std::printf("%dx%dx%dx%d, %d keys%s: out off by %g, lse by %g\n", batch, queries, heads, width,
                keys, masked ? " masked" : "", worst, worst_lse);
  return fine ? 0 : 1;
}

int main() {
  int wrong = 0, count = 0;
  // Widths, queries and keys that fill tiles and vectors, and that miss them.
  for (const int width : {1, 3, 8, 16, 24, 33, 40, 64, 72, 80, 88, 136, 160, 256})
    for (const int queries : {1, 17, 33, 50, 64})
      for (const int keys : {1, 15, 67, 77, 95})
        for (const bool masked : {false, true}) {
          wrong += compare(1, 1, queries, keys, width, masked, 1);
          ++count;
        }
  wrong += compare(2, 3, 130, 500, 40, false, 1);
  wrong += compare(2, 3, 130, 500, 40, true, 3);
  std::printf("%d cases, %d wrong\n", count + 2, wrong);
  return wrong ? 1 : 0;
}
