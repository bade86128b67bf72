// y = act(((x + add - mean) * rstd * weight + bias) * (1 + scale) + shift), act = SiLU or none, with the
// mean and the (biased) variance of each group of channels over all its pixels.
//
//   x, out   [batch, channels, hw] or, channels last, [batch, hw, channels]; fp32, fp16 or bf16
//   weight, bias [channels]; add, scale, shift [batch, channels] (strided batch); each may be absent
//
// x is read twice, out written once. Statistics: every group gets a centre, the mean of a few samples,
// and one pass sums x - centre and its square, in fp32 lanes of at most a few hundred terms that are
// gathered in double. Were the true mean further than one standard deviation from the centre, the
// subtraction of squares would lose digits: then the pass is repeated with the mean as the centre.
// Everything per channel is folded into y = act((x - centre) * slope + offset) before the second pass;
// x - centre comes first because it is exact where x is large and its variance small.
//
// Work is cut into pieces that stay in one core's cache between the two passes (a group; channels last,
// some groups of one image). Where there are too few of them for the threads, each pass is a parallel
// loop of its own over segments of the groups or rows of pixels.
#include "../group_norm_silu.h"

#include <cmath>
#include <new>

#include "../parallel.h"
#include "../simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t kMaxRun = 256 * kLanes;  // elements summed in fp32 before they go to double
constexpr int64_t kMaxPixels = 64;         // the same for one channel, channels last
constexpr int64_t kMinRow = 256;           // bytes of a pixel worth reading on their own
constexpr int64_t kParallelGrain = 16384;  // elements that repay handing work to another thread
#if defined(__AVX512F__)
constexpr int kStrip = 8;  // vectors of channels whose sums and centres fit the registers
#else
constexpr int kStrip = 4;
#endif

FASTDIFF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTDIFF_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTDIFF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory for the call; aligned to cache lines. std::vector would leave symbols compiled for this
// instruction set where the linker can pick them for every CPU.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(::operator new(size_t(count) * sizeof(T) + 64, std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// Sums over x - centre.
struct Sums {
  double sum = 0, squares = 0;
};

struct Moments {
  double mean, rstd;
};

// y = act((x - centre) * slope + offset), per channel.
struct Affine {
  float *centre, *slope, *offset;
};

template <class T>
FASTDIFF_INLINE void widen_all(float* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_first(to + i, load_first(from + i, int(n - i)), int(n - i));
}

// Elements [begin, begin + n) of a per-channel argument as floats.
void read_channels(float* to, ChannelVector from, DType dtype, int64_t image, int64_t begin,
                   int64_t n) {
  const int64_t at = image * from.stride + begin;
  switch (dtype) {
    case DType::f16: return widen_all(to, static_cast<const f16_t*>(from.data) + at, n);
    case DType::bf16: return widen_all(to, static_cast<const bf16_t*>(from.data) + at, n);
    default: return widen_all(to, static_cast<const float*>(from.data) + at, n);
  }
}

