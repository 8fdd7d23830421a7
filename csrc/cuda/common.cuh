// What every CUDA kernel shares: vectors of 4 to 16 bytes, sums over a warp, launches that throw.
//
// Conventions. Addresses are int64: a batch of activations passes 2^31 elements. Arithmetic is
// float32; a 16-bit value is widened when it is used and kept packed in registers until then.
// Shared memory is dynamic only (`shared_floats`), so that one number at the launch says how much a
// block uses. Kernels are launched by cudaLaunchKernelEx, which is plain C++: the tests compile
// these very files with the host compiler and run every thread of a block on the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common.h"

namespace etude {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

extern __shared__ __align__(16) unsigned char shared_bytes[];

__device__ __forceinline__ float* shared_floats() { return reinterpret_cast<float*>(shared_bytes); }

// V elements of T as the 32-bit words that one instruction moves: 8-byte vectors are LDG.64,
// 16-byte ones LDG.128.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  static_assert(sizeof(T) * V <= 16, "no instruction moves more than 16 bytes");
  uint32_t word[sizeof(T) * V / 4];
};

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* address) {
  return *reinterpret_cast<const Pack<T, V>*>(address);
}

template <class T, int V>
__device__ __forceinline__ void store(T* address, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(address) = pack;
}

// One or two elements of a word. bfloat16 is the upper half of a float32.
__device__ __forceinline__ void widen(const uint32_t word, float* to, float) {
  to[0] = __uint_as_float(word);
}
__device__ __forceinline__ void widen(const uint32_t word, float* to, __nv_bfloat16) {
  to[0] = __uint_as_float(word << 16);
  to[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void widen(const uint32_t word, float* to, __half) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  to[0] = both.x;
  to[1] = both.y;
}

// Rounded to nearest even; two elements by one instruction.
__device__ __forceinline__ uint32_t narrow(const float* from, float) {
  return __float_as_uint(from[0]);
}
__device__ __forceinline__ uint32_t narrow(const float* from, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(from[0], from[1]);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t narrow(const float* from, __half) {
  const __half2 both = __floats2half2_rn(from[0], from[1]);
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <class T, int V>
__device__ __forceinline__ void unpack(const Pack<T, V>& pack, float (&to)[V]) {
  constexpr int kWords = sizeof(T) * V / 4;
#pragma unroll
  for (int i = 0; i < kWords; ++i) widen(pack.word[i], to + i * (V / kWords), T());
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> pack(const float (&from)[V]) {
  constexpr int kWords = sizeof(T) * V / 4;
  Pack<T, V> made;
#pragma unroll
  for (int i = 0; i < kWords; ++i) made.word[i] = narrow(from + i * (V / kWords), T());
  return made;
}

// For data that is touched once per block (modulation vectors, their gradients): the dtype is
// looked at when the kernel runs, which saves a compiled kernel per dtype.
__device__ __forceinline__ void load4(const void* data, int dtype, int64_t at, float (&to)[4]) {
  if (dtype == kFloat32) {
    unpack(load<float, 4>(static_cast<const float*>(data) + at), to);
  } else if (dtype == kBFloat16) {
    unpack(load<__nv_bfloat16, 4>(static_cast<const __nv_bfloat16*>(data) + at), to);
  } else {
    unpack(load<__half, 4>(static_cast<const __half*>(data) + at), to);
  }
}

__device__ __forceinline__ void store4(void* data, int dtype, int64_t at, const float (&from)[4]) {
  if (dtype == kFloat32) {
    store(static_cast<float*>(data) + at, pack<float>(from));
  } else if (dtype == kBFloat16) {
    store(static_cast<__nv_bfloat16*>(data) + at, pack<__nv_bfloat16>(from));
  } else {
    store(static_cast<__half*>(data) + at, pack<__half>(from));
  }
}

// The same for one element, where an address is not aligned to a vector.
__device__ __forceinline__ float load1(const void* data, int dtype, int64_t at) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[at];
  if (dtype == kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
  return __half2float(static_cast<const __half*>(data)[at]);
}

__device__ __forceinline__ void store1(void* data, int dtype, int64_t at, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(data)[at] = value;
  } else if (dtype == kBFloat16) {
    static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(data)[at] = __float2half_rn(value);
  }
}

// The sum over a warp, the same bits in every lane (a butterfly adds each pair in both orders).
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

inline void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // cleared: the next caller is not told of this error
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

inline unsigned grid_size(int64_t blocks, const char* what) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(what) + ": more than 2^31 blocks");
  return static_cast<unsigned>(blocks);
}

// Blocks of `threads` on the caller's stream. More than 48 KB of shared memory must be asked for.
template <class... Formal, class... Actual>
void launch(const char* what, const Place& place, dim3 grid, dim3 block, size_t shared,
            void (*kernel)(Formal...), Actual&&... arguments) {
  check(cudaSetDevice(place.device), what);
  if (shared > 48 * 1024) {
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(kernel, limit, static_cast<int>(shared)), what);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(place.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Actual&&>(arguments)...), what);
}

}  // namespace etude
