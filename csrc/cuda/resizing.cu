// Resizing of 8-bit pictures with Pillow's bytes, or by TensorFlow 1's rule. The equations are in
// kernels/resizing.py; kernels/resizing_cuda.py is the only caller.
//
// Every kernel gives a thread one element of a row ((column, channel), numbered in the order of the
// output's memory: what is written is the larger part) and several rows, so that what depends on
// the column alone, divisions included, is done once. Neighbouring threads read bytes of the same
// or neighbouring sectors; that inputs are read by several outputs is the first-level cache's
// affair.
//
// resize_both_kernel never writes the bytes between the two passes to memory. A block makes them
// for all input rows that its output rows need, in shared memory, and the rows that two blocks need
// are made twice: a halo of the filter's width, 4 rows in 31 for 256 to 299 in tiles of 32.
//
// Sums are whole numbers, and each float operation is rounded by itself (the _rn intrinsics are
// never contracted to a fused multiply-add): every output has the reference's bits.
#include "resizing.h"

#include "common.cuh"

namespace etude {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 5;  // per multiprocessor: 48 registers per thread, 44 KB of shared memory
constexpr int kLanes = kResizeLanes;
constexpr int kGroups = kThreads / kLanes;  // rows of threads over a block's elements
constexpr int kBits = 22;                   // of a weight's fraction
constexpr int kHalf = 1 << (kBits - 1);
constexpr int kAtOnce = 4;   // rows of one thread that share a weight once it is loaded
constexpr int kRows = 16;    // rows of a block where there is no shared memory to size it by

// The block's picture, its first row and its first element.
struct Tile {
  int64_t b, lane;
  int row;
};

__device__ __forceinline__ Tile tile_of(const Resize& a, int lanes, int rows) {
  const unsigned wide = static_cast<unsigned>((static_cast<int64_t>(a.W) * a.C + lanes - 1) / lanes);
  const unsigned high = static_cast<unsigned>((a.H + rows - 1) / rows);
  const unsigned block = blockIdx.x / wide;
  return {block / high, static_cast<int64_t>(blockIdx.x % wide) * lanes,
          static_cast<int>(block % high) * rows};
}

// One element of every row: its column and channel, and where it is in row 0 of picture 0.
struct Lane {
  int w, c;
  int64_t at;
  float scale, offset;
};

__device__ __forceinline__ Lane lane_of(const Resize& a, int64_t e) {
  Lane made;
  const int64_t quotient = a.planar ? e / a.W : e / a.C;
  const int rest = static_cast<int>(e - quotient * (a.planar ? a.W : a.C));
  made.w = a.planar ? rest : static_cast<int>(quotient);
  made.c = a.planar ? static_cast<int>(quotient) : rest;
  made.at = a.planar ? static_cast<int64_t>(made.c) * a.H * a.W + made.w : e;
  made.scale = a.dtype == kBytes ? 0.0f : a.scale[made.c];
  made.offset = a.dtype == kBytes ? 0.0f : a.offset[made.c];
  return made;
}

__device__ __forceinline__ int64_t row_of(const Resize& a, int64_t b, int row) {
  const int64_t pitch = a.planar ? a.W : static_cast<int64_t>(a.W) * a.C;
  return b * a.H * a.W * a.C + row * pitch;
}

__device__ __forceinline__ int to_byte(int sum) {
  const int value = sum >> kBits;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

__device__ __forceinline__ float normalise(float value, const Lane& lane) {
  return __fadd_rn(__fmul_rn(value, lane.scale), lane.offset);
}

__device__ __forceinline__ void put(const Resize& a, int64_t row, const Lane& lane, int value) {
  if (a.dtype == kBytes) {
    static_cast<uint8_t*>(a.out)[row + lane.at] = static_cast<uint8_t>(value);
  } else {
    store1(a.out, a.dtype, row + lane.at, normalise(static_cast<float>(value), lane));
  }
}

// One column of kAtOnce rows along the width. Rows from `last` on are row last - 1 again: loads
// need no mask, and the caller stores what is wanted.
__device__ __forceinline__ void sum_across(const uint8_t* x, int64_t x_h, int64_t x_w, int row,
                                           int last, const Axis& axis, int w, int W, int count,
                                           int (&sums)[kAtOnce]) {
  const uint8_t* from[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    from[i] = x + (row + i < last ? row + i : last - 1) * x_h;
    sums[i] = kHalf;
  }
  for (int k = 0; k < count; ++k) {
    const int weight = axis.weights[static_cast<int64_t>(k) * W + w];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      sums[i] += weight * static_cast<int>(*from[i]);
      from[i] += x_w;
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    resize_both_kernel(const __grid_constant__ Resize a, const __grid_constant__ Axis across,
                       const __grid_constant__ Axis down, int rows) {
  uint8_t* const middle = shared_bytes;  // (input rows, kLanes)
  const Tile tile = tile_of(a, kLanes, rows);
  const int64_t elements = static_cast<int64_t>(a.W) * a.C;
  const int end = tile.row + rows < a.H ? tile.row + rows : a.H;
  const int top = down.bounds[2 * tile.row];
  const int bottom = down.bounds[2 * (end - 1)] + down.bounds[2 * (end - 1) + 1];

  const int64_t mine = tile.lane + threadIdx.x % kLanes;
  if (mine < elements) {
    const Lane lane = lane_of(a, mine);
    const int first = across.bounds[2 * lane.w], count = across.bounds[2 * lane.w + 1];
    const uint8_t* x = a.x + tile.b * a.x_b + lane.c * a.x_c + first * a.x_w;
    for (int row = top + threadIdx.x / kLanes * kAtOnce; row < bottom; row += kGroups * kAtOnce) {
      int sums[kAtOnce];
      sum_across(x, a.x_h, a.x_w, row, bottom, across, lane.w, a.W, count, sums);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (row + i >= bottom) continue;
        middle[(row + i - top) * kLanes + threadIdx.x % kLanes] =
            static_cast<uint8_t>(to_byte(sums[i]));
      }
    }
  }
  __syncthreads();

  // A warp makes a row of the tile, four elements per thread: one 32-bit word of shared memory
  // feeds four sums (no two lanes share a bank), and the weight is the same for the whole warp.
  const int quad = threadIdx.x % kWarp * 4;
  if (tile.lane + quad >= elements) return;
  Lane lanes[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t e = tile.lane + quad + j;
    lanes[j] = lane_of(a, e < elements ? e : elements - 1);
  }
  for (int row = tile.row + threadIdx.x / kWarp; row < end; row += kThreads / kWarp) {
    const int first = down.bounds[2 * row], count = down.bounds[2 * row + 1];
    const int32_t* weights = down.weights + static_cast<int64_t>(row) * down.taps;
    const uint8_t* from = middle + (first - top) * kLanes + quad;
    int sums[4] = {kHalf, kHalf, kHalf, kHalf};
    for (int k = 0; k < count; ++k, from += kLanes) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
      const int weight = weights[k];
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += weight * static_cast<int>(word >> 8 * j & 255u);
    }
    const int64_t at = row_of(a, tile.b, row);
    if (a.vectors) {
      if (a.dtype == kBytes) {
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) word |= static_cast<uint32_t>(to_byte(sums[j])) << 8 * j;
        *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(a.out) + at + lanes[0].at) = word;
      } else {
        float values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[j] = normalise(static_cast<float>(to_byte(sums[j])), lanes[j]);
        }
        store4(a.out, a.dtype, at + lanes[0].at, values);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (tile.lane + quad + j < elements) put(a, at, lanes[j], to_byte(sums[j]));
      }
    }
  }
}

