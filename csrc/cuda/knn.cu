// How many balls each query is in, and how many queries each ball has. The equations are in
// kernels/knn.py; kernels/knn_cuda.py is the only caller.
//
// Inner products of centred rows in float64 on the double-precision tensor cores: a distance is
// then the reference's, rounded to float32 alike, and no pair needs a second look. A block makes
// the products of 64 queries and 64 references, 16 columns at a time, as statistics.cu does, but
// with the roles turned: both operands' rows are rows of the sets, so a row's columns are
// neighbours in shared memory too. With rows 20 doubles apart the 4 x 4 doubles that half a warp
// reads, and the 16 that it stores, are in different banks.
//
// Counts of a tile fit a byte and are added afterwards: no atomics, and no matrix of distances.
#include "knn.h"

#include <mma.h>

#include "common.cuh"

namespace etude {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kTile = kCountTile;
constexpr int kDepth = 16;
constexpr int kPitch = kDepth + 4;
constexpr int kSide = kTile * kPitch;
constexpr int kThreads = 128;
constexpr int kStep = kThreads / kDepth;  // rows that all threads load at once
constexpr int kLoads = kTile / kStep;
constexpr int kWarpTile = 32;
constexpr int kProducts = kWarpTile / 8;
constexpr int kWide = kTile + 4;  // between rows of products, which take the operands' place
constexpr size_t kShared = 4 * kSide * sizeof(double);
constexpr int kFlags = kTile * kWide * sizeof(double);  // bytes before what each pair is
static_assert(kFlags + kTile * kTile + kThreads <= kShared, "counting needs no more memory");

using Left = wmma::fragment<wmma::matrix_a, 8, 8, 4, double, wmma::row_major>;
using Right = wmma::fragment<wmma::matrix_b, 8, 8, 4, double, wmma::col_major>;
using Sum = wmma::fragment<wmma::accumulator, 8, 8, 4, double>;

// One column of a tile's rows: what a thread loads at a time.
struct Column {
  float values[kLoads];

  __device__ __forceinline__ void fetch(const float* from, int64_t row, int64_t rows, int64_t d,
                                        int64_t D) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t at = row + i * kStep;
      values[i] = at < rows && d < D ? from[at * D + d] : 0.0f;
    }
  }
  // Rows that are not there are of no account; columns that are not there have a centre of 0.
  __device__ __forceinline__ void keep(double centre, double* to) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      to[i * kStep * kPitch] = static_cast<double>(values[i]) - centre;
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    membership_kernel(const __grid_constant__ Counts a) {
  double* const shared = reinterpret_cast<double*>(shared_bytes);  // (2, side, kTile, kPitch)
  const int64_t tiles = (a.M + kTile - 1) / kTile;
  const int64_t tile_i = blockIdx.x / tiles, tile_j = blockIdx.x % tiles;
  const int64_t i0 = tile_i * kTile, j0 = tile_j * kTile;
  const int depth = threadIdx.x % kDepth, row = threadIdx.x / kDepth;
  const int put = row * kPitch + depth;
  const int warp = threadIdx.x / kWarp;
  const int top = warp / 2 * kWarpTile, side = warp % 2 * kWarpTile;
  Sum sums[kProducts][kProducts];
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) wmma::fill_fragment(sums[m][n], 0.0);
  }

  Column left, right;
  left.fetch(a.query, i0 + row, a.N, depth, a.D);
  right.fetch(a.reference, j0 + row, a.M, depth, a.D);
  int buffer = 0;
  for (int64_t start = 0; start < a.D; start += kDepth, buffer ^= 1) {
    double* const one = shared + 2 * buffer * kSide;
    double* const two = one + kSide;
    const int64_t d = start + depth;
    const double centre = d < a.D ? a.centre[d] : 0.0;
    left.keep(centre, one + put);
    right.keep(centre, two + put);
    __syncthreads();
    if (start + kDepth < a.D) {
      left.fetch(a.query, i0 + row, a.N, d + kDepth, a.D);
      right.fetch(a.reference, j0 + row, a.M, d + kDepth, a.D);
    }
#pragma unroll
    for (int k = 0; k < kDepth; k += 4) {
      Left lefts[kProducts];
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        wmma::load_matrix_sync(lefts[m], one + (top + 8 * m) * kPitch + k, kPitch);
      }
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        Right operand;
        wmma::load_matrix_sync(operand, two + (side + 8 * n) * kPitch + k, kPitch);
#pragma unroll
        for (int m = 0; m < kProducts; ++m) {
          wmma::mma_sync(sums[m][n], lefts[m], operand, sums[m][n]);
        }
      }
    }
  }
  __syncthreads();  // the products take the operands' place
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      wmma::store_matrix_sync(shared + (top + 8 * m) * kWide + side + 8 * n, sums[m][n], kWide,
                              wmma::mem_row_major);
    }
  }
  __syncthreads();

  // A thread takes half a column, then (of the first 64) a row.
  uint8_t* const flags = shared_bytes + kFlags;
  uint8_t* const halves = flags + kTile * kTile;
  const int c = threadIdx.x % kTile, half = threadIdx.x / kTile;
  const int64_t j = j0 + c;
  const double norm = j < a.M ? a.reference_norms[j] : 0.0;
  const float radius = j < a.M ? a.radii[j] : 0.0f;
  int count = 0;
  for (int r = half * (kTile / 2); r < (half + 1) * (kTile / 2); ++r) {
    bool inside = false;
    if (i0 + r < a.N && j < a.M) {
      const double scale = __dadd_rn(a.query_norms[i0 + r], norm);
      const double squared = __dsub_rn(scale, __dmul_rn(2.0, shared[r * kWide + c]));
      const bool equal = squared < __dmul_rn(1e-13, scale);
      inside = (equal ? 0.0f : static_cast<float>(__dsqrt_rn(squared))) < radius;
    }
    flags[r * kTile + c] = inside;
    count += inside;
  }
  halves[threadIdx.x] = static_cast<uint8_t>(count);
  __syncthreads();
  if (half != 0) return;
  if (j < a.M) {
    a.per_reference[tile_i * a.M + j] = static_cast<uint8_t>(halves[c] + halves[c + kTile]);
  }
  if (i0 + c >= a.N) return;
  int total = 0;
  for (int k = 0; k < kTile; ++k) total += flags[c * kTile + k];
  a.per_query[tile_j * a.N + i0 + c] = static_cast<uint8_t>(total);
}

}  // namespace

void membership_counts(const Counts& a, const Place& place) {
  const int64_t blocks = ((a.N + kTile - 1) / kTile) * ((a.M + kTile - 1) / kTile);
  launch("membership_counts", place, grid_size(blocks, "membership_counts"), kThreads, kShared,
         membership_kernel, a);
}

}  // namespace etude
