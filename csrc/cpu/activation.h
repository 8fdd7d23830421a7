// Arguments of the activation kernels (activation.cpp); filled in by activation_bindings.cpp.
#pragma once
#include "common.h"

namespace etude {

// Tensors are (N, D) by row_stride; a bias is one row, absent where data == nullptr.
struct GeluForward {
  int64_t N, D;
  Rows x, bias;
  Rows y;  // written: gelu(x + bias)
  bool tanh;
  int threads;
};

struct GeluBackward {
  int64_t N, D;
  Rows dy, x, bias;
  Rows dx;         // written
  Rows dbias;      // one row, written where present
  float* partial;  // (ceil(N / kActivationRows), D), workspace where dbias is present
  bool tanh;
  int threads;
};

struct SwigluForward {
  int64_t N, D;
  Rows gate, value;
  Rows y;  // written: silu(gate) * value
  int threads;
};

struct SwigluBackward {
  int64_t N, D;
  Rows dy, gate, value;
  Rows dgate, dvalue;  // written
  int threads;
};

constexpr int64_t kActivationRows = 64;  // fixed, so that sums do not depend on the thread count

ETUDE_DECLARE(
    void gelu_forward(const GeluForward& a);
    void gelu_backward(const GeluBackward& a);
    void swiglu_forward(const SwigluForward& a);
    void swiglu_backward(const SwigluBackward& a);
)

}  // namespace etude
