// Kernels with one mistake each; test_cuda.py asks that the machine finds it.
#include <cuda_runtime.h>

namespace etude { extern unsigned char shared_bytes[]; }
#define BYTES etude::shared_bytes

__global__ void right(float* out) {
  float* const all = reinterpret_cast<float*>(BYTES);
  all[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  *(out + threadIdx.x) = all[blockDim.x - 1 - threadIdx.x];
}
__global__ void no_barrier(float* out) {
  float* const all = reinterpret_cast<float*>(BYTES);
  all[threadIdx.x] = static_cast<float>(threadIdx.x);
  *(out + threadIdx.x) = all[blockDim.x - 1 - threadIdx.x];
}
__global__ void barrier_in_a_branch(float*) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
}
__global__ void returns_before_a_barrier(float*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}
__global__ void writes_beyond(float*) {
  reinterpret_cast<float*>(BYTES)[threadIdx.x + 1] = 1.0f;
}
__global__ void shuffles_with_the_gone(float* out) {
  if (threadIdx.x % 32 == 3) return;
  *(out + threadIdx.x) = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
__global__ void reads_what_nobody_wrote(float* out) {
  *(out + threadIdx.x) = reinterpret_cast<float*>(BYTES)[threadIdx.x];
}

// The launch of a kernel by number, with 64 threads; its error, or nothing.
extern "C" const char* launch_fault(int which, float* out, int shared) {
  void (*const kernels[])(float*) = {right,
                                     no_barrier,
                                     barrier_in_a_branch,
                                     returns_before_a_barrier,
                                     writes_beyond,
                                     shuffles_with_the_gone,
                                     reads_what_nobody_wrote};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  const cudaError_t code = cudaLaunchKernelEx(&config, kernels[which], out);
  return code == cudaSuccess ? "" : cudaGetErrorString(code);
}