// One axis: for filters too wide for shared memory, and pictures whose height is done first.
template <bool kDown>
__global__ void __launch_bounds__(kThreads, kBlocks)
    resize_one_kernel(const __grid_constant__ Resize a, const __grid_constant__ Axis axis) {
  const Tile tile = tile_of(a, kLanes, kRows);
  const int64_t mine = tile.lane + threadIdx.x % kLanes;
  if (mine >= static_cast<int64_t>(a.W) * a.C) return;
  const Lane lane = lane_of(a, mine);
  const int end = tile.row + kRows < a.H ? tile.row + kRows : a.H;
  const int group = threadIdx.x / kLanes;
  const uint8_t* x = a.x + tile.b * a.x_b + lane.c * a.x_c;
  if constexpr (kDown) {
    x += lane.w * a.x_w;
    for (int row = tile.row + group; row < end; row += kGroups) {
      const int first = axis.bounds[2 * row], count = axis.bounds[2 * row + 1];
      const int32_t* weights = axis.weights + static_cast<int64_t>(row) * axis.taps;
      const uint8_t* from = x + first * a.x_h;
      int sum = kHalf;
      for (int k = 0; k < count; ++k, from += a.x_h) sum += weights[k] * static_cast<int>(*from);
      put(a, row_of(a, tile.b, row), lane, to_byte(sum));
    }
  } else {
    const int first = axis.bounds[2 * lane.w], count = axis.bounds[2 * lane.w + 1];
    x += first * a.x_w;
    for (int row = tile.row + group * kAtOnce; row < end; row += kGroups * kAtOnce) {
      int sums[kAtOnce];
      sum_across(x, a.x_h, a.x_w, row, end, axis, lane.w, a.W, count, sums);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (row + i < end) put(a, row_of(a, tile.b, row + i), lane, to_byte(sums[i]));
      }
    }
  }
}

