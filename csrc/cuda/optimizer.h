// Arguments of the optimizer kernels (optimizer.cu); filled in by bindings.cpp from
// kernels/optimizer_cuda.py.
#pragma once
#include "common.h"

namespace etude {

constexpr int kProfiles = 4;      // weight averages in one pass, at most
constexpr int kAdamwTensors = 40;  // tensors per launch: their table is a kernel parameter (4 KB)
constexpr int kAdamwScalars = 4 + 2 * kProfiles;  // doubles before the pairs in `workspace`

// A number, or a 0-d tensor on the GPU that is read there.
struct Scalar {
  const void* data;  // nullptr: `value`
  int dtype;
  double value;
};

struct AdamwTensor {
  float* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* emas[kProfiles];
  void* copy;  // the new param in a 16-bit type, or nullptr
  float* step;
  int64_t numel;
};

struct Adamw {
  const AdamwTensor* tensors;
  const int* grad_dtypes;
  const int* copy_dtypes;
  int64_t count;
  int profiles;
  double beta1, beta2, eps, weight_decay;
  Scalar lr, grad_scale, found_inf;
  Scalar decays[kProfiles];
  double* workspace;  // kAdamwScalars + 2 * count of them on the GPU
};

void adamw_ema(const Adamw& a, const Place& place);

}  // namespace etude
