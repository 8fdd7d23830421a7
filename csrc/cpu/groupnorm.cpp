// GroupNorm with weight and bias, and SiLU after it: forward and backward, for both memory layouts.
// The mathematics is in kernels/groupnorm.py, which is also the only caller.
//
// A picture is cut into units: runs of kPositions positions (channels last) or single channels. Each
// unit leaves one value per channel (mean and squared deviations; in backward two sums); these are
// merged in order, so results have the same bits for any number of threads. With at least as many
// pictures as threads a thread takes whole pictures, which its cache may then still hold in the
// second pass; otherwise the threads share the units of one picture after the other. Forward over
// contiguous channels goes group by group instead: one usually fits into the first-level cache, or
// the second.
#include <math.h>
#include <stdlib.h>

#include "groupnorm.h"
#include "vectormath.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

constexpr int64_t kBlock = 1024;  // positions at a time where a channel's positions are contiguous

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

const float* load(const Rows& t, int64_t b, int64_t n, int64_t first, int64_t count,
                  float* buffer) {
  const int64_t offset = b * t.batch_stride + n * t.row_stride + first;
  if (t.dtype == kFloat32) return static_cast<const float*>(t.data) + offset;
  const uint16_t* const from = static_cast<const uint16_t*>(t.data) + offset;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) buffer[i] = from_bf16(from[i]);
  return buffer;
}

float* target(const Rows& t, int64_t b, int64_t n, int64_t first, float* buffer) {
  if (t.dtype != kFloat32) return buffer;
  return static_cast<float*>(t.data) + b * t.batch_stride + n * t.row_stride + first;
}

void store(const Rows& t, int64_t b, int64_t n, int64_t first, int64_t count, const float* part) {
  if (t.dtype == kFloat32) return;
  uint16_t* const to =
      static_cast<uint16_t*>(t.data) + b * t.batch_stride + n * t.row_stride + first;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = to_bf16(part[i]);
}

// Forward reads and writes either type in place: one pass through a buffer of float32 costs as much as
// the statistics do.
ETUDE_INLINE float value(float x) { return x; }
ETUDE_INLINE float value(uint16_t x) { return from_bf16(x); }
ETUDE_INLINE void put(float v, float* to) { *to = v; }
ETUDE_INLINE void put(float v, uint16_t* to) { *to = to_bf16(v); }

template <typename T>
T* row(const Rows& t, int64_t b, int64_t n) {
  return static_cast<T*>(t.data) + b * t.batch_stride + n * t.row_stride;
}

int64_t chunks_of(int64_t S) { return (S + kPositions - 1) / kPositions; }

// Adds `kRows` rows to a run's sums. Several rows at a time: the sums of all channels do not fit into
// registers, and reading and writing them for every row would cost more than reading the rows.
template <int kRows, typename T>
ETUDE_INLINE void add_rows(const T* x, int64_t stride, int64_t C, const float* origin, float* sums,
                           float* squares) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    float sum = sums[c], square = squares[c];
    const float from = origin[c];
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      const float d = value(x[k * stride + c]) - from;
      sum += d;
      square += d * d;
    }
    sums[c] = sum;
    squares[c] = square;
  }
}

// Mean and squared deviations of each channel over one run of positions, in one pass: values are
// taken relative to the run's first one. That one belongs to the run, so that subtracting the squared
// mean multiplies the rounding errors by kPositions at worst (a lone outlier in the first place),
// however large the mean is.
template <typename T>
void run_moments(const GroupNormForward& a, int64_t b, int64_t run, float* mean, float* squares,
                 float* origin) {
  const int64_t first = run * kPositions, last = min64(first + kPositions, a.S), C = a.C;
  const int64_t stride = a.x.row_stride;
  const T* const start = row<T>(a.x, b, first);
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    origin[c] = value(start[c]);
    mean[c] = 0.0f;
    squares[c] = 0.0f;
  }
  int64_t n = first;
  for (; n + 8 <= last; n += 8)
    add_rows<8>(row<T>(a.x, b, n), stride, C, origin, mean, squares);
  for (; n < last; ++n) add_rows<1>(row<T>(a.x, b, n), stride, C, origin, mean, squares);
  const float inverse = 1.0f / static_cast<float>(last - first);
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    const float sum = mean[c];
    const float rest = squares[c] - sum * sum * inverse;
    squares[c] = rest > 0.0f ? rest : (rest == rest ? 0.0f : rest);
    mean[c] = origin[c] + sum * inverse;
  }
}