// Four bytes per output at most: a row that was interpolated for one output row is kept for the
// next, which for an enlarged picture needs it again. All threads of a block take the same turn.
__global__ void __launch_bounds__(kThreads)
    resize_tf1_kernel(const __grid_constant__ Resize a, const __grid_constant__ Lerp across,
                      const __grid_constant__ Lerp down) {
  const Tile tile = tile_of(a, kThreads, kRows);
  const int64_t mine = tile.lane + threadIdx.x;
  if (mine >= static_cast<int64_t>(a.W) * a.C) return;
  const Lane lane = lane_of(a, mine);
  const int end = tile.row + kRows < a.H ? tile.row + kRows : a.H;
  const uint8_t* x = a.x + tile.b * a.x_b + lane.c * a.x_c;
  const int64_t left = across.low[lane.w] * a.x_w, right = across.high[lane.w] * a.x_w;
  const float share = across.share[lane.w];
  const auto lerp = [](float low, float high, float share) {
    return __fadd_rn(low, __fmul_rn(__fsub_rn(high, low), share));
  };
  const auto interpolated = [&](int row) {
    const uint8_t* from = x + row * a.x_h;
    return lerp(static_cast<float>(from[left]), static_cast<float>(from[right]), share);
  };
  float upper = 0.0f, lower = 0.0f;
  int at_upper = -1, at_lower = -1;
  for (int row = tile.row; row < end; ++row) {
    const int low = down.low[row], high = down.high[row];
    if (low != at_upper) upper = low == at_lower ? lower : interpolated(low);
    at_upper = low;
    if (high != at_lower) lower = high == at_upper ? upper : interpolated(high);
    at_lower = high;
    const float value = normalise(lerp(upper, lower, down.share[row]), lane);
    store1(a.out, a.dtype, row_of(a, tile.b, row) + lane.at, value);
  }
}

unsigned blocks(const Resize& a, int lanes, int rows) {
  const int64_t wide = (static_cast<int64_t>(a.W) * a.C + lanes - 1) / lanes;
  return grid_size(a.B * wide * ((a.H + rows - 1) / rows), "resize");
}

}  // namespace

void resize_both(const Resize& a, const Axis& across, const Axis& down, int rows, int span,
                 const Place& place) {
  const int64_t shared = static_cast<int64_t>(span) * kLanes;
  if (shared > kResizeShared) throw std::runtime_error("resize: too many rows for shared memory");
  launch("resize", place, blocks(a, kLanes, rows), kThreads, static_cast<size_t>(shared),
         resize_both_kernel, a, across, down, rows);
}

void resize_one(const Resize& a, const Axis& axis, bool down, const Place& place) {
  launch("resize", place, blocks(a, kLanes, kRows), kThreads, 0,
         down ? resize_one_kernel<true> : resize_one_kernel<false>, a, axis);
}

void resize_tf1(const Resize& a, const Lerp& across, const Lerp& down, const Place& place) {
  launch("resize", place, blocks(a, kThreads, kRows), kThreads, 0, resize_tf1_kernel, a, across,
         down);
}

}  // namespace etude
