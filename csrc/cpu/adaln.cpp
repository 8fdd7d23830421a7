// Adaptive LayerNorm / RMSNorm with shift and scale, gated residual, and both at once: forward and
// backward. The mathematics is in kernels/adaln.py, which is also the only caller.
//
// Rows are read and written in their own type (float32 or bfloat16, in any mix); a bfloat16 row that
// is needed twice is kept as float32 in a buffer that stays in the first-level cache. 16 values at a
// time in most loops: left alone, the compiler takes 32 where a type is bfloat16 and does the rest
// of a row (16 of D = 144) one by one; the others were faster so. The backward pass sums dgate, dshift and
// dscale over chunks of kRowsPerChunk rows, then over the chunks in order: the sums have the same
// bits for any number of threads.
#include <math.h>
#include <stdlib.h>

#include "adaln.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

typedef uint16_t bf16;

#define ETUDE_PRAGMA(text) _Pragma(#text)
#define ETUDE_SIMD(...) ETUDE_PRAGMA(omp simd simdlen(16) __VA_ARGS__)

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return from_bf16(value); }
inline void narrow(float value, float* to) { *to = value; }
inline void narrow(float value, bf16* to) { *to = to_bf16(value); }

template <class T>
T* at(const Rows& t, int64_t b, int64_t n) {
  return static_cast<T*>(t.data) + b * t.batch_stride + n * t.row_stride;
}

// Runs the statement with T as the tensor's element type.
#define ETUDE_TYPED(t, T, ...)                        \
  if ((t).dtype == kFloat32) { typedef float T; __VA_ARGS__; } \
  else { typedef bf16 T; __VA_ARGS__; }

// A vector of the modulation as float32: in place where it already is, else in `buffer`.
const float* load(const Rows& t, int64_t b, int64_t D, float* buffer) {
  if (t.dtype == kFloat32) return at<float>(t, b, 0);
  const bf16* const from = at<bf16>(t, b, 0);
  ETUDE_SIMD()
  for (int64_t i = 0; i < D; ++i) buffer[i] = widen(from[i]);
  return buffer;
}

template <class T>
void narrow_row(const float* row, T* to, int64_t D) {
  ETUDE_SIMD()
  for (int64_t i = 0; i < D; ++i) narrow(row[i], to + i);
}

// A row of float32 into row b of a (B, D) tensor.
void put(const Rows& t, int64_t b, int64_t D, const float* row) {
  ETUDE_TYPED(t, T, narrow_row(row, at<T>(t, b, 0), D))
}

// Where a row of T is kept as float32: where it is, if it already is; else in `buffer`.
inline float* kept_row(float* row, float*) { return row; }
inline float* kept_row(bf16*, float* buffer) { return buffer; }

// out = x + gate * (h + bias); `kept` is out as it was stored, so that backward, which reads it,
// normalises the same values. An absent bias is a row of zeros.
template <bool kNorm, class X, class H>
float add_branch(const X* x, const H* h, const float* gate, const float* bias, X* out, float* kept,
                 int64_t D) {
  float sum = 0.0f;
  ETUDE_SIMD(reduction(+ : sum))
  for (int64_t i = 0; i < D; ++i) {
    X stored;
    narrow(widen(x[i]) + gate[i] * (widen(h[i]) + bias[i]), &stored);
    out[i] = stored;
    if (kNorm) kept[i] = widen(stored);
    if (kNorm) sum += widen(stored);
  }
  return sum;
}

float sum_of(const float* x, int64_t D) {
  float sum = 0.0f;
  ETUDE_SIMD(reduction(+ : sum))
  for (int64_t i = 0; i < D; ++i) sum += x[i];
  return sum;
}

inline void copy_row(const float*, float*, int64_t) {}  // kept where it is

inline void copy_row(const bf16* x, float* kept, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) kept[i] = widen(x[i]);
}

// The variance of the centred row: a large mean does not cancel it.
float deviation(const float* x, int64_t D, float mean, float eps) {
  float squares = 0.0f;
  ETUDE_SIMD(reduction(+ : squares))
  for (int64_t i = 0; i < D; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return 1.0f / sqrtf(squares / static_cast<float>(D) + eps);
}

template <class Y>
void modulate(const float* x, const float* shift, const float* scale, float mean, float rstd, Y* y,
              int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i)
    narrow((x[i] - mean) * rstd * (1.0f + scale[i]) + shift[i], y + i);
}

const float* load_bias(const Rows& bias, int64_t D, float* buffer) {
  if (bias.data) return load(bias, 0, D, buffer);
  for (int64_t i = 0; i < D; ++i) buffer[i] = 0.0f;
  return buffer;
}