void fill(float* to, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

// centre[c] = group_centre - add[c] for `groups` groups from channel `begin` of `image` on. add goes
// into the centres instead of into x. Returned in `error`, per group: the sum over its channels of
// what rounding the centres took away.
void centre_channels(const GroupNormSilu& args, int64_t image, int64_t begin, int64_t groups,
                     const float* group_centre, float* centre, double* error) {
  const int64_t width = args.channels / args.groups;
  if (args.add.data) read_channels(centre, args.add, args.mod_dtype, image, begin, groups * width);
  for (int64_t g = 0; g < groups; ++g, centre += width) {
    error[g] = 0;
    if (!args.add.data) {
      fill(centre, group_centre[g], width);
      continue;
    }
    for (int64_t c = 0; c < width; ++c) {
      const double exact = double(group_centre[g]) - double(centre[c]);
      centre[c] = float(exact);
      error[g] += exact - double(centre[c]);
    }
  }
}

// Everything per channel for `groups` groups from channel `begin` of `image` on.
void fold_channels(const GroupNormSilu& args, int64_t image, int64_t begin, int64_t groups,
                   const Moments* moments, Affine to) {
  constexpr int64_t kPiece = 256;
  alignas(64) float add[kPiece], weight[kPiece], bias[kPiece], scale[kPiece], shift[kPiece];
  const int64_t width = args.channels / args.groups;
  for (int64_t g = 0; g < groups; ++g) {
    const double mean = moments[g].mean;
    const float rstd = float(moments[g].rstd);
    for (int64_t at = 0; at < width; at += kPiece) {
      const int64_t n = smaller(kPiece, width - at), c0 = g * width + at;
      float *centre = to.centre + c0, *slope = to.slope + c0, *offset = to.offset + c0;
      const auto read = [&](float* into, ChannelVector from, DType dtype, float missing) {
        if (from.data) return read_channels(into, from, dtype, image, begin + c0, n);
        fill(into, missing, n);
      };
      read(weight, args.weight, args.param_dtype, 1.0f);
      read(bias, args.bias, args.param_dtype, 0.0f);
      if (args.scale.data) {
        read(scale, args.scale, args.mod_dtype, 0.0f);
        for (int64_t c = 0; c < n; ++c) {
          weight[c] *= 1.0f + scale[c];
          bias[c] *= 1.0f + scale[c];
        }
      }
      if (args.shift.data) {
        read(shift, args.shift, args.mod_dtype, 0.0f);
        for (int64_t c = 0; c < n; ++c) bias[c] += shift[c];
      }
      if (args.add.data) {
        read(add, args.add, args.mod_dtype, 0.0f);
        for (int64_t c = 0; c < n; ++c) {
          const double exact = mean - double(add[c]);
          centre[c] = float(exact);
          slope[c] = weight[c] * rstd;
          offset[c] = bias[c] - slope[c] * float(exact - double(centre[c]));
        }
      } else {
        const float rounded = float(mean), rest = float(mean - double(rounded));
        for (int64_t c = 0; c < n; ++c) {
          centre[c] = rounded;
          slope[c] = weight[c] * rstd;
          offset[c] = bias[c] - slope[c] * rest;
        }
      }
    }
  }
}

// The mean and 1 / standard deviation from sums over `count` elements; false when the centre was too
// far from the mean, which is then the centre to use instead.
bool finish(Sums sums, double centre_error, int64_t count, double eps, float* centre, Moments* to) {
  const double n = double(count);
  const double sum = sums.sum - centre_error;
  const double distance = sum / n;
  const double mean = double(*centre) + distance;
  double variance = sums.squares / n - distance * distance;
  const bool good = !(distance * distance > variance);
  if (variance < 0) variance = 0;
  to->mean = mean;
  to->rstd = 1.0 / std::sqrt(variance + eps);
  *centre = float(mean);
  return good;
}

FASTDIFF_INLINE void add_lanes(vfloat v, double* to) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) to[i] += double(lanes[i]);
}

struct PairSums {
  vfloat sum, squares;
  FASTDIFF_METHOD PairSums() : sum(splat(0.0f)), squares(splat(0.0f)) {}
  FASTDIFF_METHOD void take(vfloat d) {
    sum = sum + d;
    squares = fma(d, d, squares);
  }
  // Four vectors, added to each other first: a quarter of the roundings at the size of the sum.
  template <class T>
  FASTDIFF_METHOD void take4(const T* x, int64_t step, vfloat centre) {
    const vfloat a = load(x) - centre, b = load(x + step) - centre;
    const vfloat c = load(x + 2 * step) - centre, d = load(x + 3 * step) - centre;
    sum = sum + ((a + b) + (c + d));
    squares = squares + fma(d, d, fma(c, c, fma(b, b, a * a)));
  }
};

template <class T, bool kSilu, int N>
FASTDIFF_INLINE void activate(vfloat (&y)[N]) {
  if (kSilu) silu<T>(y);
}

// --- NCHW: a group is one run of memory, a channel one run of hw elements -------------------------

