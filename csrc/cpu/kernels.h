// What the CPU kernels share: their arguments and their declarations, one namespace per level.
//
// adaln.cpp and optimizer.cpp are compiled once per processor level (setup.py: base, v3 = AVX2,
// v4 = AVX-512) with ETUDE_LEVEL set; bindings.cpp chooses a level at run time. They must not use
// templates of the standard library: the linker keeps one copy of such code, and could keep the
// AVX-512 one for a processor that lacks it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace etude {

enum DType : int { kFloat32 = 0, kBFloat16 = 1 };

// A (B, N, D) or (B, D) tensor: strides in elements, the last dimension contiguous. A (B, D) tensor
// has row_stride 0; an absent one has data == nullptr.
struct Rows {
  void* data;
  int dtype;
  int64_t batch_stride;
  int64_t row_stride;
};

struct AdalnForward {
  int64_t B, N, D;
  Rows x, h, gate, shift, scale;  // read; h and gate go together, shift and scale too
  Rows out, y;                    // written: x + gate * h, and the modulated norm
  float* mean;                    // (B, N), written; RMSNorm writes zeros
  float* rstd;                    // (B, N), written
  float eps;
  bool rms;
  int threads;
};

struct AdalnBackward {
  int64_t B, N, D;
  Rows dout, dy;            // gradients of out and y; either may be absent, not both
  Rows x, h, gate, scale;   // x is the normed tensor, that is out where there is a gate
  const float* mean;
  const float* rstd;
  Rows dx, dh, dgate, dshift, dscale;  // written where present
  float* partial;                      // (B, ceil(N / kRowsPerChunk), 3, D), workspace
  bool rms;
  int threads;
};

constexpr int64_t kRowsPerChunk = 64;  // fixed, so that sums do not depend on the thread count

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

#define ETUDE_DECLARE(level)                      \
  namespace level {                               \
  void adaln_forward(const AdalnForward& a);      \
  void adaln_backward(const AdalnBackward& a);    \
  void adamw_ema(const Adamw& a);                 \
  }
ETUDE_DECLARE(base)
ETUDE_DECLARE(v3)
ETUDE_DECLARE(v4)

// bfloat16 <-> float32; rounding to nearest even, a NaN stays a (quiet) NaN, as in PyTorch.
static inline float from_bf16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

static inline uint16_t to_bf16(float value) {
  uint32_t wide;
  __builtin_memcpy(&wide, &value, 4);
  const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

}  // namespace etude
