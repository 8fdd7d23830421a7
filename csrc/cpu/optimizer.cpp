// AdamW, any number of weight averages and a bfloat16 copy of the weights in one pass over each
// tensor. The equations and the only caller are in kernels/optimizer.py.
//
// Sums and products are computed in float64 and rounded once, when they are stored. Compiled without
// fused multiply-add, so the bits are the same at every processor level, for every thread count and
// however a tensor is cut.
#include <math.h>

#include "optimizer.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

constexpr int64_t kBlock = 16384;  // elements per task
constexpr int64_t kPiece = 128;    // elements at a time
constexpr int64_t kAhead = 512;    // elements that memory is asked for before their turn

// Root, quotient and conversions leave the processor little room to run ahead of its loads, and
// five and more streams are more than its own prefetching keeps up with.
inline void prefetch(const void* data, int64_t first_byte, int64_t bytes) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(data) + first_byte;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<void*>(start + i), 1);
}

inline void update_piece(const Adamw& a, const AdamwTensor& t, int64_t first, int64_t count) {
  float* const param = t.param + first;
  float* const m = t.exp_avg + first;
  float* const v = t.exp_avg_sq + first;
  const double scale = a.grad_scale, shrink = a.shrink;
  const double beta1 = a.beta1, rest1 = (1.0 - a.beta1) * scale;
  const double beta2 = a.beta2, rest2 = (1.0 - a.beta2) * scale * scale;
  const double step_size = t.step_size, eps = t.eps;
  float widened[kPiece];
  const float* grad = static_cast<const float*>(t.grad) + first;
  const int64_t ahead = (first + kAhead) * 4;
  const int64_t width = t.grad_dtype == kFloat32 ? 4 : 2;
  prefetch(t.param, ahead, kPiece * 4);
  prefetch(t.grad, (first + kAhead) * width, kPiece * width);
  prefetch(t.exp_avg, ahead, kPiece * 4);
  prefetch(t.exp_avg_sq, ahead, kPiece * 4);
  for (int k = 0; k < a.profiles; ++k) prefetch(t.emas[k], ahead, kPiece * 4);
  if (t.grad_dtype != kFloat32) {
    const uint16_t* const narrow = static_cast<const uint16_t*>(t.grad) + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) widened[i] = from_bf16(narrow[i]);
    grad = widened;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double g = grad[i];
    const double first_moment = m[i] * beta1 + g * rest1;
    const double second_moment = v[i] * beta2 + (g * g) * rest2;
    // first_moment * step_size / (sqrt(second_moment) + eps): root and quotient in float32, each
    // corrected once by its remainder, which squares its relative error of 2^-23. 1e-23 is below
    // the root of every float32 number and keeps a root of 0 from dividing 0 by 0.
    const float root = sqrtf(static_cast<float>(second_moment));
    const float slope = 0.5f / (root + 1e-23f);
    const float inverse = 1.0f / (root + static_cast<float>(eps));
    const double r = root, q = inverse;
    const double bottom = (r + eps) + (second_moment - r * r) * slope;
    const double top = first_moment * step_size;
    const double quotient = top * q;
    const double update = quotient + (top - quotient * bottom) * q;
    m[i] = static_cast<float>(first_moment);
    v[i] = static_cast<float>(second_moment);
    param[i] = static_cast<float>(param[i] * shrink - update);
  }
  for (int k = 0; k < a.profiles; ++k) {
    float* const ema = t.emas[k] + first;
    const double decay = a.decays[k], rest = 1.0 - a.decays[k];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      ema[i] = static_cast<float>(ema[i] * decay + param[i] * rest);
    }
  }
  if (t.copy != nullptr) {
    uint16_t* const copy = t.copy + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) copy[i] = to_bf16(param[i]);
  }
}

}  // namespace

void adamw_ema(const Adamw& a) {
  for (int64_t index = 0; index < a.count; ++index) {
    const AdamwTensor& t = a.tensors[index];
    const int64_t blocks = (t.numel + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && blocks > 3)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t end = (block + 1) * kBlock < t.numel ? (block + 1) * kBlock : t.numel;
      for (int64_t first = block * kBlock; first < end; first += kPiece) {
        update_piece(a, t, first, end - first < kPiece ? end - first : kPiece);
      }
    }
  }
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