struct RunSums {
  PairSums way[2];  // two, so that one addition does not wait for the one before
  int64_t terms = 0;
  double lane_sum[kLanes] = {}, lane_squares[kLanes] = {};

  FASTDIFF_METHOD void flush() {
    add_lanes(way[0].sum + way[1].sum, lane_sum);
    add_lanes(way[0].squares + way[1].squares, lane_squares);
    way[0] = way[1] = PairSums();
    terms = 0;
  }
  // n <= kMaxRun
  template <class T>
  FASTDIFF_METHOD void run(const T* x, int64_t n, float centre) {
    if (terms + n > kMaxRun) flush();
    terms += n;
    const vfloat k = splat(centre);
    int64_t i = 0;
    for (; i + 8 * kLanes <= n; i += 8 * kLanes) {
      way[0].take4(x + i, kLanes, k);
      way[1].take4(x + i + 4 * kLanes, kLanes, k);
    }
    if (i + 4 * kLanes <= n) {
      way[0].take4(x + i, kLanes, k);
      i += 4 * kLanes;
    }
    for (; i + kLanes <= n; i += kLanes) way[1].take(load(x + i) - k);
    if (i < n) {
      const int rest = int(n - i);
      way[1].take(keep_first(load_first(x + i, rest) - k, rest));
    }
  }
  FASTDIFF_METHOD Sums total() {
    flush();
    Sums sums;
    for (int i = 0; i < kLanes; ++i) {
      sums.sum += lane_sum[i];
      sums.squares += lane_squares[i];
    }
    return sums;
  }
};

// Sums over elements [begin, end) of the group that starts at x; centre per channel when there is an
// added term, else one.
template <class T>
Sums run_sums(const T* x, int64_t begin, int64_t end, int64_t hw, const float* centre, bool per_channel) {
  RunSums sums;
  for (int64_t at = begin; at < end;) {
    const int64_t channel = per_channel ? at / hw : 0;
    int64_t stop = smaller(end, at + kMaxRun);
    if (per_channel) stop = smaller(stop, (channel + 1) * hw);
    sums.run(x + at, stop - at, centre[channel]);
    at = stop;
  }
  return sums.total();
}

template <class T, bool kSilu>
void run_apply(const T* x, T* out, int64_t begin, int64_t end, int64_t hw, Affine affine) {
  for (int64_t at = begin; at < end;) {
    const int64_t channel = at / hw, stop = smaller(end, (channel + 1) * hw);
    const vfloat centre = splat(affine.centre[channel]), slope = splat(affine.slope[channel]),
                 offset = splat(affine.offset[channel]);
    for (; at + kBlock * kLanes <= stop; at += kBlock * kLanes) {
      vfloat y[kBlock];
      for (int i = 0; i < kBlock; ++i)
        y[i] = fma(load(x + at + i * kLanes) - centre, slope, offset);
      activate<T, kSilu>(y);
      store_block(out + at, y);
    }
    for (; at < stop; at += kLanes) {
      const int n = int(smaller(kLanes, stop - at));
      vfloat y[1] = {fma(load_first(x + at, n) - centre, slope, offset)};
      activate<T, kSilu>(y);
      store_first(out + at, y[0], n);
    }
    at = stop;
  }
}

// A rough mean of x + add over one group, from eight places.
template <class T>
float sample_run(const GroupNormSilu& args, const T* x, int64_t image, int64_t channel, int64_t n) {
  constexpr int64_t kPlaces = 8;
  vfloat sum = splat(0.0f);
  float added = 0.0f, count = 0.0f;
  for (int64_t i = 0; i < kPlaces; ++i) {
    const int64_t at = n * i / kPlaces;
    const int take = int(smaller(kLanes, n - at));
    sum = sum + load_first(x + at, take);
    count += float(take);
    if (args.add.data) {
      alignas(64) float add[1];
      read_channels(add, args.add, args.mod_dtype, image, channel + at / args.hw, 1);
      added += add[0] * float(take);
    }
  }
  return (sum_lanes(sum) + added) / count;
}

