// Chooses the kernels of adaln_kernels.cuh by dtype, and the second stage of backward. One file per
// pair of dtypes (adaln_bfloat16.cu, ...) compiles them: nvcc then works on all at once.
#include "adaln.h"

#include "common.cuh"

namespace etude {

template <class X, class H>
void forward_of(const AdalnForward& a, const Place& place);
template <class X, class H>
void backward_of(const AdalnBackward& a, const Place& place);

namespace {

constexpr int kReduceThreads = 128;

// Second stage: four columns of one sample's dgate, dshift or dscale (blockIdx.y), its chunks in
// order. With a bias, dgate also has the part bias * sum t, and gate * sum t is left for the third
// stage, in the place of the first chunk's sum (which nobody else reads).
__global__ void __launch_bounds__(kReduceThreads)
    adaln_reduce_kernel(const __grid_constant__ AdalnBackward a) {
  const Rows& to = blockIdx.y == 0 ? a.dgate : blockIdx.y == 1 ? a.dshift : a.dscale;
  if (to.data == nullptr) return;
  const unsigned across = static_cast<unsigned>((a.D / 4 + kReduceThreads - 1) / kReduceThreads);
  const int64_t b = blockIdx.x / across;
  const int64_t column = 4 * (blockIdx.x % across * int64_t{kReduceThreads} + threadIdx.x);
  if (column >= a.D) return;
  const int64_t chunks = (a.N + a.rows - 1) / a.rows;
  float* const base = a.partial + b * chunks * 4 * a.D + column;
  const bool biased = blockIdx.y == 0 && a.bias.data != nullptr;
  float total[4] = {}, rows[4] = {};
#pragma unroll 4
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* const from = base + chunk * 4 * a.D;
    const float4 four = *reinterpret_cast<const float4*>(from + blockIdx.y * a.D);
    total[0] += four.x, total[1] += four.y, total[2] += four.z, total[3] += four.w;
    if (biased) {
      const float4 more = *reinterpret_cast<const float4*>(from + 3 * a.D);
      rows[0] += more.x, rows[1] += more.y, rows[2] += more.z, rows[3] += more.w;
    }
  }
  if (biased) {
    float bias[4], gate[4];
    load4(a.bias.data, a.bias.dtype, column, bias);
    load4(a.gate.data, a.gate.dtype, b * a.gate.batch_stride + column, gate);
#pragma unroll
    for (int e = 0; e < 4; ++e) total[e] += bias[e] * rows[e];
    *reinterpret_cast<float4*>(base + 3 * a.D) =
        make_float4(gate[0] * rows[0], gate[1] * rows[1], gate[2] * rows[2], gate[3] * rows[3]);
  }
  store4(to.data, to.dtype, b * to.batch_stride + column, total);
}

// Third stage: 32 columns of dbias. 32 warps take every 32nd sample each, in order, then are added
// in order: a column is short of work (one value per sample), so that many loads must be in flight.
constexpr int kBiasWarps = 32;

__global__ void __launch_bounds__(kBiasWarps* kWarp)
    adaln_bias_kernel(const __grid_constant__ AdalnBackward a) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(kWarp) + threadIdx.x;
  const int64_t chunks = (a.N + a.rows - 1) / a.rows;
  float total = 0.0f;
  if (column < a.D) {
#pragma unroll 4
    for (int64_t b = threadIdx.y; b < a.B; b += kBiasWarps) {
      total += a.partial[(b * chunks * 4 + 3) * a.D + column];
    }
  }
  float* const sums = shared_floats();
  sums[threadIdx.y * kWarp + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= a.D) return;
  for (int warp = 1; warp < kBiasWarps; ++warp) total += sums[warp * kWarp + threadIdx.x];
  store1(a.dbias.data, a.dbias.dtype, column, total);
}

// The dtypes of (x, h or y) that there are kernels for: all one dtype, or a float32 residual stream
// with bfloat16 branches, which is what autocast makes.
#define ETUDE_BY_DTYPE(function, x, h, ...)                                              \
  do {                                                                                   \
    if (x == kFloat32 && h == kFloat32) return function<float, float>(__VA_ARGS__);      \
    if (x == kFloat32 && h == kBFloat16) return function<float, __nv_bfloat16>(__VA_ARGS__); \
    if (x == kBFloat16 && h == kBFloat16)                                                \
      return function<__nv_bfloat16, __nv_bfloat16>(__VA_ARGS__);                        \
    if (x == kFloat16 && h == kFloat16) return function<__half, __half>(__VA_ARGS__);    \
    throw std::runtime_error("adaln: no CUDA kernel for these dtypes");                  \
  } while (false)

void backward_rows(int x, int h, const AdalnBackward& a, const Place& place) {
  ETUDE_BY_DTYPE(backward_of, x, h, a, place);
}

void check_width(int64_t D) {
  if (D % 8 != 0 || D > kMaxWidth) throw std::runtime_error("adaln: no CUDA kernel for this width");
}

}  // namespace

void adaln_forward(const AdalnForward& a, const Place& place) {
  check_width(a.D);
  const int branch = a.h.data != nullptr ? a.h.dtype : a.y.dtype;
  if (a.y.data != nullptr && a.y.dtype != branch) {
    throw std::runtime_error("adaln: h and y must have one dtype");
  }
  ETUDE_BY_DTYPE(forward_of, a.x.dtype, branch, a, place);
}

void adaln_backward(const AdalnBackward& a, const Place& place) {
  check_width(a.D);
  const int stream = a.x.data != nullptr ? a.x.dtype : a.dout.dtype;
  backward_rows(stream, a.h.data != nullptr ? a.h.dtype : a.dy.dtype, a, place);
  const int64_t across = (a.D / 4 + kReduceThreads - 1) / kReduceThreads;
  const dim3 grid(grid_size(a.B * across, "adaln_reduce"), 3);
  launch("adaln_reduce", place, grid, kReduceThreads, 0, adaln_reduce_kernel, a);
  if (a.bias.data == nullptr) return;
  launch("adaln_bias", place, static_cast<unsigned>((a.D + kWarp - 1) / kWarp),
         dim3(kWarp, kBiasWarps), sizeof(float) * kBiasWarps * kWarp, adaln_bias_kernel, a);
}

}  // namespace etude