// Merges (mean, squares) of `count` values into those of `before` values (Chan et al.).
void merge(float count, float mean, float squares, float before, float* to_mean,
           float* to_squares) {
  const float total = before + count, delta = mean - *to_mean;
  *to_mean += delta * (count / total);
  *to_squares += squares + delta * delta * (before * count / total);
}

// The same of one channel whose positions are contiguous: two passes over each block, in four sums
// each, since one alone would wait for every addition.
template <typename T>
void channel_moments(const GroupNormForward& a, int64_t b, int64_t c, float* mean,
                     float* squares) {
  float all_mean = 0.0f, all_squares = 0.0f;
  for (int64_t at = 0; at < a.S; at += kBlock) {
    const int64_t count = min64(kBlock, a.S - at), part = count / 4;
    const T* const x = row<T>(a.x, b, c) + at;
    float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < part; ++i) {
      s0 += value(x[i]);
      s1 += value(x[part + i]);
      s2 += value(x[2 * part + i]);
      s3 += value(x[3 * part + i]);
    }
    for (int64_t i = 4 * part; i < count; ++i) s0 += value(x[i]);
    const float centre = ((s0 + s1) + (s2 + s3)) / static_cast<float>(count);
    s0 = s1 = s2 = s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < part; ++i) {
      const float d0 = value(x[i]) - centre, d1 = value(x[part + i]) - centre;
      const float d2 = value(x[2 * part + i]) - centre, d3 = value(x[3 * part + i]) - centre;
      s0 += d0 * d0;
      s1 += d1 * d1;
      s2 += d2 * d2;
      s3 += d3 * d3;
    }
    for (int64_t i = 4 * part; i < count; ++i) {
      const float d = value(x[i]) - centre;
      s0 += d * d;
    }
    merge(static_cast<float>(count), centre, (s0 + s1) + (s2 + s3), static_cast<float>(at),
          &all_mean, &all_squares);
  }
  mean[c] = all_mean;
  squares[c] = all_squares;
}

// Channels to one group.
void finish_group(const GroupNormForward& a, int64_t b, int64_t g, const float* mean,
                  const float* squares) {
  const int64_t width = a.C / a.groups;
  float centre = 0.0f, spread = 0.0f;
  for (int64_t c = g * width; c < (g + 1) * width; ++c) centre += mean[c];
  centre /= static_cast<float>(width);
  for (int64_t c = g * width; c < (g + 1) * width; ++c) {
    const float delta = mean[c] - centre;
    spread += squares[c] + delta * delta * static_cast<float>(a.S);
  }
  a.mean[b * a.groups + g] = centre;
  a.rstd[b * a.groups + g] =
      1.0f / sqrtf(spread / (static_cast<float>(width) * static_cast<float>(a.S)) + a.eps);
}

// Runs to channels (in place, into the first run's slot), channels to groups.
void finish_moments(const GroupNormForward& a, int64_t b, float* partial) {
  const int64_t C = a.C;
  float* const mean = partial;
  float* const squares = partial + C;
  for (int64_t run = 1; run < chunks_of(a.S); ++run) {
    const float before = static_cast<float>(run * kPositions);
    const float count = static_cast<float>(min64(kPositions, a.S - run * kPositions));
    const float* const from = partial + run * 2 * C;
    const float share = count / (before + count), weight = before * share;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const float delta = from[c] - mean[c];
      mean[c] += delta * share;
      squares[c] += from[C + c] + delta * delta * weight;
    }
  }
  for (int64_t g = 0; g < a.groups; ++g) finish_group(a, b, g, mean, squares);
}

// Per channel of picture b: the group's mean and reciprocal deviation, the weight, the bias.
void channel_constants(const Rows& weight, const Rows& bias, const float* mean, const float* rstd,
                       int64_t C, int64_t groups, float* to) {
  const int64_t width = C / groups;
  const float* const w = load(weight, 0, 0, 0, C, to + 2 * C);
  const float* const s = load(bias, 0, 0, 0, C, to + 3 * C);
  for (int64_t c = 0; c < C; ++c) {
    to[c] = mean[c / width];
    to[C + c] = rstd[c / width];
    to[2 * C + c] = w[c];
    to[3 * C + c] = s[c];
  }
}

// y of `kRows` positions: constants are read once for all of them.
template <bool kSilu, int kRows, typename In, typename Out>
ETUDE_INLINE void apply_rows(const In* x, int64_t x_stride, Out* y, int64_t y_stride, int64_t C,
                             const float* constants) {
  const float *centre = constants, *rstd = constants + C, *w = constants + 2 * C,
              *shift = constants + 3 * C;
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    const float mean = centre[c], slope = rstd[c] * w[c], offset = shift[c];
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      const float v = (value(x[k * x_stride + c]) - mean) * slope + offset;
      put(kSilu ? quick_silu(v) : v, y + k * y_stride + c);
    }
  }
}

