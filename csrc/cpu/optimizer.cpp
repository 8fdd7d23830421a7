// AdamW and any number of weight averages in one pass over each tensor. The equations and the only
// caller are in kernels/optimizer.py.
//
// Compiled without fused multiply-add, in the reference's order of operations: the same bits at every
// processor level, for every thread count and however a tensor is cut.
#include <math.h>

#include "optimizer.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

constexpr int64_t kBlock = 16384;  // elements per task: the block's state fits the second-level cache

void update_block(const Adamw& a, const AdamwTensor& t, int64_t first, int64_t last) {
  float* const param = t.param;
  float* const m = t.exp_avg;
  float* const v = t.exp_avg_sq;
  const float* const g32 = static_cast<const float*>(t.grad);
  const uint16_t* const g16 = static_cast<const uint16_t*>(t.grad);
  const bool wide = t.grad_dtype == kFloat32;
  const float grad_scale = a.scaled ? a.grad_scale : 1.0f;
  const float beta1 = a.beta1, rest1 = a.one_minus_beta1;
  const float beta2 = a.beta2, rest2 = a.one_minus_beta2;
  const float shrink = a.shrink, eps = a.eps;
  const float step_size = t.step_size, correction = t.correction2_sqrt;
  float grad[256];
  for (int64_t base = first; base < last; base += 256) {
    const int64_t count = last - base < 256 ? last - base : 256;
    if (wide) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad[i] = g32[base + i] * grad_scale;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad[i] = from_bf16(g16[base + i]) * grad_scale;
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = base + i;
      m[j] = m[j] * beta1 + grad[i] * rest1;
      v[j] = v[j] * beta2 + (grad[i] * grad[i]) * rest2;
      const float bottom = sqrtf(v[j]) / correction + eps;
      param[j] = param[j] * shrink - (m[j] * step_size) / bottom;
    }
  }
  for (int k = 0; k < a.profiles; ++k) {
    float* const ema = t.emas[k];
    const float decay = a.decays[k], rest = a.one_minus[k];
#pragma omp simd
    for (int64_t i = first; i < last; ++i) ema[i] = ema[i] * decay + param[i] * rest;
  }
}

}  // namespace

void adamw_ema(const Adamw& a) {
  for (int64_t index = 0; index < a.count; ++index) {
    const AdamwTensor& t = a.tensors[index];
    const int64_t blocks = (t.numel + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && blocks > 3)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kBlock;
      const int64_t last = first + kBlock < t.numel ? first + kBlock : t.numel;
      update_block(a, t, first, last);
    }
  }
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
