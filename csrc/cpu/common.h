// What every CPU kernel shares: how tensors are handed over, bfloat16, and one namespace per level.
//
// A kernel file (adaln.cpp, ...) is compiled once per processor level (setup.py: base, v3 = AVX2,
// v4 = AVX-512) with ETUDE_LEVEL set to the level's name; bindings.cpp chooses a level at run time.
// Kernel files must not use templates of the standard library: the linker keeps one copy of such
// code, and could keep the AVX-512 one for a processor that lacks it.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Declares functions once per level: ETUDE_DECLARE(void adaln_forward(const AdalnForward& a);)
#define ETUDE_DECLARE(...)         \
  namespace base { __VA_ARGS__ }   \
  namespace v3 { __VA_ARGS__ }     \
  namespace v4 { __VA_ARGS__ }

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
