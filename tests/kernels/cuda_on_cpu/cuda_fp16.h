// float16 as the CUDA header of this name has it, by the compiler's _Float16.
#pragma once
#include "cuda_runtime.h"

struct __half { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };

inline __half __float2half_rn(float value) {
  const _Float16 narrow = static_cast<_Float16>(value);
  __half made;
  memcpy(&made, &narrow, 2);
  return made;
}
inline float __half2float(__half value) {
  _Float16 narrow;
  memcpy(&narrow, &value, 2);
  return static_cast<float>(narrow);
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 both) { return {__half2float(both.x), __half2float(both.y)}; }
