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
  uint16_t* copy;      // bfloat16 copy of the new weights, or nullptr
  int64_t numel;
  double step_size;  // lr / (1 - beta1^t) * sqrt(1 - beta2^t)
  double eps;        // eps * sqrt(1 - beta2^t)
};

struct Adamw {
  const AdamwTensor* tensors;
  int64_t count;
  int profiles;
  const double* decays;  // per profile
  double beta1, beta2;
  double shrink;  // 1 - lr * weight_decay
  double grad_scale;
  int threads;
};

ETUDE_DECLARE(void adamw_ema(const Adamw& a);)

}  // namespace etude
