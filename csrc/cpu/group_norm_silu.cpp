// y = act(((x + add - mean) * rstd * weight + bias) * (1 + scale) + shift), act = SiLU or none,
// with the mean and the (biased) variance of each group of channels over all its pixels.
//
//   x, out   [batch, channels, hw] or, channels last, [batch, hw, channels]; fp32, fp16 or bf16
//   weight, bias [channels]; add, scale, shift [batch, channels] (strided batch); each may be
//   absent
//   skip     like x; the last skip_channels of `channels` are its, x has the others
//   residual, total  like x; x + residual is written to total, and total is what is normalised
//
// x is read twice, out written once; with a residual the first pass writes total some KB at a time
// and sums them up, the second reads total. Statistics: every group gets a centre, the mean of a few
// samples, and one pass sums x - centre and its square, in fp32 lanes of at most a few hundred
// terms that are gathered in double. Were the true mean further than one standard deviation from
// the centre, the subtraction of squares would lose digits: then the pass is repeated with the mean
// as the centre. Everything per channel is folded into y = act((x - centre) * slope + offset)
// before the second pass; x - centre comes first because it is exact where x is large and its
// variance small.
//
// One thread takes a group (channels last, an image) through both passes, while it is in the cache.
// Where that would leave threads without work, each pass is a parallel loop of its own over
// segments of groups or rows of pixels. Some channels of all pixels as the unit, channels last,
// would be smaller, but was slower (1.1 to 4 times at 64x64): rows are then read in pieces, each on
// another page.
#include "../group_norm_silu.h"

#include "../parallel.h"
#include "../simd.h"
#include "group_parts.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t kMaxRun = 256 * kLanes;  // elements summed in fp32 before they go to double
constexpr int64_t kMaxPixels = 64;         // the same for one channel, channels last
constexpr int64_t kParallelGrain = 16384;  // elements that repay handing work to another thread
#if defined(__AVX512F__)
constexpr int kStrip = 8;  // vectors of channels whose sums and centres fit the registers
#else
constexpr int kStrip = 4;
#endif

template <class T, bool kSilu, int N>
FASTDIFF_INLINE void activate(vfloat (&y)[N]) {
  if (kSilu) silu<T>(y);
}

// NCHW, from here on: a group is one run of memory, a channel one run of hw elements.

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

// Sums over elements [begin, end) of a group; centre per channel when there is an added term, else
// one. `addition` is what writes them first.
template <class T>
Sums run_sums(const GroupRun<T>& x, const Addition<T>& addition, int64_t begin, int64_t end,
              int64_t hw, const float* centre, bool per_channel) {
  RunSums sums;
  for (int64_t at = begin; at < end;) {
    const int64_t channel = per_channel ? at / hw : 0;
    int64_t stop = smaller(x.stop(at, end), at + kMaxRun);
    if (per_channel) stop = smaller(stop, (channel + 1) * hw);
    addition.write(at, stop - at);
    sums.run(x.from(at), stop - at, centre[channel]);
    at = stop;
  }
  return sums.total();
}

template <class T, bool kSilu>
void run_apply(const GroupRun<T>& group, T* out, int64_t begin, int64_t end, int64_t hw,
               Affine affine) {
  for (int64_t at = begin; at < end;) {
    const int64_t channel = at / hw, n = smaller(end, (channel + 1) * hw) - at;
    const T* x = group.from(at);
    T* y_out = out + at;
    const vfloat centre = splat(affine.centre[channel]), slope = splat(affine.slope[channel]),
                 offset = splat(affine.offset[channel]);
    int64_t p = 0;
    for (; p + kBlock * kLanes <= n; p += kBlock * kLanes) {
      vfloat y[kBlock];
      for (int i = 0; i < kBlock; ++i)
        y[i] = fma(load(x + p + i * kLanes) - centre, slope, offset);
      activate<T, kSilu>(y);
      store_block(y_out + p, y);
    }
    for (; p < n; p += kLanes) {
      const int rest = int(smaller(kLanes, n - p));
      vfloat y[1] = {fma(load_first(x + p, rest) - centre, slope, offset)};
      activate<T, kSilu>(y);
      store_first(y_out + p, y[0], rest);
    }
    at += n;
  }
}