template <class T>
struct Rows {
  const GroupNormSilu& args;
  const int64_t width, length;  // channels and elements of a group
  Buffer<float> channel_data;
  Affine affine;  // of all images and channels

  explicit Rows(const GroupNormSilu& a)
      : args(a),
        width(a.channels / a.groups),
        length(width * a.hw),
        channel_data(3 * a.batch * a.channels) {
    const int64_t n = a.batch * a.channels;
    affine = {channel_data.data, channel_data.data + n, channel_data.data + 2 * n};
  }

  const T* input(int64_t task) const { return static_cast<const T*>(args.x) + task * length; }
  T* output(int64_t task) const { return static_cast<T*>(args.out) + task * length; }
  int64_t image(int64_t task) const { return task / args.groups; }
  int64_t channel(int64_t task) const { return task % args.groups * width; }
  Affine of(int64_t task) const {
    const int64_t at = task * width;
    return {affine.centre + at, affine.slope + at, affine.offset + at};
  }

  void centre(int64_t task, const float* group_centre, double* error) const {
    centre_channels(args, image(task), channel(task), 1, group_centre, of(task).centre, error);
  }
  void fold(int64_t task, const Moments* moments) const {
    fold_channels(args, image(task), channel(task), 1, moments, of(task));
  }
  Sums sums(int64_t task, int64_t begin, int64_t end) const {
    return run_sums(input(task), begin, end, args.hw, of(task).centre, args.add.data != nullptr);
  }
  void apply(int64_t task, int64_t begin, int64_t end) const {
    if (args.silu)
      run_apply<T, true>(input(task), output(task), begin, end, args.hw, of(task));
    else
      run_apply<T, false>(input(task), output(task), begin, end, args.hw, of(task));
  }

  void whole_group(int64_t task) const {
    float middle = sample_run(args, input(task), image(task), channel(task), length);
    Moments moments;
    for (int attempt = 0; attempt < 2; ++attempt) {
      double error;
      centre(task, &middle, &error);
      const Sums found = sums(task, 0, length);
      if (finish(found, error * double(args.hw), length, args.eps, &middle, &moments)) break;
    }
    fold(task, &moments);
    apply(task, 0, length);
  }

  void split_groups(int64_t tasks) const {
    const int64_t step = 16 * kLanes;
    const int64_t wanted = smaller(ceil_div(4 * args.threads, tasks), ceil_div(length, kParallelGrain));
    const int64_t segment = ceil_div(ceil_div(length, wanted), step) * step;
    const int64_t segments = ceil_div(length, segment);
    Buffer<Sums> partial(tasks * segments);
    Buffer<float> middle(tasks);
    Buffer<double> error(tasks);
    Buffer<Moments> moments(tasks);
    for (int64_t t = 0; t < tasks; ++t)
      middle.data[t] = sample_run(args, input(t), image(t), channel(t), length);
    bool good = false;
    for (int attempt = 0; attempt < 2 && !good; ++attempt) {
      for (int64_t t = 0; t < tasks; ++t) centre(t, middle.data + t, error.data + t);
      parallel_for(tasks * segments, 1, args.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t t = i / segments, from = i % segments * segment;
          partial.data[i] = sums(t, from, smaller(from + segment, length));
        }
      });
      good = true;
      for (int64_t t = 0; t < tasks; ++t) {
        Sums all;
        for (int64_t s = 0; s < segments; ++s) {
          all.sum += partial.data[t * segments + s].sum;
          all.squares += partial.data[t * segments + s].squares;
        }
        good &= finish(all, error.data[t] * double(args.hw), length, args.eps, middle.data + t,
                       moments.data + t);
      }
    }
    for (int64_t t = 0; t < tasks; ++t) fold(t, moments.data + t);
    parallel_for(tasks * segments, 1, args.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = i % segments * segment;
        apply(i / segments, from, smaller(from + segment, length));
      }
    });
  }

  void all() const {
    const int64_t tasks = args.batch * args.groups;
    const bool enough = tasks % args.threads == 0 || tasks >= 8 * args.threads;
    if (enough || tasks * length <= kParallelGrain) {
      parallel_for(tasks, ceil_div(kParallelGrain, length), args.threads,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t t = begin; t < end; ++t) whole_group(t);
                   });
    } else {
      split_groups(tasks);
    }
  }
};

