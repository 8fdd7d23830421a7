// What the CUDA files share with their bindings: plain C++, no CUDA header.
#pragma once
#include <stdint.h>

namespace etude {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// A (B, N, D) or (B, D) tensor on the GPU: strides in elements, the last dimension contiguous. A
// (B, D) tensor has row_stride 0; an absent one has data == nullptr.
struct Rows {
  void* data;
  int dtype;
  int64_t batch_stride;
  int64_t row_stride;
};

// Where a launch goes: the caller's current device and stream (a cudaStream_t).
struct Place {
  int device;
  void* stream;
};

}  // namespace etude
