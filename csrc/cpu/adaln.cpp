// Adaptive LayerNorm / RMSNorm with shift and scale, gated residual, and both at once: forward and
// backward. The mathematics is in kernels/adaln.py, which is also the only caller.
//
// Every row is brought to float32 in a buffer that stays in the first-level cache, so one code path
// serves every mix of float32 and bfloat16. The backward pass sums dgate, dshift and dscale over
// chunks of kRowsPerChunk rows, then over the chunks in order: the sums have the same bits for any
// number of threads.
#include <math.h>
#include <stdlib.h>

#include "adaln.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Row (b, n) as float32: in place where it already is, else converted into `buffer`.
const float* load(const Rows& t, int64_t b, int64_t n, int64_t D, float* buffer) {
  const int64_t offset = b * t.batch_stride + n * t.row_stride;
  if (t.dtype == kFloat32) return static_cast<const float*>(t.data) + offset;
  const uint16_t* from = static_cast<const uint16_t*>(t.data) + offset;
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) buffer[i] = from_bf16(from[i]);
  return buffer;
}

// Where to compute row (b, n) of an output; `store` then rounds it into a bfloat16 tensor.
float* target(const Rows& t, int64_t b, int64_t n, float* buffer) {
  if (t.dtype != kFloat32) return buffer;
  return static_cast<float*>(t.data) + b * t.batch_stride + n * t.row_stride;
}

void store(const Rows& t, int64_t b, int64_t n, int64_t D, const float* row) {
  if (t.dtype == kFloat32) return;
  uint16_t* to = static_cast<uint16_t*>(t.data) + b * t.batch_stride + n * t.row_stride;
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) to[i] = to_bf16(row[i]);
}

// A row of float32 into row b of a (B, D) tensor.
void put(const Rows& t, int64_t b, int64_t D, const float* row) {
  store(t, b, 0, D, row);
  if (t.dtype == kFloat32)
    __builtin_memcpy(static_cast<float*>(t.data) + b * t.batch_stride, row,
                     static_cast<size_t>(D) * sizeof(float));
}

// Two passes over the row, so that a large mean does not cancel the variance.
void moments(const float* x, int64_t D, float eps, bool rms, float* mean, float* rstd) {
  float sum = 0.0f;
  if (!rms) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < D; ++i) sum += x[i];
  }
  const float centre = sum / static_cast<float>(D);
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < D; ++i) squares += (x[i] - centre) * (x[i] - centre);
  *mean = centre;
  *rstd = 1.0f / sqrtf(squares / static_cast<float>(D) + eps);
}

void forward_rows(const AdalnForward& a, int64_t b, int64_t first, int64_t last, float* buffers) {
  const int64_t D = a.D;
  float* const xb = buffers;
  float* const hb = buffers + D;
  float* const ob = buffers + 2 * D;
  const float* const gate = a.gate.data ? load(a.gate, b, 0, D, buffers + 3 * D) : nullptr;
  const float* const shift = a.shift.data ? load(a.shift, b, 0, D, buffers + 4 * D) : nullptr;
  const float* const scale = a.scale.data ? load(a.scale, b, 0, D, buffers + 5 * D) : nullptr;
  const float* const bias = a.bias.data ? load(a.bias, 0, 0, D, buffers + 6 * D) : nullptr;
  for (int64_t n = first; n < last; ++n) {
    const float* x = load(a.x, b, n, D, xb);
    if (gate) {
      const float* const h = load(a.h, b, n, D, hb);
      float* const out = target(a.out, b, n, ob);
      if (bias) {
#pragma omp simd
        for (int64_t i = 0; i < D; ++i) out[i] = x[i] + gate[i] * (h[i] + bias[i]);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < D; ++i) out[i] = x[i] + gate[i] * h[i];
      }
      store(a.out, b, n, D, out);
      if (!scale) continue;
      // The norm sees the residual as it was stored, so that backward recomputes the same values.
      x = load(a.out, b, n, D, xb);
    }
    float mean, rstd;
    moments(x, D, a.eps, a.rms, &mean, &rstd);
    a.mean[b * a.N + n] = mean;
    a.rstd[b * a.N + n] = rstd;
    float* const y = target(a.y, b, n, ob);
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) y[i] = (x[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
    store(a.y, b, n, D, y);
  }
}