// --- Channels last: a pixel is a row of channels ---------------------------------------------------

// Adds, for kVectors vectors of channels, the sums over `pixels` <= kMaxPixels pixels.
template <int kVectors, class T>
FASTDIFF_INLINE void strip_sums(const T* x, int64_t pixels, int64_t stride, const float* centre,
                                double* sum, double* squares) {
  vfloat k[kVectors];
  PairSums sums[kVectors];
  for (int v = 0; v < kVectors; ++v) k[v] = load(centre + v * kLanes);
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4, x += 4 * stride)
    for (int v = 0; v < kVectors; ++v) sums[v].take4(x + v * kLanes, stride, k[v]);
  for (; p < pixels; ++p, x += stride)
    for (int v = 0; v < kVectors; ++v) sums[v].take(load(x + v * kLanes) - k[v]);
  for (int v = 0; v < kVectors; ++v) {
    add_lanes(sums[v].sum, sum + v * kLanes);
    add_lanes(sums[v].squares, squares + v * kLanes);
  }
}

template <class T>
void tail_sums(const T* x, int64_t pixels, int64_t stride, int n, const float* centre, double* sum,
               double* squares) {
  const vfloat k = load_first(centre, n);
  PairSums sums;
  for (int64_t p = 0; p < pixels; ++p, x += stride) sums.take(load_first(x, n) - k);
  alignas(64) float lane_sum[kLanes], lane_squares[kLanes];
  store(lane_sum, sums.sum);
  store(lane_squares, sums.squares);
  for (int c = 0; c < kLanes && c < n; ++c) {
    sum[c] += double(lane_sum[c]);
    squares[c] += double(lane_squares[c]);
  }
}

// Per channel: sums over all `pixels` of x - centre.
template <class T>
void column_sums(const T* x, int64_t pixels, int64_t stride, int64_t channels, const float* centre,
                 double* sum, double* squares) {
  for (int64_t c = 0; c < channels; ++c) sum[c] = squares[c] = 0;
  for (int64_t p = 0; p < pixels; p += kMaxPixels, x += kMaxPixels * stride) {
    const int64_t n = smaller(kMaxPixels, pixels - p);
    int64_t c = 0;
    for (; c + kStrip * kLanes <= channels; c += kStrip * kLanes)
      strip_sums<kStrip>(x + c, n, stride, centre + c, sum + c, squares + c);
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes)
      strip_sums<2>(x + c, n, stride, centre + c, sum + c, squares + c);
    for (; c + kLanes <= channels; c += kLanes)
      strip_sums<1>(x + c, n, stride, centre + c, sum + c, squares + c);
    if (c < channels)
      tail_sums(x + c, n, stride, int(channels - c), centre + c, sum + c, squares + c);
  }
}

template <class T, bool kSilu>
void column_apply(const T* x, T* out, int64_t pixels, int64_t stride, int64_t channels, Affine affine) {
  for (int64_t p = 0; p < pixels; ++p, x += stride, out += stride) {
    int64_t c = 0;
    for (; c + kBlock * kLanes <= channels; c += kBlock * kLanes) {
      vfloat y[kBlock];
      for (int i = 0; i < kBlock; ++i) {
        const int64_t at = c + i * kLanes;
        y[i] = fma(load(x + at) - load(affine.centre + at), load(affine.slope + at),
                   load(affine.offset + at));
      }
      activate<T, kSilu>(y);
      store_block(out + c, y);
    }
    for (; c < channels; c += kLanes) {
      const int n = int(smaller(kLanes, channels - c));
      vfloat y[1] = {fma(load_first(x + c, n) - load_first(affine.centre + c, n),
                         load_first(affine.slope + c, n), load_first(affine.offset + c, n))};
      activate<T, kSilu>(y);
      store_first(out + c, y[0], n);
    }
  }
}

