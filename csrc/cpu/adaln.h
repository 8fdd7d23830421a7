// Arguments of the adaLN kernels (adaln.cpp); filled in by adaln_bindings.cpp.
#pragma once
#include "common.h"

namespace etude {

struct AdalnForward {
  int64_t B, N, D;
  Rows x, h, gate, shift, scale;  // read; h and gate go together, shift and scale too
  Rows bias;                      // (D), read; absent: zero; only where there is a gate
  Rows out, y;                    // written: x + gate * (h + bias), and the modulated norm
  float* mean;                    // (B, N), written; RMSNorm writes zeros
  float* rstd;                    // (B, N), written
  float eps;
  bool rms;
  int threads;
};

struct AdalnBackward {
  int64_t B, N, D;
  Rows dout, dy;            // gradients of out (of x's dtype) and y; not both absent
  Rows x, h, gate, scale;   // x is the normed tensor, that is out where there is a gate
  Rows bias;
  const float* mean;
  const float* rstd;
  Rows dx, dh, dgate, dshift, dscale;  // written where present
  Rows dbias;                          // (D), written where there is a bias
  float* partial;                      // (B, ceil(N / kRowsPerChunk), 4, D), workspace
  bool rms;
  int threads;
};

constexpr int64_t kRowsPerChunk = 64;  // fixed, so that sums do not depend on the thread count

ETUDE_DECLARE(
    void adaln_forward(const AdalnForward& a);
    void adaln_backward(const AdalnBackward& a);
)

}  // namespace etude