template <bool kSilu, typename In, typename Out>
void apply_run(const GroupNormForward& a, int64_t b, int64_t run, const float* constants) {
  const int64_t last = min64((run + 1) * kPositions, a.S);
  int64_t n = run * kPositions;
  for (; n + 4 <= last; n += 4)
    apply_rows<kSilu, 4>(row<In>(a.x, b, n), a.x.row_stride, row<Out>(a.y, b, n), a.y.row_stride,
                         a.C, constants);
  for (; n < last; ++n)
    apply_rows<kSilu, 1>(row<In>(a.x, b, n), a.x.row_stride, row<Out>(a.y, b, n), a.y.row_stride,
                         a.C, constants);
}

// With SiLU, numbers of 16 bits pass through a float32 block: in one loop the compiler would take as
// many lanes as fit 16 bits, twice the registers that the exponential has.
template <bool kSilu, typename In, typename Out>
void apply_channel(const In* x, Out* y, int64_t S, float mean, float slope, float offset) {
  if (!kSilu || (sizeof(In) == 4 && sizeof(Out) == 4)) {
#pragma omp simd
    for (int64_t i = 0; i < S; ++i) {
      const float v = (value(x[i]) - mean) * slope + offset;
      put(kSilu ? quick_silu(v) : v, y + i);
    }
    return;
  }
  float block[kBlock];
  for (int64_t at = 0; at < S; at += kBlock) {
    const int64_t count = min64(kBlock, S - at);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) block[i] = (value(x[at + i]) - mean) * slope + offset;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) block[i] = quick_silu(block[i]);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) put(block[i], y + at + i);
  }
}

// Forward over channels that are contiguous.
template <bool kSilu, typename In, typename Out>
void forward_group(const GroupNormForward& a, int64_t b, int64_t g, const float* w,
                   const float* shift) {
  const int64_t width = a.C / a.groups, first = g * width;
  float* const mean = a.partial + b * chunks_of(a.S) * 2 * a.C;
  float* const squares = mean + a.C;
  for (int64_t c = first; c < first + width; ++c) channel_moments<In>(a, b, c, mean, squares);
  finish_group(a, b, g, mean, squares);
  const float centre = a.mean[b * a.groups + g], scale = a.rstd[b * a.groups + g];
  for (int64_t c = first; c < first + width; ++c)
    apply_channel<kSilu>(row<In>(a.x, b, c), row<Out>(a.y, b, c), a.S, centre, scale * w[c],
                         shift[c]);
}

// The gradient before the SiLU, from x and dy of one element.
template <bool kSilu>
ETUDE_INLINE float before_silu(float dy, float normed, float w, float shift) {
  if (!kSilu) return dy;
  return dy * quick_silu_slope(normed * w + shift);
}

// Per channel, over one unit: sums of d and of d * normed, with d the gradient before the SiLU, which
// is kept for the second pass: it then needs no exponential.
template <bool kSilu>
void sum_unit(const GroupNormBackward& a, int64_t b, int64_t unit, const float* constants,
              float* partial, float* buffers) {
  const int64_t C = a.C;
  const float *centre = constants, *rstd = constants + C, *w = constants + 2 * C,
              *shift = constants + 3 * C;
  if (a.channels_last) {
    float* const plain = partial + unit * 2 * C;
    float* const dot = plain + C;
    for (int64_t c = 0; c < 2 * C; ++c) plain[c] = 0.0f;
    const int64_t last = min64((unit + 1) * kPositions, a.S);
    for (int64_t n = unit * kPositions; n < last; ++n) {
      const float* const x = load(a.x, b, n, 0, C, buffers);
      const float* const dy = load(a.dy, b, n, 0, C, buffers + C);
      float* const kept = kSilu ? target(a.kept, b, n, 0, nullptr) : nullptr;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const float normed = (x[c] - centre[c]) * rstd[c];
        const float d = before_silu<kSilu>(dy[c], normed, w[c], shift[c]);
        plain[c] += d;
        dot[c] += d * normed;
        if (kSilu) kept[c] = d;
      }
    }
    return;
  }
  const float mean = centre[unit], scale = rstd[unit], slope = w[unit], offset = shift[unit];
  float all_plain = 0.0f, all_dot = 0.0f;
  for (int64_t at = 0; at < a.S; at += kBlock) {
    const int64_t count = min64(kBlock, a.S - at);
    const float* const x = load(a.x, b, unit, at, count, buffers);
    const float* const dy = load(a.dy, b, unit, at, count, buffers + kBlock);
    float* const kept = kSilu ? target(a.kept, b, unit, at, nullptr) : nullptr;
    float plain = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : plain, dot)
    for (int64_t i = 0; i < count; ++i) {
      const float normed = (x[i] - mean) * scale;
      const float d = before_silu<kSilu>(dy[i], normed, slope, offset);
      plain += d;
      dot += d * normed;
      if (kSilu) kept[i] = d;
    }
    all_plain += plain;
    all_dot += dot;
  }
  partial[unit] = all_plain;
  partial[C + unit] = all_dot;
}

