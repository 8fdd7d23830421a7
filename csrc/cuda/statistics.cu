// The scatter matrix of rows in float64, on the double-precision tensor cores. The equations are in
// kernels/statistics.py; kernels/statistics_cuda.py is the only caller.
//
// scatter = C^T C for the centred rows C, (N, D). A block makes one 64 x 64 tile on or above the
// diagonal from a run of rows: half of the products that a library's C^T C takes, and C is never
// written. 16 rows of the tile's two column blocks are widened and centred once, when they are
// stored to shared memory; while the tensor cores use them, the next 16 rows are on their way from
// memory to registers.
//
// Each of the four warps has 32 x 32 of the tile: 16 products of 8 x 8 x 4 from 4 + 4 operands, so
// two operands of shared memory feed four products. An operand is a double per lane, of 4 rows and
// 8 columns; half a warp reads at a time, 4 columns of each row. With rows 68 doubles apart these
// 16 doubles are in different banks, of which there are 16 of 8 bytes.
//
// Sums over runs of rows are added by a second kernel, in order: no atomics, the same bits always.
#include "statistics.h"

#include <mma.h>

#include "common.cuh"

namespace etude {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kTile = kMomentsTile;
constexpr int kDepth = 16;          // rows in shared memory at a time
constexpr int kPitch = kTile + 4;   // doubles between them
constexpr int kSide = kDepth * kPitch;
constexpr int kThreads = 128;
constexpr int kStep = kThreads / kTile;   // rows that all threads load at once
constexpr int kLoads = kDepth / kStep;
constexpr int kWarpTile = 32;
constexpr int kProducts = kWarpTile / 8;  // along a side of a warp's part
constexpr size_t kShared = 4 * kSide * sizeof(double);  // two sides, twice

using Left = wmma::fragment<wmma::matrix_a, 8, 8, 4, double, wmma::col_major>;
using Right = wmma::fragment<wmma::matrix_b, 8, 8, 4, double, wmma::row_major>;
using Sum = wmma::fragment<wmma::accumulator, 8, 8, 4, double>;

struct Pair {
  int64_t i, j;
};

// The t-th tile on or above the diagonal, row by row.
__device__ __forceinline__ Pair tile_at(int64_t t, int64_t tiles) {
  int64_t i = 0;
  for (; t >= tiles - i; ++i) t -= tiles - i;
  return {i * kTile, (i + t) * kTile};
}

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }

// One column of one side: what a thread loads of every kDepth rows.
template <class T>
struct Column {
  const T* from;
  double mean;
  bool inside;
  float values[kLoads];

