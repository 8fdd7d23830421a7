// Arguments of the optimizer kernel (optimizer.cpp); filled in by optimizer_bindings.cpp.
#pragma once
#include "common.h"

namespace etude {

struct AdamwTensor {
  float* param;
  const void* grad;
  int grad_dtype;
  float* exp_avg;
  float* exp_avg_sq;
  float* const* emas;  // one pointer per profile
  int64_t numel;
  float step_size;         // lr / (1 - beta1^step)
  float correction2_sqrt;  // sqrt(1 - beta2^step)
};

struct Adamw {
  const AdamwTensor* tensors;
  int64_t count;
  int profiles;
  const float* decays;      // per profile
  const float* one_minus;   // 1 - decay, rounded from double
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float shrink;       // 1 - lr * weight_decay
  float grad_scale;
  bool scaled;
  int threads;
};

ETUDE_DECLARE(void adamw_ema(const Adamw& a);)

}  // namespace etude