// A rough mean of x + add (+ residual, which may be null) over one group, from eight places.
template <class T>
float sample_run(const GroupNormSilu& args, const GroupRun<T>& x, const T* residual, int64_t image,
                 int64_t channel, int64_t n) {
  constexpr int64_t kPlaces = 8;
  vfloat sum = splat(0.0f);
  float added = 0.0f, count = 0.0f;
  for (int64_t i = 0; i < kPlaces; ++i) {
    const int64_t at = n * i / kPlaces;
    const int take = int(smaller(kLanes, x.stop(at, n) - at));
    const vfloat v = load_first(x.from(at), take);
    sum = sum + (residual ? round_to<T>(v + load_first(residual + at, take)) : v);
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
  Affine affine;                // of all images and channels

  explicit Rows(const GroupNormSilu& a)
      : args(a), width(a.channels / a.groups), length(width * a.hw) {
    const int64_t n = a.batch * a.channels;
    float* data = a.workspace->take<float>(3 * n);
    affine = {data, data + n, data + 2 * n};
  }

  GroupRun<T> input(int64_t task, const void* x) const {
    const int64_t of_x = args.channels - args.skip_channels, first = channel(task);
    const int64_t inside = larger(0, smaller(width, of_x - first));  // channels of x
    const int64_t skipped = inside ? 0 : first - of_x;               // of skip, before the group
    const T* data = static_cast<const T*>(x);
    const T* skip = static_cast<const T*>(args.skip);
    if (inside) data += (image(task) * of_x + first) * args.hw;
    if (inside < width) skip += (image(task) * args.skip_channels + skipped) * args.hw;
    return {data, skip, inside * args.hw};
  }
  GroupRun<T> input(int64_t task) const {
    return input(task, args.residual ? args.total : args.x);
  }
  const T* residual(int64_t task) const {
    return args.residual ? static_cast<const T*>(args.residual) + task * length : nullptr;
  }
  // The first time that a group is read.
  Addition<T> addition(int64_t task, bool first) const {
    if (!args.residual || !first) return {nullptr, nullptr, nullptr};
    const int64_t at = task * length;
    return {static_cast<const T*>(args.x) + at, residual(task), static_cast<T*>(args.total) + at};
  }
  float sample(int64_t task) const {
    return sample_run(args, input(task, args.x), residual(task), image(task), channel(task),
                      length);
  }
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
  Sums sums(int64_t task, int64_t begin, int64_t end, bool first) const {
    return run_sums(input(task), addition(task, first), begin, end, args.hw, of(task).centre,
                    args.add.data != nullptr);
  }
  void apply(int64_t task, int64_t begin, int64_t end) const {
    if (args.silu)
      run_apply<T, true>(input(task), output(task), begin, end, args.hw, of(task));
    else
      run_apply<T, false>(input(task), output(task), begin, end, args.hw, of(task));
  }

  void whole_group(int64_t task) const {
    float middle = sample(task);
    Moments moments;
    for (int attempt = 0; attempt < 2; ++attempt) {
      double error;
      centre(task, &middle, &error);
      const Sums found = sums(task, 0, length, attempt == 0);
      if (finish(found, error * double(args.hw), length, args.eps, &middle, &moments)) break;
    }
    fold(task, &moments);
    apply(task, 0, length);
  }

  void split_groups(int64_t tasks) const {
    const int64_t step = 16 * kLanes;
    const int64_t wanted =
        smaller(ceil_div(4 * args.threads, tasks), ceil_div(length, kParallelGrain));
    const int64_t segment = ceil_div(ceil_div(length, wanted), step) * step;
    const int64_t segments = ceil_div(length, segment);
    Sums* partial = args.workspace->take<Sums>(tasks * segments);
    float* middle = args.workspace->take<float>(tasks);
    double* error = args.workspace->take<double>(tasks);
    Moments* moments = args.workspace->take<Moments>(tasks);
    for (int64_t t = 0; t < tasks; ++t) middle[t] = sample(t);
    bool good = false;
    for (int attempt = 0; attempt < 2 && !good; ++attempt) {
      for (int64_t t = 0; t < tasks; ++t) centre(t, middle + t, error + t);
      parallel_for(tasks * segments, 1, args.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t t = i / segments, from = i % segments * segment;
          partial[i] = sums(t, from, smaller(from + segment, length), attempt == 0);
        }
      });
      good = true;
      for (int64_t t = 0; t < tasks; ++t) {
        Sums all;
        for (int64_t s = 0; s < segments; ++s) {
          all.sum += partial[t * segments + s].sum;
          all.squares += partial[t * segments + s].squares;
        }
        good &= finish(all, error[t] * double(args.hw), length, args.eps, middle + t, moments + t);
      }
    }
    for (int64_t t = 0; t < tasks; ++t) fold(t, moments + t);
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

// Channels last, from here on: a pixel is a row of channels.

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

// Per channel: sums over all `pixels` of x - centre. `addition` is what writes x first.
template <class T>
void column_sums(const T* x, const Addition<T>& addition, int64_t pixels, int64_t channels,
                 const float* centre, double* sum, double* squares) {
  const int64_t stride = channels;
  for (int64_t c = 0; c < channels; ++c) sum[c] = squares[c] = 0;
  for (int64_t p = 0; p < pixels; p += kMaxPixels, x += kMaxPixels * stride) {
    const int64_t n = smaller(kMaxPixels, pixels - p);
    addition.write(p * stride, n * stride);
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
void column_apply(const T* x, T* out, int64_t pixels, int64_t channels, int64_t out_stride,
                  Affine affine) {
  for (int64_t p = 0; p < pixels; ++p, x += channels, out += out_stride) {
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

// to[channel] += share * row[channel], or of row + residual, which may be null.
template <class T>
void add_row(const ColumnPart<T>& row, const T* residual, vfloat share, float* to) {
  to += row.begin;
  for (int64_t c = 0; c < row.channels; c += kLanes) {
    const int n = int(smaller(kLanes, row.channels - c));
    vfloat v = load_first(row.data + c, n);
    if (residual) v = round_to<T>(v + load_first(residual + c, n));
    store_first(to + c, fma(v, share, load_first(to + c, n)), n);
  }
}

template <class T>
struct Columns {
  const GroupNormSilu& args;
  const int64_t channels, groups, width;  // width: channels of a group
  const int64_t pieces, pixels;           // of one image, and of one piece
  float* const group_centre;
  double *const channel_sums, *const group_error;
  Sums* const partial;  // per piece and group
  Affine affine;        // of all images and channels

  Columns(const GroupNormSilu& a, int64_t pixels_of_piece)
      : args(a),
        channels(a.channels),
        groups(a.groups),
        width(a.channels / a.groups),
        pieces(ceil_div(a.hw, pixels_of_piece)),
        pixels(pixels_of_piece),
        group_centre(a.workspace->take<float>(a.batch * groups)),
        channel_sums(a.workspace->take<double>(2 * a.batch * pieces * channels)),
        group_error(a.workspace->take<double>(a.batch * groups)),
        partial(a.workspace->take<Sums>(a.batch * pieces * groups)) {
    const int64_t n = a.batch * channels;
    float* data = a.workspace->take<float>(3 * n);
    affine = {data, data + n, data + 2 * n};
  }

  int64_t piece_pixels(int64_t piece) const { return smaller(pixels, args.hw - piece * pixels); }
  int64_t pixel(int64_t image, int64_t piece) const { return image * args.hw + piece * pixels; }
  int parts() const { return args.skip ? 2 : 1; }
  // From a pixel of x (or total) or skip on.
  ColumnPart<T> part(int number, const void* x, int64_t at) const {
    const int64_t of_x = channels - args.skip_channels;
    if (number == 0) return {static_cast<const T*>(x) + at * of_x, 0, of_x};
    return {static_cast<const T*>(args.skip) + at * args.skip_channels, of_x, args.skip_channels};
  }
  const void* source() const { return args.residual ? args.total : args.x; }
  Affine of(int64_t image) const {
    const int64_t at = image * channels;
    return {affine.centre + at, affine.slope + at, affine.offset + at};
  }

  // A rough mean of x + add (+ residual) of each group, from four pixels, into group_centre.
  void sample(int64_t image) const {
    const int64_t places = smaller(4, args.hw);
    const vfloat share = splat(1.0f / float(places));
    float* mean = of(image).centre;
    if (args.add.data)
      read_channels(mean, args.add, args.mod_dtype, image, 0, channels);
    else
      fill(mean, 0.0f, channels);
    for (int64_t i = 0; i < places; ++i) {
      const int64_t at = image * args.hw + args.hw * i / places;
      const T* residual = args.residual ? part(0, args.residual, at).data : nullptr;
      for (int number = 0; number < parts(); ++number)
        add_row(part(number, args.x, at), residual, share, mean);
    }
    float* centre = group_centre + image * groups;
    for (int64_t g = 0; g < groups; ++g) {
      float sum = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += mean[c];
      centre[g] = sum / float(width);
    }
  }

  // From group_centre.
  void centre(int64_t image) const {
    centre_channels(args, image, 0, groups, group_centre + image * groups, of(image).centre,
                    group_error + image * groups);
  }

  // first: nothing has been read yet
  void sum_piece(int64_t image, int64_t piece, bool first) const {
    const int64_t at = image * pieces + piece;
    double* sum = channel_sums + 2 * at * channels;
    const double* squares = sum + channels;
    const int64_t from = pixel(image, piece);
    Addition<T> addition = {nullptr, nullptr, nullptr};
    if (args.residual && first)
      addition = {part(0, args.x, from).data, part(0, args.residual, from).data,
                  static_cast<T*>(args.total) + from * channels};
    for (int number = 0; number < parts(); ++number) {
      const ColumnPart<T> x = part(number, source(), from);
      column_sums(x.data, addition, piece_pixels(piece), x.channels, of(image).centre + x.begin,
                  sum + x.begin, sum + channels + x.begin);
    }
    for (int64_t g = 0; g < groups; ++g) {
      Sums all;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        all.sum += sum[c];
        all.squares += squares[c];
      }
      partial[at * groups + g] = all;
    }
  }

  // From the pieces' sums; false when a centre was too far off, and group_centre holds better ones.
  bool finish_and_fold(int64_t image) const {
    bool good = true;
    for (int64_t g = 0; g < groups; ++g) {
      Sums all;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const Sums& part = partial[(image * pieces + piece) * groups + g];
        all.sum += part.sum;
        all.squares += part.squares;
      }
      const int64_t at = image * groups + g;
      Moments moments;
      good &= finish(all, group_error[at] * double(args.hw), width * args.hw, args.eps,
                     group_centre + at, &moments);
      const int64_t channel = image * channels + g * width;
      fold_channels(args, image, g * width, 1, &moments,
                    {affine.centre + channel, affine.slope + channel, affine.offset + channel});
    }
    return good;
  }

  void apply(int64_t image, int64_t piece) const {
    const int64_t from = pixel(image, piece), n = piece_pixels(piece);
    for (int number = 0; number < parts(); ++number) {
      const ColumnPart<T> x = part(number, source(), from);
      T* out = static_cast<T*>(args.out) + from * channels + x.begin;
      const Affine all = of(image);
      const Affine affine_of_x = {all.centre + x.begin, all.slope + x.begin, all.offset + x.begin};
      if (args.silu)
        column_apply<T, true>(x.data, out, n, x.channels, channels, affine_of_x);
      else
        column_apply<T, false>(x.data, out, n, x.channels, channels, affine_of_x);
    }
  }

  void whole_image(int64_t image) const {
    sample(image);
    bool good = false;
    for (int attempt = 0; attempt < 2 && !good; ++attempt) {
      centre(image);
      sum_piece(image, 0, attempt == 0);
      good = finish_and_fold(image);
    }
    apply(image, 0);
  }

  void split_images() const {
    for (int64_t image = 0; image < args.batch; ++image) sample(image);
    bool good = false;
    for (int attempt = 0; attempt < 2 && !good; ++attempt) {
      for (int64_t image = 0; image < args.batch; ++image) centre(image);
      parallel_for(args.batch * pieces, 1, args.threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) sum_piece(t / pieces, t % pieces, attempt == 0);
      });
      good = true;
      for (int64_t image = 0; image < args.batch; ++image) good &= finish_and_fold(image);
    }
    parallel_for(args.batch * pieces, 1, args.threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) apply(t / pieces, t % pieces);
    });
  }

  void all() const {
    if (pieces > 1) return split_images();
    const int64_t grain = ceil_div(kParallelGrain, args.hw * channels);
    parallel_for(args.batch, grain, args.threads, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) whole_image(image);
    });
  }
};

// Pixels of a piece: all of an image where the images keep the threads equally busy (or there is
// little to do), else so many that each thread has as many pieces as the next.
int64_t choose_pixels(const GroupNormSilu& args) {
  int64_t pieces = 1;
  while (args.batch * pieces % args.threads != 0) ++pieces;
  const int64_t shortest = ceil_div(kParallelGrain, args.channels);
  if (args.batch >= 8 * args.threads) return args.hw;
  return smaller(args.hw, larger(shortest, ceil_div(args.hw, pieces)));
}

template <class T>
void dispatch(const GroupNormSilu& args) {
  // With one pixel both layouts are the same memory, and channels last has vectors to work with.
  if (args.channels_last || args.hw == 1)
    Columns<T>(args, choose_pixels(args)).all();
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