template <class T>
struct Columns {
  const GroupNormSilu& args;
  const int64_t width;  // channels of a group
  Buffer<float> channel_data;
  Buffer<double> channel_sums, group_error;
  Buffer<float> group_middle;
  Buffer<Moments> group_moments;
  Affine affine;  // of all images and channels

  explicit Columns(const GroupNormSilu& a)
      : args(a),
        width(a.channels / a.groups),
        channel_data(3 * a.batch * a.channels),
        channel_sums(2 * a.batch * a.channels),
        group_error(a.batch * a.groups),
        group_middle(a.batch * a.groups),
        group_moments(a.batch * a.groups) {
    const int64_t n = a.batch * a.channels;
    affine = {channel_data.data, channel_data.data + n, channel_data.data + 2 * n};
  }

  const T* input(int64_t image, int64_t pixel, int64_t channel) const {
    return static_cast<const T*>(args.x) + (image * args.hw + pixel) * args.channels + channel;
  }
  T* output(int64_t image, int64_t pixel, int64_t channel) const {
    return static_cast<T*>(args.out) + (image * args.hw + pixel) * args.channels + channel;
  }
  Affine of(int64_t image, int64_t channel) const {
    const int64_t at = image * args.channels + channel;
    return {affine.centre + at, affine.slope + at, affine.offset + at};
  }

  // A rough mean of x + add of each group, from four pixels.
  void sample(int64_t image, int64_t group, int64_t groups) const {
    const int64_t channel = group * width, n = groups * width;
    const int64_t places = smaller(4, args.hw);
    float* sum = of(image, channel).centre;
    if (args.add.data)
      read_channels(sum, args.add, args.mod_dtype, image, channel, n);
    else
      fill(sum, 0.0f, n);
    const float share = 1.0f / float(places);
    for (int64_t i = 0; i < places; ++i) {
      const T* x = input(image, args.hw * i / places, channel);
      int64_t c = 0;
      for (; c + kLanes <= n; c += kLanes)
        store(sum + c, fma(load(x + c), splat(share), load(sum + c)));
      if (c < n) {
        const int rest = int(n - c);
        store_first(sum + c, fma(load_first(x + c, rest), splat(share), load_first(sum + c, rest)), rest);
      }
    }
    float* middle = group_middle.data + image * args.groups + group;
    for (int64_t g = 0; g < groups; ++g) {
      float all = 0;
      for (int64_t c = 0; c < width; ++c) all += sum[g * width + c];
      middle[g] = all / float(width);
    }
  }

  void centre(int64_t image, int64_t group, int64_t groups) const {
    const int64_t at = image * args.groups + group;
    centre_channels(args, image, group * width, groups, group_middle.data + at,
                    of(image, group * width).centre, group_error.data + at);
  }
  void fold(int64_t image, int64_t group, int64_t groups) const {
    fold_channels(args, image, group * width, groups, group_moments.data + image * args.groups + group,
                  of(image, group * width));
  }
  // Sums over the channels of each group.
  void gather(const double* sum, const double* squares, int64_t groups, Sums* to) const {
    for (int64_t g = 0; g < groups; ++g, sum += width, squares += width) {
      for (int64_t c = 0; c < width; ++c) {
        to[g].sum += sum[c];
        to[g].squares += squares[c];
      }
    }
  }
  bool finish_group(int64_t image, int64_t group, Sums sums) const {
    const int64_t at = image * args.groups + group;
    return finish(sums, group_error.data[at] * double(args.hw), width * args.hw, args.eps,
                  group_middle.data + at, group_moments.data + at);
  }
  void apply(int64_t image, int64_t pixel, int64_t pixels, int64_t channel, int64_t channels) const {
    const T* x = input(image, pixel, channel);
    T* out = output(image, pixel, channel);
    if (args.silu)
      column_apply<T, true>(x, out, pixels, args.channels, channels, of(image, channel));
    else
      column_apply<T, false>(x, out, pixels, args.channels, channels, of(image, channel));
  }

