// Arguments of the adaLN kernels (adaln.cu); filled in by bindings.cpp from kernels/adaln_cuda.py.
#pragma once
#include "common.h"

namespace etude {

constexpr int64_t kMaxWidth = 4096;  // and a multiple of 8: all vectors are whole

struct AdalnForward {
  int64_t B, N, D;
  Rows x, h, gate, shift, scale;  // read; h and gate go together, shift and scale too
  Rows bias;                      // (D,), added to h, or absent
  Rows out, y;                    // written: x + gate * (h + bias), and the modulated norm
  float* mean;                    // (B, N), written; RMSNorm writes zeros
  float* rstd;                    // (B, N), written
  float eps;
  bool rms;
  int64_t rows;  // rows of one sample per block
};

struct AdalnBackward {
  int64_t B, N, D;
  Rows dout, dy;           // gradients of out and y; with a norm dout may be absent
  Rows x, h, gate, scale;  // x is the normed tensor, that is out where there is a gate
  Rows bias;
  const float* mean;
  const float* rstd;
  Rows dx, dh, dgate, dshift, dscale, dbias;  // written where present
  float* partial;                             // (B, ceil(N / rows), 4, D), workspace
  bool rms;
  int64_t rows;  // rows of one sample per block
};

void adaln_forward(const AdalnForward& a, const Place& place);
void adaln_backward(const AdalnBackward& a, const Place& place);

}  // namespace etude