// dx = rstd (w d - mean(w d) - normed mean(w d normed)), means over the group; `means` holds both per
// channel.
void gradient_unit(const GroupNormBackward& a, const Rows& from, int64_t b, int64_t unit,
                   const float* constants, const float* means, float* buffers) {
  const int64_t C = a.C;
  const float *centre = constants, *rstd = constants + C, *w = constants + 2 * C,
              *average = means, *slope = means + C;
  if (a.channels_last) {
    const int64_t last = min64((unit + 1) * kPositions, a.S);
    for (int64_t n = unit * kPositions; n < last; ++n) {
      const float* const x = load(a.x, b, n, 0, C, buffers);
      const float* const d = load(from, b, n, 0, C, buffers + C);
      float* const dx = target(a.dx, b, n, 0, buffers + 2 * C);
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const float normed = (x[c] - centre[c]) * rstd[c];
        dx[c] = rstd[c] * (d[c] * w[c] - average[c] - normed * slope[c]);
      }
      store(a.dx, b, n, 0, C, dx);
    }
    return;
  }
  const float mean = centre[unit], scale = rstd[unit], weight = w[unit];
  const float first = average[unit], second = slope[unit];
  for (int64_t at = 0; at < a.S; at += kBlock) {
    const int64_t count = min64(kBlock, a.S - at);
    const float* const x = load(a.x, b, unit, at, count, buffers);
    const float* const d = load(from, b, unit, at, count, buffers + kBlock);
    float* const dx = target(a.dx, b, unit, at, buffers + 2 * kBlock);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float normed = (x[i] - mean) * scale;
      dx[i] = scale * (d[i] * weight - first - normed * second);
    }
    store(a.dx, b, unit, at, count, dx);
  }
}

void sum(const GroupNormBackward& a, int64_t b, int64_t unit, const float* constants,
         float* partial, float* buffers) {
  if (a.silu)
    sum_unit<true>(a, b, unit, constants, partial, buffers);
  else
    sum_unit<false>(a, b, unit, constants, partial, buffers);
}

void gradient(const GroupNormBackward& a, int64_t b, int64_t unit, const float* constants,
              const float* means, float* buffers) {
  gradient_unit(a, a.silu ? a.kept : a.dy, b, unit, constants, means, buffers);
}

// Units to channels, into the picture's last slot.
void finish_sums(const GroupNormBackward& a, float* partial) {
  const int64_t C = a.C, chunks = chunks_of(a.S);
  float* const to = partial + chunks * 2 * C;
  for (int64_t i = 0; i < 2 * C; ++i) to[i] = 0.0f;
  for (int64_t unit = 0; unit < (a.channels_last ? chunks : 1); ++unit) {
    const float* const from = partial + unit * 2 * C;
#pragma omp simd
    for (int64_t i = 0; i < 2 * C; ++i) to[i] += from[i];
  }
}

void group_means(const GroupNormBackward& a, const float* sums, const float* w, float* means) {
  const int64_t C = a.C, width = C / a.groups;
  const float inverse = 1.0f / (static_cast<float>(width) * static_cast<float>(a.S));
  for (int64_t g = 0; g < a.groups; ++g) {
    float plain = 0.0f, dot = 0.0f;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      plain += w[c] * sums[c];
      dot += w[c] * sums[C + c];
    }
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      means[c] = plain * inverse;
      means[C + c] = dot * inverse;
    }
  }
}

float* scratch(int64_t floats) {
  return static_cast<float*>(malloc(static_cast<size_t>(floats + 16) * sizeof(float)));
}

