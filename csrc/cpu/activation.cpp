// Bias and GELU, and SwiGLU: forward and backward. The mathematics is in kernels/activation.py, which
// is also the only caller; the exponentials are in vectormath.h.
//
// A row is taken in blocks of kBlock columns, brought to float32 in buffers that stay in the
// first-level cache, so that one loop serves every mix of float32 and bfloat16. The gradient of the
// bias is summed over chunks of kActivationRows rows, then over the chunks in order.
#include <stdlib.h>

#include "activation.h"
#include "vectormath.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

constexpr int64_t kBlock = 1024;

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Columns [first, first + count) of row n as float32: in place, or converted into `buffer`.
const float* load(const Rows& t, int64_t n, int64_t first, int64_t count, float* buffer) {
  const int64_t offset = n * t.row_stride + first;
  if (t.dtype == kFloat32) return static_cast<const float*>(t.data) + offset;
  const uint16_t* const from = static_cast<const uint16_t*>(t.data) + offset;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) buffer[i] = from_bf16(from[i]);
  return buffer;
}

// Where to compute a part of an output; `store` then rounds it into a bfloat16 tensor.
float* target(const Rows& t, int64_t n, int64_t first, float* buffer) {
  if (t.dtype != kFloat32) return buffer;
  return static_cast<float*>(t.data) + n * t.row_stride + first;
}

void store(const Rows& t, int64_t n, int64_t first, int64_t count, const float* part) {
  if (t.dtype == kFloat32) return;
  uint16_t* const to = static_cast<uint16_t*>(t.data) + n * t.row_stride + first;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = to_bf16(part[i]);
}

// The bias as float32, or zeros: adding a zero costs less than a second version of each loop.
void load_bias(const Rows& bias, int64_t D, float* to) {
  for (int64_t i = 0; i < D; ++i) to[i] = 0.0f;
  if (!bias.data) return;
  const float* const from = load(bias, 0, 0, D, to);
  if (from != to) __builtin_memcpy(to, from, static_cast<size_t>(D) * sizeof(float));
}

template <bool kTanh>
void gelu_rows(const GeluForward& a, int64_t first, int64_t last, const float* bias,
               float* buffers) {
  for (int64_t n = first; n < last; ++n) {
    for (int64_t at = 0; at < a.D; at += kBlock) {
      const int64_t count = min64(kBlock, a.D - at);
      const float* const x = load(a.x, n, at, count, buffers);
      float* const y = target(a.y, n, at, buffers + kBlock);
      const float* const b = bias + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const float z = x[i] + b[i];
        y[i] = kTanh ? gelu_tanh(z) : gelu_erf(z);
      }
      store(a.y, n, at, count, y);
    }
  }
}

template <bool kTanh>
void gelu_backward_rows(const GeluBackward& a, int64_t first, int64_t last, const float* bias,
                        float* sums, float* buffers) {
  for (int64_t i = 0; i < a.D; ++i) sums[i] = 0.0f;
  for (int64_t n = first; n < last; ++n) {
    for (int64_t at = 0; at < a.D; at += kBlock) {
      const int64_t count = min64(kBlock, a.D - at);
      const float* const x = load(a.x, n, at, count, buffers);
      const float* const dy = load(a.dy, n, at, count, buffers + kBlock);
      float* const dx = target(a.dx, n, at, buffers + 2 * kBlock);
      const float* const b = bias + at;
      float* const sum = sums + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const float z = x[i] + b[i];
        const float d = dy[i] * (kTanh ? gelu_tanh_slope(z) : gelu_erf_slope(z));
        dx[i] = d;
        sum[i] += d;
      }
      store(a.dx, n, at, count, dx);
    }
  }
}

void swiglu_rows(const SwigluForward& a, int64_t first, int64_t last, float* buffers) {
  for (int64_t n = first; n < last; ++n) {
    for (int64_t at = 0; at < a.D; at += kBlock) {
      const int64_t count = min64(kBlock, a.D - at);
      const float* const gate = load(a.gate, n, at, count, buffers);
      const float* const value = load(a.value, n, at, count, buffers + kBlock);
      float* const y = target(a.y, n, at, buffers + 2 * kBlock);
      // A result of 8 bits of mantissa needs no division.
      if (a.y.dtype == kBFloat16) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) y[i] = quick_silu(gate[i]) * value[i];
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) y[i] = silu(gate[i]) * value[i];
      }
      store(a.y, n, at, count, y);
    }
  }
}