void forward_rows(const AdalnForward& a, int64_t b, int64_t first, int64_t last, float* buffers) {
  const int64_t D = a.D;
  const bool gated = a.gate.data != nullptr;
  const float* const gate = gated ? load(a.gate, b, D, buffers + D) : nullptr;
  const float* const bias = gated ? load_bias(a.bias, D, buffers + 2 * D) : nullptr;
  const float* const shift = a.shift.data ? load(a.shift, b, D, buffers + 3 * D) : nullptr;
  const float* const scale = a.scale.data ? load(a.scale, b, D, buffers + 4 * D) : nullptr;
  for (int64_t n = first; n < last; ++n) {
    float sum = 0.0f;
    float* kept = nullptr;
    ETUDE_TYPED(a.x, X, {
      X* const x = at<X>(a.x, b, n);
      if (gated) {
        X* const out = at<X>(a.out, b, n);
        kept = kept_row(out, buffers);
        ETUDE_TYPED(a.h, H, {
          const H* const h = at<H>(a.h, b, n);
          if (scale)
            sum = add_branch<true>(x, h, gate, bias, out, kept, D);
          else
            add_branch<false>(x, h, gate, bias, out, kept, D);
        })
      } else {
        kept = kept_row(x, buffers);
        copy_row(x, kept, D);
        sum = sum_of(kept, D);
      }
    })
    if (!scale) continue;
    const float mean = a.rms ? 0.0f : sum / static_cast<float>(D);
    const float rstd = deviation(kept, D, mean, a.eps);
    a.mean[b * a.N + n] = mean;
    a.rstd[b * a.N + n] = rstd;
    ETUDE_TYPED(a.y, Y, modulate(kept, shift, scale, mean, rstd, at<Y>(a.y, b, n), D))
  }
}

struct Sums {  // over the rows of a chunk, D values each
  float* dgate;
  float* dshift;
  float* dscale;
  float* total;  // of dx, where there is a bias
};

// Of one row, with d = dy * (1 + scale): the sums of d and of d * normed.
template <class X, class Y>
void norm_terms(const X* x, const Y* dy, const float* scale, float mean, float rstd,
                const Sums& sums, int64_t D, float* sum_d, float* dot) {
  float sum = 0.0f, product = 0.0f;
  float* const dshift = sums.dshift;
  float* const dscale = sums.dscale;
  ETUDE_SIMD(reduction(+ : sum, product))
  for (int64_t i = 0; i < D; ++i) {
    const float upstream = widen(dy[i]);
    const float normed = (widen(x[i]) - mean) * rstd;
    const float d = upstream * (1.0f + scale[i]);
    sum += d;
    product += d * normed;
    dshift[i] += upstream;
    dscale[i] += upstream * normed;
  }
  *sum_d = sum;
  *dot = product;
}

// dx = dout + rstd * (d - average - normed * slope); `kept` is dx before it is rounded.
template <bool kDout, class X, class Y>
void norm_gradient(const X* dout, const X* x, const Y* dy, const float* scale, float mean,
                   float rstd, float average, float slope, X* dx, float* kept, int64_t D) {
  ETUDE_SIMD()
  for (int64_t i = 0; i < D; ++i) {
    const float normed = (widen(x[i]) - mean) * rstd;
    const float through = rstd * (widen(dy[i]) * (1.0f + scale[i]) - average - normed * slope);
    const float total = kDout ? widen(dout[i]) + through : through;
    kept[i] = total;
    narrow(total, dx + i);
  }
}

// Both of them for one row; returns the row `kept`.
template <class X, class Y>
float* norm_backward(const AdalnBackward& a, int64_t b, int64_t n, const float* scale,
                     const Sums& sums, float* buffer) {
  const float mean = a.mean[b * a.N + n], rstd = a.rstd[b * a.N + n];
  const X* const x = at<X>(a.x, b, n);
  const Y* const dy = at<Y>(a.dy, b, n);
  X* const dx = at<X>(a.dx, b, n);
  float* const kept = kept_row(dx, buffer);
  float sum, dot;
  norm_terms(x, dy, scale, mean, rstd, sums, a.D, &sum, &dot);
  const float average = a.rms ? 0.0f : sum / static_cast<float>(a.D);
  const float slope = dot / static_cast<float>(a.D);
  if (a.dout.data)
    norm_gradient<true>(at<X>(a.dout, b, n), x, dy, scale, mean, rstd, average, slope, dx, kept,
                        a.D);
  else
    norm_gradient<false>(x, x, dy, scale, mean, rstd, average, slope, dx, kept, a.D);
  return kept;
}

template <bool kBias, class T, class H>
void gate_gradient(const T* total, const H* h, const float* gate, H* dh, const Sums& sums,
                   int64_t D) {
  float* const dgate = sums.dgate;
  float* const sum = sums.total;
  ETUDE_SIMD()
  for (int64_t i = 0; i < D; ++i) {
    const float t = widen(total[i]);
    narrow(gate[i] * t, dh + i);
    dgate[i] += t * widen(h[i]);
    if (kBias) sum[i] += t;
  }
}

