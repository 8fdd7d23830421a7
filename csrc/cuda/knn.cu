// The k nearest rows of another set, and how many balls each query is in. The equations are in
// kernels/knn.py; kernels/knn_cuda.py is the only caller.
//
// Inner products of centred rows in float64 on the double-precision tensor cores: a distance is
// then the reference's, rounded to float32 alike, and no pair needs a second look. A block makes
// the products of 64 queries and 64 references, 16 columns at a time, as statistics.cu does, but
// with the roles turned: both operands' rows are rows of the sets, so a row's columns are
// neighbours in shared memory too. With rows 20 doubles apart the 4 x 4 doubles that half a warp
// reads, and the 16 that it stores, are in different banks.
//
// Counts of a tile fit a byte and are added afterwards. Neighbours are whole numbers that hold a
// distance's bits above and its row below: a row's k smallest are a set, whatever the order in
// which they were met, and ties are decided. No atomics, and no matrix of distances.
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

// The products (kTile, kTile) of the rows from i0 and from j0, left in shared memory with kWide
// between rows, behind a barrier. They take the operands' place.
__device__ __forceinline__ void tile_products(const Sets& a, int64_t i0, int64_t j0) {
  double* const shared = reinterpret_cast<double*>(shared_bytes);  // (2, side, kTile, kPitch)
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
}

// |a|^2 + |b|^2 - 2 a.b, each operation rounded by itself as the reference's; of equal rows it is 0.
__device__ __forceinline__ double squared_distance(double one, double two, double product) {
  const double scale = __dadd_rn(one, two);
  const double squared = __dsub_rn(scale, __dmul_rn(2.0, product));
  return squared < __dmul_rn(1e-13, scale) ? 0.0 : squared;
}

__global__ void __launch_bounds__(kThreads)
    membership_kernel(const __grid_constant__ Counts counts) {
  const Sets& a = counts.sets;
  const double* const shared = reinterpret_cast<const double*>(shared_bytes);
  const int64_t tiles = (a.M + kTile - 1) / kTile;
  const int64_t tile_i = blockIdx.x / tiles, tile_j = blockIdx.x % tiles;
  const int64_t i0 = tile_i * kTile, j0 = tile_j * kTile;
  tile_products(a, i0, j0);

  // A thread takes half a column, then (of the first 64) a row.
  uint8_t* const flags = shared_bytes + kFlags;
  uint8_t* const halves = flags + kTile * kTile;
  const int c = threadIdx.x % kTile, half = threadIdx.x / kTile;
  const int64_t j = j0 + c;
  const double norm = j < a.M ? a.reference_norms[j] : 0.0;
  const float radius = j < a.M ? counts.radii[j] : 0.0f;
  int count = 0;
  for (int r = half * (kTile / 2); r < (half + 1) * (kTile / 2); ++r) {
    bool inside = false;
    if (i0 + r < a.N && j < a.M) {
      const double squared = squared_distance(a.query_norms[i0 + r], norm, shared[r * kWide + c]);
      inside = static_cast<float>(__dsqrt_rn(squared)) < radius;
    }
    flags[r * kTile + c] = inside;
    count += inside;
  }
  halves[threadIdx.x] = static_cast<uint8_t>(count);
  __syncthreads();
  if (half != 0) return;
  if (j < a.M) {
    counts.per_reference[tile_i * a.M + j] = static_cast<uint8_t>(halves[c] + halves[c + kTile]);
  }
  if (i0 + c >= a.N) return;
  int total = 0;
  for (int k = 0; k < kTile; ++k) total += flags[c * kTile + k];
  counts.per_query[tile_j * a.N + i0 + c] = static_cast<uint8_t>(total);
}

// A number per neighbour: smaller is nearer, then of smaller index. What is not a number is last.
constexpr uint64_t kNone = ~uint64_t{0};

__device__ __forceinline__ uint64_t key_of(double squared, int64_t j) {
  const float distance = static_cast<float>(__dsqrt_rn(squared));
  const uint32_t bits = distance == distance ? __float_as_uint(distance) : 0x7fc00000u;
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(j);
}

// Puts the lanes' keys that are below the k-th into `best`, 32 numbers in order, one per lane. Most
// calls find none: after some tiles a row's list changes rarely.
__device__ __forceinline__ void gather(uint64_t& best, uint64_t key, int k, int lane) {
  const uint64_t worst = __shfl_sync(kAllLanes, best, k - 1);
  unsigned votes = __ballot_sync(kAllLanes, key < worst);
  for (; votes != 0; votes &= votes - 1) {
    const uint64_t one = __shfl_sync(kAllLanes, key, __ffs(votes) - 1);
    const int place = __popc(__ballot_sync(kAllLanes, best < one));
    const uint64_t before = __shfl_up_sync(kAllLanes, best, 1);
    best = lane < place ? best : lane == place ? one : before;
  }
}