template <bool kSilu, typename In, typename Out>
void forward(const GroupNormForward& a) {
  const int64_t C = a.C, runs = chunks_of(a.S);
  const bool whole = a.B >= a.threads;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    float* const constants = scratch(6 * C);
    if (!a.channels_last) {
      const float* const w = load(a.weight, 0, 0, 0, C, constants);
      const float* const shift = load(a.bias, 0, 0, 0, C, constants + C);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < a.B * a.groups; ++i)
        forward_group<kSilu, In, Out>(a, i / a.groups, i % a.groups, w, shift);
    } else if (whole) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.B; ++b) {
        float* const partial = a.partial + b * runs * 2 * C;
        for (int64_t u = 0; u < runs; ++u)
          run_moments<In>(a, b, u, partial + u * 2 * C, partial + (u * 2 + 1) * C, constants);
        finish_moments(a, b, partial);
        channel_constants(a.weight, a.bias, a.mean + b * a.groups, a.rstd + b * a.groups, C,
                          a.groups, constants);
        // The last runs first: those are the ones still in the cache.
        for (int64_t u = runs; u-- > 0;) apply_run<kSilu, In, Out>(a, b, u, constants);
      }
    } else {
      for (int64_t b = 0; b < a.B; ++b) {
        float* const partial = a.partial + b * runs * 2 * C;
#pragma omp for schedule(static)
        for (int64_t u = 0; u < runs; ++u)
          run_moments<In>(a, b, u, partial + u * 2 * C, partial + (u * 2 + 1) * C, constants);
#pragma omp single
        finish_moments(a, b, partial);
        channel_constants(a.weight, a.bias, a.mean + b * a.groups, a.rstd + b * a.groups, C,
                          a.groups, constants);
#pragma omp for schedule(static)
        for (int64_t u = 0; u < runs; ++u) apply_run<kSilu, In, Out>(a, b, u, constants);
      }
    }
    free(constants);
  }
}

template <bool kSilu>
void forward_types(const GroupNormForward& a) {
  if (a.x.dtype == kFloat32 && a.y.dtype == kFloat32)
    forward<kSilu, float, float>(a);
  else if (a.x.dtype == kFloat32)
    forward<kSilu, float, uint16_t>(a);
  else if (a.y.dtype == kFloat32)
    forward<kSilu, uint16_t, float>(a);
  else
    forward<kSilu, uint16_t, uint16_t>(a);
}

}  // namespace

void groupnorm_forward(const GroupNormForward& a) {
  if (a.silu)
    forward_types<true>(a);
  else
    forward_types<false>(a);
}

void groupnorm_backward(const GroupNormBackward& a) {
  const int64_t C = a.C, chunks = chunks_of(a.S), slots = (chunks + 1) * 2 * C;
  const int64_t units = a.channels_last ? chunks : C;
  const bool whole = a.B >= a.threads;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    float* const constants = scratch(6 * C + 3 * max64(C, kBlock));
    float* const means = constants + 4 * C;
    float* const buffers = constants + 6 * C;
    if (whole) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.B; ++b) {
        float* const partial = a.partial + b * slots;
        channel_constants(a.weight, a.bias, a.mean + b * a.groups, a.rstd + b * a.groups, C,
                          a.groups, constants);
        for (int64_t u = 0; u < units; ++u) sum(a, b, u, constants, partial, buffers);
        finish_sums(a, partial);
        group_means(a, partial + chunks * 2 * C, constants + 2 * C, means);
        for (int64_t u = 0; u < units; ++u) gradient(a, b, u, constants, means, buffers);
      }
    } else {
      for (int64_t b = 0; b < a.B; ++b) {
        float* const partial = a.partial + b * slots;
        channel_constants(a.weight, a.bias, a.mean + b * a.groups, a.rstd + b * a.groups, C,
                          a.groups, constants);
#pragma omp for schedule(static)
        for (int64_t u = 0; u < units; ++u) sum(a, b, u, constants, partial, buffers);
#pragma omp single
        finish_sums(a, partial);
        group_means(a, partial + chunks * 2 * C, constants + 2 * C, means);
#pragma omp for schedule(static)
        for (int64_t u = 0; u < units; ++u) gradient(a, b, u, constants, means, buffers);
      }
    }
#pragma omp for schedule(static)
    for (int64_t which = 0; which < 2; ++which) {
      const Rows& to = which ? a.dweight : a.dbias;
      float* const all = target(to, 0, 0, 0, buffers);
      for (int64_t c = 0; c < C; ++c) all[c] = 0.0f;
      for (int64_t b = 0; b < a.B; ++b) {
        const float* const from = a.partial + b * slots + (chunks * 2 + which) * C;
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) all[c] += from[c];
      }
      store(to, 0, 0, 0, C, all);
    }
    free(constants);
  }
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
