// Arguments of the GroupNorm kernels (groupnorm.cpp); filled in by groupnorm_bindings.cpp.
#pragma once
#include "common.h"

namespace etude {

// B pictures of S positions and C channels in groups of C / groups. With channels_last a row of a
// tensor is a position (C contiguous channels), without it is a channel (S contiguous positions).
struct GroupNormForward {
  int64_t B, S, C, groups;
  Rows x, weight, bias;  // weight and bias: one row of C
  Rows y;                // written
  float* mean;           // (B, groups), written
  float* rstd;           // (B, groups), written
  float* partial;        // (B, ceil(S / kPositions), 2, C), workspace
  float eps;
  bool silu, channels_last;
  int threads;
};

struct GroupNormBackward {
  int64_t B, S, C, groups;
  Rows dy, x, weight, bias;
  const float* mean;
  const float* rstd;
  Rows dx, dweight, dbias;  // written
  Rows kept;                // float32 of x's shape, workspace with SiLU; may be dx
  float* partial;           // (B, ceil(S / kPositions) + 1, 2, C), workspace
  bool silu, channels_last;
  int threads;
};

constexpr int64_t kPositions = 64;  // fixed, so that sums do not depend on the thread count

ETUDE_DECLARE(
    void groupnorm_forward(const GroupNormForward& a);
    void groupnorm_backward(const GroupNormBackward& a);
)

}  // namespace etude