void swiglu_backward_rows(const SwigluBackward& a, int64_t first, int64_t last, float* buffers) {
  for (int64_t n = first; n < last; ++n) {
    for (int64_t at = 0; at < a.D; at += kBlock) {
      const int64_t count = min64(kBlock, a.D - at);
      const float* const dy = load(a.dy, n, at, count, buffers);
      const float* const gate = load(a.gate, n, at, count, buffers + kBlock);
      const float* const value = load(a.value, n, at, count, buffers + 2 * kBlock);
      float* const dgate = target(a.dgate, n, at, buffers + 3 * kBlock);
      float* const dvalue = target(a.dvalue, n, at, buffers + 4 * kBlock);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        float activated;
        const float slope = silu_slope(gate[i], &activated);
        dgate[i] = dy[i] * value[i] * slope;
        dvalue[i] = dy[i] * activated;
      }
      store(a.dgate, n, at, count, dgate);
      store(a.dvalue, n, at, count, dvalue);
    }
  }
}

float* scratch(int64_t floats) {
  return static_cast<float*>(malloc(static_cast<size_t>(floats + 16) * sizeof(float)));
}

int64_t chunks_of(int64_t N) { return (N + kActivationRows - 1) / kActivationRows; }

}  // namespace

void gelu_forward(const GeluForward& a) {
  const int64_t chunks = chunks_of(a.N);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && chunks > 1)
  {
    float* const buffers = scratch(2 * kBlock + a.D);
    float* const bias = buffers + 2 * kBlock;
    load_bias(a.bias, a.D, bias);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < chunks; ++task) {
      const int64_t first = task * kActivationRows;
      const int64_t last = min64(first + kActivationRows, a.N);
      if (a.tanh)
        gelu_rows<true>(a, first, last, bias, buffers);
      else
        gelu_rows<false>(a, first, last, bias, buffers);
    }
    free(buffers);
  }
}

void gelu_backward(const GeluBackward& a) {
  const int64_t chunks = chunks_of(a.N);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && chunks > 1)
  {
    float* const buffers = scratch(3 * kBlock + 2 * a.D);
    float* const bias = buffers + 3 * kBlock;
    load_bias(a.bias, a.D, bias);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < chunks; ++task) {
      const int64_t first = task * kActivationRows;
      const int64_t last = min64(first + kActivationRows, a.N);
      float* const sums = a.dbias.data ? a.partial + task * a.D : bias + a.D;
      if (a.tanh)
        gelu_backward_rows<true>(a, first, last, bias, sums, buffers);
      else
        gelu_backward_rows<false>(a, first, last, bias, sums, buffers);
    }
    if (a.dbias.data) {
#pragma omp for schedule(static)
      for (int64_t at = 0; at < a.D; at += kBlock) {
        const int64_t count = min64(kBlock, a.D - at);
        float* const sum = target(a.dbias, 0, at, buffers);
        for (int64_t i = 0; i < count; ++i) sum[i] = 0.0f;
        for (int64_t c = 0; c < chunks; ++c) {
          const float* const from = a.partial + c * a.D + at;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) sum[i] += from[i];
        }
        store(a.dbias, 0, at, count, sum);
      }
    }
    free(buffers);
  }
}

void swiglu_forward(const SwigluForward& a) {
  const int64_t chunks = chunks_of(a.N);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && chunks > 1)
  {
    float* const buffers = scratch(3 * kBlock);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < chunks; ++task) {
      const int64_t first = task * kActivationRows;
      swiglu_rows(a, first, min64(first + kActivationRows, a.N), buffers);
    }
    free(buffers);
  }
}

void swiglu_backward(const SwigluBackward& a) {
  const int64_t chunks = chunks_of(a.N);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && chunks > 1)
  {
    float* const buffers = scratch(5 * kBlock);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < chunks; ++task) {
      const int64_t first = task * kActivationRows;
      swiglu_backward_rows(a, first, min64(first + kActivationRows, a.N), buffers);
    }
    free(buffers);
  }
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