  __device__ __forceinline__ Column(const Moments& a, int64_t column) {
    inside = column < a.D;
    from = static_cast<const T*>(a.x) + (inside ? column : 0);
    mean = inside ? a.mean[column] : 0.0;
  }
  __device__ __forceinline__ void fetch(int64_t row, int64_t end, int64_t stride) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t at = row + i * kStep;
      values[i] = inside && at < end ? widened(from[at * stride]) : 0.0f;
    }
  }
  // Rows and columns that are not there become 0, not minus the mean.
  __device__ __forceinline__ void keep(int64_t row, int64_t end, double* to) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool there = row + i * kStep < end;
      to[i * kStep * kPitch] = there ? static_cast<double>(values[i]) - mean : 0.0;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) moments_kernel(const __grid_constant__ Moments a) {
  double* const shared = reinterpret_cast<double*>(shared_bytes);  // (2, side, kDepth, kPitch)
  const int64_t tiles = (a.D + kTile - 1) / kTile, count = tiles * (tiles + 1) / 2;
  const int64_t run = blockIdx.x / count, tile = blockIdx.x % count;
  const Pair corner = tile_at(tile, tiles);
  const int64_t end = (run + 1) * a.rows < a.N ? (run + 1) * a.rows : a.N;
  const int column = threadIdx.x % kTile, depth = threadIdx.x / kTile;
  const int put = depth * kPitch + column;
  Column<T> left(a, corner.i + column), right(a, corner.j + column);

  const int warp = threadIdx.x / kWarp;
  const int top = warp / 2 * kWarpTile, side = warp % 2 * kWarpTile;
  Sum sums[kProducts][kProducts];
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) wmma::fill_fragment(sums[m][n], 0.0);
  }

  int64_t row = run * a.rows;
  left.fetch(row + depth, end, a.stride);
  right.fetch(row + depth, end, a.stride);
  // Two buffers, one barrier: a buffer is written again only after the barrier behind which every
  // warp has begun with the other one, so is done with it.
  for (int buffer = 0; row < end; row += kDepth, buffer ^= 1) {
    double* const one = shared + 2 * buffer * kSide;
    double* const two = one + kSide;
    left.keep(row + depth, end, one + put);
    right.keep(row + depth, end, two + put);
    __syncthreads();
    if (row + kDepth < end) {
      left.fetch(row + kDepth + depth, end, a.stride);
      right.fetch(row + kDepth + depth, end, a.stride);
    }
#pragma unroll
    for (int k = 0; k < kDepth; k += 4) {
      Left lefts[kProducts];
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        wmma::load_matrix_sync(lefts[m], one + k * kPitch + top + 8 * m, kPitch);
      }
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        Right operand;
        wmma::load_matrix_sync(operand, two + k * kPitch + side + 8 * n, kPitch);
#pragma unroll
        for (int m = 0; m < kProducts; ++m) {
          wmma::mma_sync(sums[m][n], lefts[m], operand, sums[m][n]);
        }
      }
    }
  }
  double* const part = a.parts + (run * count + tile) * (kTile * kTile);
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      wmma::store_matrix_sync(part + (top + 8 * m) * kTile + side + 8 * n, sums[m][n], kTile,
                              wmma::mem_row_major);
    }
  }
}

// A tile's runs added in order; then the tile and, through shared memory so that both are written
// along rows, its mirror image.
__global__ void __launch_bounds__(256)
    moments_finish_kernel(const __grid_constant__ Moments a, int64_t runs) {
  double* const turned = reinterpret_cast<double*>(shared_bytes);  // (kTile, kTile + 1)
  const int64_t tiles = (a.D + kTile - 1) / kTile, count = gridDim.x;
  const Pair corner = tile_at(blockIdx.x, tiles);
  const bool diagonal = corner.i == corner.j;
  const double* const first = a.parts + static_cast<int64_t>(blockIdx.x) * (kTile * kTile);
  for (int e = threadIdx.x; e < kTile * kTile; e += 256) {
    const int r = e / kTile, c = e % kTile;
    double sum = first[e];
    for (int64_t run = 1; run < runs; ++run) sum += first[run * count * (kTile * kTile) + e];
    turned[r * (kTile + 1) + c] = sum;
    const int64_t i = corner.i + r, j = corner.j + c;
    if (i < a.D && j < a.D && (!diagonal || r <= c)) a.scatter[i * a.D + j] = sum;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kTile * kTile; e += 256) {
    const int r = e % kTile, c = e / kTile;
    const int64_t i = corner.i + r, j = corner.j + c;
    if (i >= a.D || j >= a.D || (diagonal && r >= c)) continue;
    a.scatter[j * a.D + i] = turned[r * (kTile + 1) + c];
  }
}

}  // namespace

void moments(const Moments& a, const Place& place) {
  const int64_t tiles = (a.D + kTile - 1) / kTile, count = tiles * (tiles + 1) / 2;
  const int64_t runs = (a.N + a.rows - 1) / a.rows;
  const auto kernel = a.dtype == kFloat32    ? moments_kernel<float>
                      : a.dtype == kBFloat16 ? moments_kernel<__nv_bfloat16>
                                             : moments_kernel<__half>;
  launch("moments", place, grid_size(count * runs, "moments"), kThreads, kShared, kernel, a);
  launch("moments", place, grid_size(count, "moments"), 256,
         kTile * (kTile + 1) * sizeof(double), moments_finish_kernel, a, runs);
}

}  // namespace etude