void backward_rows(const AdalnBackward& a, int64_t b, int64_t first, int64_t last, float* partial,
                   float* buffers) {
  const int64_t D = a.D;
  const float* const gate = a.gate.data ? load(a.gate, b, D, buffers + D) : nullptr;
  const float* const scale = a.scale.data ? load(a.scale, b, D, buffers + 2 * D) : nullptr;
  const Sums sums = {partial, partial + D, partial + 2 * D, partial + 3 * D};
  for (int64_t i = 0; i < (a.bias.data ? 4 : 3) * D; ++i) partial[i] = 0.0f;
  for (int64_t n = first; n < last; ++n) {
    const float* total = nullptr;
    if (scale) {
      ETUDE_TYPED(a.x, X, ETUDE_TYPED(a.dy, Y, total = norm_backward<X, Y>(a, b, n, scale, sums,
                                                                           buffers)))
    }
    if (!gate) continue;
    ETUDE_TYPED(a.h, H, {
      const H* const h = at<H>(a.h, b, n);
      H* const dh = at<H>(a.dh, b, n);
      if (scale && a.bias.data) {
        gate_gradient<true>(total, h, gate, dh, sums, D);
      } else if (scale) {
        gate_gradient<false>(total, h, gate, dh, sums, D);
      } else {
        ETUDE_TYPED(a.dout, X, {
          const X* const dout = at<X>(a.dout, b, n);
          if (a.bias.data)
            gate_gradient<true>(dout, h, gate, dh, sums, D);
          else
            gate_gradient<false>(dout, h, gate, dh, sums, D);
        })
      }
    })
  }
}

// Second stage: the chunks of one picture, in order, into the first chunk's place.
float* reduce(const AdalnBackward& a, int64_t b, int64_t chunks, int64_t which) {
  float* const sum = a.partial + (b * chunks * 4 + which) * a.D;
  for (int64_t c = 1; c < chunks; ++c) {
    const float* const from = sum + c * 4 * a.D;
  ETUDE_SIMD()
    for (int64_t i = 0; i < a.D; ++i) sum[i] += from[i];
  }
  return sum;
}

// A gate is constant over a picture's rows: one sum of dx serves dbias and the bias's part of dgate.
void reduce_picture(const AdalnBackward& a, int64_t b, int64_t chunks, float* buffers) {
  const int64_t D = a.D;
  if (a.gate.data) {
    float* const dgate = reduce(a, b, chunks, 0);
    if (a.bias.data) {
      float* const sum = reduce(a, b, chunks, 3);
      const float* const gate = load(a.gate, b, D, buffers);
      const float* const bias = load(a.bias, 0, D, buffers + D);
  ETUDE_SIMD()
      for (int64_t i = 0; i < D; ++i) {
        dgate[i] += bias[i] * sum[i];
        sum[i] *= gate[i];
      }
    }
    put(a.dgate, b, D, dgate);
  }
  if (a.scale.data) {
    put(a.dshift, b, D, reduce(a, b, chunks, 1));
    put(a.dscale, b, D, reduce(a, b, chunks, 2));
  }
}

// Third stage, of the bias alone: the pictures, in order.
void reduce_bias(const AdalnBackward& a, int64_t chunks) {
  float* const sum = a.partial + 3 * a.D;
  for (int64_t b = 1; b < a.B; ++b) {
    const float* const from = sum + b * chunks * 4 * a.D;
  ETUDE_SIMD()
    for (int64_t i = 0; i < a.D; ++i) sum[i] += from[i];
  }
  put(a.dbias, 0, a.D, sum);
}

float* scratch(int64_t rows, int64_t D) {
  return static_cast<float*>(malloc(static_cast<size_t>(rows * D + 16) * sizeof(float)));
}

}  // namespace

void adaln_forward(const AdalnForward& a) {
  const int64_t rows = 16;
  const int64_t chunks = (a.N + rows - 1) / rows;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && a.B * chunks > 1)
  {
    float* const buffers = scratch(5, a.D);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.B * chunks; ++task) {
      const int64_t first = task % chunks * rows;
      forward_rows(a, task / chunks, first, min64(first + rows, a.N), buffers);
    }
    free(buffers);
  }
}

void adaln_backward(const AdalnBackward& a) {
  const int64_t chunks = (a.N + kRowsPerChunk - 1) / kRowsPerChunk;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && a.B * chunks > 1)
  {
    float* const buffers = scratch(5, a.D);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.B * chunks; ++task) {
      const int64_t first = task % chunks * kRowsPerChunk;
      backward_rows(a, task / chunks, first, min64(first + kRowsPerChunk, a.N),
                    a.partial + task * 4 * a.D, buffers);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < a.B; ++b) reduce_picture(a, b, chunks, buffers);
    free(buffers);
  }
  if (a.bias.data) reduce_bias(a, chunks);
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
