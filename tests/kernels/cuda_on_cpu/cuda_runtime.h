// Stands in for the CUDA runtime when a .cu file is compiled by the host compiler (see
// machine.cpp).
//
// Every thread of a block runs on the CPU as a fiber with its own stack; barriers and shuffles
// switch between them. What is wrong on a GPU and may still give the right values there is an error
// here: a barrier or shuffle that not all threads reach, or reach at different lines, or after one
// has returned; a write beyond the shared memory that was asked for. Shared memory is filled with
// NaN before every block, cp.async delivers only when it is waited for, and the order in which
// threads and blocks run can be changed: a kernel that lacks a barrier then changes its values.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 999 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

extern dim3 gridDim, blockDim;
extern uint3 blockIdx, threadIdx;

namespace cuda_on_cpu {
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
void allow_shared(size_t bytes);
void barrier(int line);
void warp_barrier(unsigned mask, int line);
// `value` of lane `source` of this warp, once all lanes of `mask` are here; of kVotes, a bit per lane
// whose value is not 0.
constexpr int kVotes = -2;
uint64_t exchange(unsigned mask, uint64_t value, int source, int line);
int lane();
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(size_t groups_left);
const char* error();

template <class T>
T shuffle(unsigned mask, T value, int source, int line) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace cuda_on_cpu

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::error(); }
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int bytes) {
  cuda_on_cpu::allow_shared(static_cast<size_t>(bytes));
  return cudaSuccess;
}
template <class... Formal, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Formal...),
                               Actual&&... arguments) {
  const std::tuple<Formal...> kept(std::forward<Actual>(arguments)...);
  return cuda_on_cpu::run(*config, [&] { std::apply(kernel, kept); });
}

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  cuda_on_cpu::warp_barrier(mask, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, source & 31, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() ^ flip, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const int source = cuda_on_cpu::lane() - static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, value, source >= 0 ? source : cuda_on_cpu::lane(), line);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  return static_cast<unsigned>(cuda_on_cpu::exchange(mask, vote, cuda_on_cpu::kVotes, line));
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const int source = cuda_on_cpu::lane() + static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, value, source < 32 ? source : cuda_on_cpu::lane(), line);
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