// dx of one row through the norm, added to `dout` where there is one; sums of dshift and dscale.
void norm_backward(const float* x, const float* dy, const float* scale, const float* dout, float* dx,
                   int64_t D, float mean, float rstd, bool rms, float* dshift, float* dscale) {
  float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t i = 0; i < D; ++i) {
    const float normed = (x[i] - mean) * rstd;
    const float d = dy[i] * (1.0f + scale[i]);
    sum += d;
    dot += d * normed;
    dshift[i] += dy[i];
    dscale[i] += dy[i] * normed;
  }
  const float average = rms ? 0.0f : sum / static_cast<float>(D);
  const float slope = dot / static_cast<float>(D);
  if (dout) {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i)
      dx[i] = dout[i] +
              rstd * (dy[i] * (1.0f + scale[i]) - average - (x[i] - mean) * rstd * slope);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i)
      dx[i] = rstd * (dy[i] * (1.0f + scale[i]) - average - (x[i] - mean) * rstd * slope);
  }
}

void backward_rows(const AdalnBackward& a, int64_t b, int64_t first, int64_t last, float* partial,
                   float* buffers) {
  const int64_t D = a.D;
  const float* const gate = a.gate.data ? load(a.gate, b, 0, D, buffers + 5 * D) : nullptr;
  const float* const scale = a.scale.data ? load(a.scale, b, 0, D, buffers + 6 * D) : nullptr;
  float* const dgate = partial;
  float* const dshift = partial + D;
  float* const dscale = partial + 2 * D;
  float* const sum = partial + 3 * D;  // of the rows' dx, where there is a bias
  for (int64_t i = 0; i < (a.bias.data ? 4 : 3) * D; ++i) partial[i] = 0.0f;
  for (int64_t n = first; n < last; ++n) {
    const float* total = a.dout.data ? load(a.dout, b, n, D, buffers) : nullptr;
    if (scale) {
      const float* const x = load(a.x, b, n, D, buffers + D);
      const float* const dy = load(a.dy, b, n, D, buffers + 2 * D);
      float* const dx = target(a.dx, b, n, buffers + 3 * D);
      norm_backward(x, dy, scale, total, dx, D, a.mean[b * a.N + n], a.rstd[b * a.N + n], a.rms,
                    dshift, dscale);
      store(a.dx, b, n, D, dx);
      total = dx;
    }
    if (gate) {
      const float* const h = load(a.h, b, n, D, buffers + D);
      float* const dh = target(a.dh, b, n, buffers + 4 * D);
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) {
        dh[i] = gate[i] * total[i];
        dgate[i] += total[i] * h[i];
      }
      store(a.dh, b, n, D, dh);
      if (a.bias.data) {
#pragma omp simd
        for (int64_t i = 0; i < D; ++i) sum[i] += total[i];
      }
    }
  }
}

// Second stage: the chunks of one picture, in order, into the first chunk's place.
float* reduce(const AdalnBackward& a, int64_t b, int64_t chunks, int64_t which) {
  float* const sum = a.partial + (b * chunks * 4 + which) * a.D;
  for (int64_t c = 1; c < chunks; ++c) {
    const float* const from = sum + c * 4 * a.D;
#pragma omp simd
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
      const float* const gate = load(a.gate, b, 0, D, buffers);
      const float* const bias = load(a.bias, 0, 0, D, buffers + D);
#pragma omp simd
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
#pragma omp simd
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
    float* const buffers = scratch(7, a.D);
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
    float* const buffers = scratch(7, a.D);
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