  void whole_groups(int64_t image, int64_t group, int64_t groups) const {
    const int64_t channel = group * width, channels = groups * width;
    sample(image, group, groups);
    double* sum = channel_sums.data + 2 * (image * args.channels + channel);
    double* squares = sum + channels;
    bool good = false;
    for (int attempt = 0; attempt < 2 && !good; ++attempt) {
      centre(image, group, groups);
      column_sums(input(image, 0, channel), args.hw, args.channels, channels,
                  of(image, channel).centre, sum, squares);
      good = true;
      for (int64_t g = 0; g < groups; ++g) {
        Sums all;
        gather(sum + g * width, squares + g * width, 1, &all);
        good &= finish_group(image, group + g, all);
      }
    }
    fold(image, group, groups);
    apply(image, 0, args.hw, channel, channels);
  }

  // Pixels of one image per piece.
  void split_pixels(int64_t pixels) const {
    const int64_t channels = args.channels, groups = args.groups;
    const int64_t pieces = ceil_div(args.hw, pixels), tasks = args.batch * pieces;
    Buffer<Sums> partial(tasks * groups);
    parallel_for(args.batch, 1, args.threads, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) sample(image, 0, groups);
    });
    Buffer<double> sums(tasks * 2 * channels);
    bool good = false;
    for (int attempt = 0; attempt < 2 && !good; ++attempt) {
      for (int64_t image = 0; image < args.batch; ++image) centre(image, 0, groups);
      parallel_for(tasks, 1, args.threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t image = t / pieces, pixel = t % pieces * pixels;
          double* sum = sums.data + t * 2 * channels;
          column_sums(input(image, pixel, 0), smaller(pixels, args.hw - pixel), channels, channels,
                      of(image, 0).centre, sum, sum + channels);
          for (int64_t g = 0; g < groups; ++g) partial.data[t * groups + g] = Sums();
          gather(sum, sum + channels, groups, partial.data + t * groups);
        }
      });
      good = true;
      for (int64_t image = 0; image < args.batch; ++image) {
        for (int64_t g = 0; g < groups; ++g) {
          Sums all;
          for (int64_t piece = 0; piece < pieces; ++piece) {
            const Sums& part = partial.data[(image * pieces + piece) * groups + g];
            all.sum += part.sum;
            all.squares += part.squares;
          }
          good &= finish_group(image, g, all);
        }
      }
    }
    for (int64_t image = 0; image < args.batch; ++image) fold(image, 0, groups);
    parallel_for(tasks, 1, args.threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t pixel = t % pieces * pixels;
        apply(t / pieces, pixel, smaller(pixels, args.hw - pixel), 0, channels);
      }
    });
  }

  void all() const {
    const int64_t elements = args.batch * args.hw * args.channels;
    int64_t blocks = 1;  // per image
    while (args.batch * blocks % args.threads) ++blocks;
    const int64_t row = args.channels / blocks * int64_t(sizeof(T));
    if (blocks > args.groups || (blocks > 1 && row < kMinRow)) return split_pixels(kMaxPixels);
    const int64_t per = ceil_div(args.groups, blocks);
    blocks = ceil_div(args.groups, per);
    parallel_for(args.batch * blocks, ceil_div(kParallelGrain * args.batch * blocks, elements),
                 args.threads, [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t) {
                     const int64_t group = t % blocks * per;
                     whole_groups(t / blocks, group, smaller(per, args.groups - group));
                   }
                 });
  }
};

template <class T>
void dispatch(const GroupNormSilu& args) {
  // With one pixel both layouts are the same memory, and channels last has vectors to work with.
  if (args.channels_last || args.hw == 1)
    Columns<T>(args).all();
  else
    Rows<T>(args).all();
}

}  // namespace

void group_norm_silu(const GroupNormSilu& given) {
  GroupNormSilu args = given;
  if (args.threads < 1) args.threads = 1;
  switch (args.x_dtype) {
    case DType::f16: return dispatch<f16_t>(args);
    case DType::bf16: return dispatch<bf16_t>(args);
    default: return dispatch<float>(args);
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