// The k nearest of 64 rows among one part's columns. Blocks that run at one time are all parts of a
// few tiles of rows: each part's columns and those rows' are read from memory once and are then in
// the second-level cache.
__global__ void __launch_bounds__(kThreads, 3)
    nearest_kernel(const __grid_constant__ Nearest nearest) {
  const Sets& a = nearest.sets;
  const int k = nearest.k;
  const double* const products = reinterpret_cast<const double*>(shared_bytes);
  uint64_t* const lists = reinterpret_cast<uint64_t*>(shared_bytes + kShared);  // (kTile, k)
  const int64_t i0 = blockIdx.x / nearest.parts * kTile, part = blockIdx.x % nearest.parts;
  const int64_t first = part * nearest.columns;
  const int64_t end = first + nearest.columns < a.M ? first + nearest.columns : a.M;
  const int lane = threadIdx.x % kWarp;
  for (int at = threadIdx.x; at < kTile * k; at += kThreads) lists[at] = kNone;

  for (int64_t j0 = first; j0 < end; j0 += kTile) {
    tile_products(a, i0, j0);
    // A warp takes every fourth row, a lane two columns of it.
    double norms[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t j = j0 + half * kWarp + lane;
      norms[half] = j < end ? a.reference_norms[j] : 0.0;
    }
    for (int r = threadIdx.x / kWarp; r < kTile && i0 + r < a.N; r += kThreads / kWarp) {
      const uint64_t worst = lists[r * k + k - 1];
      // The k-th distance, squared: exact. What lies beyond it is farther, or as far and of larger
      // index. Not a number until k columns were seen: then nothing lies beyond.
      const double reach = static_cast<double>(__uint_as_float(worst >> 32));
      const double limit = reach * reach;
      const double norm = a.query_norms[i0 + r];
      uint64_t keys[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = half * kWarp + lane;
        const int64_t j = j0 + c;
        keys[half] = kNone;
        if (j >= end || (nearest.own && j == i0 + r)) continue;
        const double squared = squared_distance(norm, norms[half], products[r * kWide + c]);
        if (!(squared > limit)) keys[half] = key_of(squared, j);
      }
      if (__ballot_sync(kAllLanes, keys[0] < worst || keys[1] < worst) == 0) continue;
      uint64_t best = lane < k ? lists[r * k + lane] : kNone;
      gather(best, keys[0], k, lane);
      gather(best, keys[1], k, lane);
      if (lane < k) lists[r * k + lane] = best;
    }
    __syncthreads();  // the next operands take the products' place
  }
  for (int at = threadIdx.x; at < kTile * k; at += kThreads) {
    const int64_t i = i0 + at / k;
    if (i < a.N) nearest.keys[(i * nearest.parts + part) * k + at % k] = lists[at];
  }
}

// A warp takes one row: the k nearest of all parts, then their distances from the rows as given, by
// differences in float64, and their order by these.
__global__ void __launch_bounds__(kThreads)
    nearest_finish_kernel(const __grid_constant__ Nearest nearest) {
  const Sets& a = nearest.sets;
  const int k = nearest.k, lane = threadIdx.x % kWarp;
  const int64_t i = blockIdx.x * int64_t{kThreads / kWarp} + threadIdx.x / kWarp;
  if (i >= a.N) return;
  const int64_t count = nearest.parts * k;
  const uint64_t* const keys = nearest.keys + i * count;
  uint64_t best = kNone;
  for (int64_t at = 0; at < count; at += kWarp) {
    gather(best, at + lane < count ? keys[at + lane] : kNone, k, lane);
  }
  const float* const x = a.query + i * a.D;
  uint64_t mine = kNone;  // of neighbour `lane`
  for (int n = 0; n < k; ++n) {
    const int64_t j = __shfl_sync(kAllLanes, best, n) & 0xffffffffu;
    const float* const y = a.reference + j * a.D;
    double sum = 0.0;
    for (int64_t d = lane; d < a.D; d += kWarp) {
      const double gap = static_cast<double>(x[d]) - static_cast<double>(y[d]);
      sum += gap * gap;
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
    if (lane == n) mine = key_of(sum, j);
  }
  best = kNone;
  gather(best, mine, k, lane);
  if (lane >= k) return;
  nearest.distance[i * k + lane] = __uint_as_float(static_cast<uint32_t>(best >> 32));
  nearest.index[i * k + lane] = static_cast<int64_t>(best & 0xffffffffu);
}

}  // namespace

void membership_counts(const Counts& a, const Place& place) {
  const int64_t blocks = ((a.sets.N + kTile - 1) / kTile) * ((a.sets.M + kTile - 1) / kTile);
  launch("membership_counts", place, grid_size(blocks, "membership_counts"), kThreads, kShared,
         membership_kernel, a);
}

void nearest_neighbours(const Nearest& a, const Place& place) {
  const char* const what = "nearest_neighbours";
  if (a.k < 1 || a.k > kWarp) throw std::runtime_error("nearest_neighbours: no kernel for this k");
  const int64_t blocks = (a.sets.N + kTile - 1) / kTile * a.parts;
  const size_t shared = kShared + kTile * a.k * sizeof(uint64_t);
  launch(what, place, grid_size(blocks, what), kThreads, shared, nearest_kernel, a);
  const int64_t rows = kThreads / kWarp;  // of a block
  launch(what, place, grid_size((a.sets.N + rows - 1) / rows, what), kThreads, 0,
         nearest_finish_kernel, a);
}

}  // namespace etude
