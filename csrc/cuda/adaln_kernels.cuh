// Adaptive LayerNorm and gated residuals, forward and backward. The equations are in
// kernels/adaln.py; kernels/adaln_cuda.py is the only caller.
//
// Shape of the work. A diffusion transformer's rows are short (D = 384 to 1152) and many, and every
// row of a sample shares the sample's shift, scale and gate. So a block takes rows of ONE sample,
// puts that sample's modulation into shared memory once, as float32, and gives each row to one
// warp: a row's sums are five shuffles, without a barrier. D = 1152 is 32 lanes x 36 elements =
// nine 8-byte bfloat16 loads per lane, with no lane idle (a power-of-two block of 2048 columns
// would idle 44% of them). Rows above 1152 are shared by four or eight warps, which meet in shared
// memory once per sum.
//
// Backward reads each row once, keeps the column sums of dgate, dshift and dscale in registers over
// all rows of the block, adds the block's warps in order and writes float32 partial sums; a second
// kernel adds the blocks of a sample in order, and with a bias a third one the samples. No atomics:
// the same bits in every run. The traffic is dout, dy, x, h read and dx, dh written, 12 bytes per
// element in bfloat16, plus 24 / rows for the partial sums.
#pragma once
#include "adaln.h"

#include <cuda_pipeline.h>

#include "common.cuh"

namespace etude {
namespace {

// Four warps per block: small blocks leave fewer registers of an SM unused.
template <class L>
constexpr int kForwardWarps = L::W > 4 ? L::W : 4;

// How a row lies in W warps: vector j of lane l in part p starts at column
// ((j * W + p) * 32 + l) * V.
template <int V_, int K_, int W_>
struct Layout {
  static constexpr int V = V_;  // elements per vector
  static constexpr int K = K_;  // vectors per lane
  static constexpr int W = W_;  // warps per row
  static constexpr int kColumns = kWarp * V * K * W;

  static __device__ __forceinline__ int column(int j, int part, int lane) {
    return ((j * W + part) * kWarp + lane) * V;
  }

  // Where four columns lie in shared memory. With V = 8 a lane reads its vector as two float4; all
  // lanes' first halves lie side by side, then the second halves: no bank is hit twice.
  static __device__ __forceinline__ int slot(int column) {
    if (V == 4) return column;
    const int lane = column % (kWarp * V) / V;
    return column / (kWarp * V) * (kWarp * V) + column % V / 4 * (4 * kWarp) + lane * 4;
  }
};

// `bytes` of shared memory: `arrays` of D floats, then two slots per warp for sums over several
// warps.
template <class L>
constexpr size_t shared_size(int arrays, int warps) {
  return sizeof(float) * (arrays * static_cast<size_t>(L::kColumns) + (L::W > 1 ? 4 * warps : 0));
}

template <int V>
__device__ __forceinline__ void add_shared(float* to, const float (&value)[V]) {
#pragma unroll
  for (int half = 0; half < V / 4; ++half) {
    float4* const at = reinterpret_cast<float4*>(to + half * 4 * kWarp);
    float4 four = *at;
    four.x += value[4 * half];
    four.y += value[4 * half + 1];
    four.z += value[4 * half + 2];
    four.w += value[4 * half + 3];
    *at = four;
  }
}

template <int V>
__device__ __forceinline__ void read_shared(const float* from, float (&to)[V]) {
#pragma unroll
  for (int half = 0; half < V / 4; ++half) {
    const float4 four = *reinterpret_cast<const float4*>(from + half * 4 * kWarp);
    to[4 * half] = four.x;
    to[4 * half + 1] = four.y;
    to[4 * half + 2] = four.z;
    to[4 * half + 3] = four.w;
  }
}

// The modulation vector of sample b, plus `offset`, as float32 in shared memory; zero beyond D.
template <class L>
__device__ __forceinline__ void stage(const Rows& t, int64_t b, int D, float offset, float* to) {
  for (int column = 4 * threadIdx.x; column < L::kColumns; column += 4 * blockDim.x) {
    float value[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (column < D) {
      load4(t.data, t.dtype, b * t.batch_stride + column, value);
#pragma unroll
      for (int e = 0; e < 4; ++e) value[e] += offset;
    }
    *reinterpret_cast<float4*>(to + L::slot(column)) =
        make_float4(value[0], value[1], value[2], value[3]);
  }
}

// Two sums over the row's warps. Two sets of slots take turns: a warp that is one sum ahead writes
// where nobody reads any more, so one barrier per sum is enough.
template <class L>
__device__ __forceinline__ float2 row_sum(float first, float second, float* slots, int& turn) {
  float2 total = make_float2(warp_sum(first), warp_sum(second));
  if (L::W > 1) {
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    float* const mine = slots + turn * 2 * warps;
    turn ^= 1;
    if (threadIdx.x % kWarp == 0) {
      mine[2 * warp] = total.x;
      mine[2 * warp + 1] = total.y;
    }
    __syncthreads();
    total = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int part = 0; part < L::W; ++part) {
      total.x += mine[2 * (warp / L::W * L::W + part)];
      total.y += mine[2 * (warp / L::W * L::W + part) + 1];
    }
  }
  return total;
}

template <class T>
__device__ __forceinline__ T* row_of(const Rows& t, int64_t b, int64_t n) {
  return static_cast<T*>(t.data) + b * t.batch_stride + n * t.row_stride;
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_or_zero(const T* address, bool live) {
  Pack<T, V> zero = {};
  return live ? load<T, V>(address) : zero;
}

// X: dtype of x and out; H: dtype of h and y.
template <class X, class H, class L, bool GATED>
__global__ void __launch_bounds__(kForwardWarps<L>* kWarp, L::W > 4 ? 2 : 3)
    adaln_forward_kernel(const __grid_constant__ AdalnForward a) {
  constexpr int V = L::V, K = L::K, kGroups = kForwardWarps<L> / L::W;
  const int D = static_cast<int>(a.D);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = warp / L::W, part = warp % L::W;
  const unsigned chunks = static_cast<unsigned>((a.N + a.rows - 1) / a.rows);
  const int64_t b = blockIdx.x / chunks;
  const int64_t first = blockIdx.x % chunks * a.rows;
  const int64_t last = first + a.rows < a.N ? first + a.rows : a.N;

  float* const scale = shared_floats();
  float* const shift = scale + L::kColumns;
  float* const gate = shift + L::kColumns;
  float* const bias = gate + L::kColumns;
  const bool biased = GATED && a.bias.data != nullptr;
  float* const slots = scale + (biased ? 4 : GATED ? 3 : 2) * L::kColumns;
  stage<L>(a.scale, b, D, 1.0f, scale);
  stage<L>(a.shift, b, D, 0.0f, shift);
  if (GATED) stage<L>(a.gate, b, D, 0.0f, gate);
  if (biased) stage<L>(a.bias, 0, D, 0.0f, bias);
  __syncthreads();

  int turn = 0;
  const float per_column = 1.0f / static_cast<float>(D);
  for (int64_t start = first; start < last; start += kGroups) {
    const int64_t n = start + group;
    if (L::W == 1 && n >= last) break;  // warps that share a row meet at barriers: they stay
    const bool live_row = n < last;
    float value[K][V];
    // Every load of the row before its first use: nine to eighteen independent ones per lane.
    Pack<X, V> x[K];
    Pack<H, V> h[K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int column = L::column(j, part, lane);
      const bool live = live_row && column < D;
      x[j] = load_or_zero<X, V>(row_of<X>(a.x, b, n) + column, live);
      if (GATED) h[j] = load_or_zero<H, V>(row_of<H>(a.h, b, n) + column, live);
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int column = L::column(j, part, lane);
      unpack(x[j], value[j]);
      if (GATED) {
        float branch[V], opening[V];
        unpack(h[j], branch);
        read_shared(gate + L::slot(column), opening);
        if (biased) {
          float addend[V];
          read_shared(bias + L::slot(column), addend);
#pragma unroll
          for (int e = 0; e < V; ++e) branch[e] += addend[e];
        }
#pragma unroll
        for (int e = 0; e < V; ++e) value[j][e] += opening[e] * branch[e];
        // Rounded as it is stored, so that backward normalises the same values.
        const Pack<X, V> out = pack<X>(value[j]);
        if (live_row && column < D) store(row_of<X>(a.out, b, n) + column, out);
        unpack(out, value[j]);
      }
#pragma unroll
      for (int e = 0; e < V; ++e) sum += value[j][e];
    }
    // The second sum is of squares of centred values: the one-pass formula cancels where the mean
    // is large beside the deviation.
    const float mean = a.rms ? 0.0f : row_sum<L>(sum, 0.0f, slots, turn).x * per_column;
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const bool live = L::column(j, part, lane) < D;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        value[j][e] = live ? value[j][e] - mean : 0.0f;
        squares += value[j][e] * value[j][e];
      }
    }
    const float variance = row_sum<L>(squares, 0.0f, slots, turn).x * per_column;
    const float rstd = rsqrtf(variance + a.eps);
    if (!live_row) continue;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int column = L::column(j, part, lane);
      float factor[V], addend[V];
      read_shared(scale + L::slot(column), factor);
      read_shared(shift + L::slot(column), addend);
#pragma unroll
      for (int e = 0; e < V; ++e) value[j][e] = value[j][e] * rstd * factor[e] + addend[e];
      if (column < D) store(row_of<H>(a.y, b, n) + column, pack<H>(value[j]));
    }
    if (lane == 0 && part == 0) {
      a.mean[b * a.N + n] = mean;
      a.rstd[b * a.N + n] = rstd;
    }
  }
}

// Adds the block's groups of warps, in order, to `sums` in shared memory; all threads call it.
template <class L, int GROUPS>
__device__ __forceinline__ void add_groups(const float (&mine)[L::K][L::V], float* sums, int group,
                                           int part, int lane) {
#pragma unroll 1
  for (int turn = 0; turn < GROUPS; ++turn) {
    if (group == turn) {
#pragma unroll
      for (int j = 0; j < L::K; ++j) {
        float* const at = sums + L::slot(L::column(j, part, lane));
#pragma unroll
        for (int half = 0; half < L::V / 4; ++half) {
          float4* const four = reinterpret_cast<float4*>(at + half * 4 * kWarp);
          float4 total = turn ? *four : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          total.x += mine[j][4 * half];
          total.y += mine[j][4 * half + 1];
          total.z += mine[j][4 * half + 2];
          total.w += mine[j][4 * half + 3];
          *four = total;
        }
      }
    }
    __syncthreads();
  }
}

// What a row of backward consists of, for one lane. Where a warp owns the row, the next row is
// copied into shared memory while this one is computed (cp.async: the copy needs no registers, and
// the column sums leave none to spare). A lane reads only what it copied itself, so its own wait is
// enough and no barrier is needed. Rows of several warps have fewer sums per lane and are kept in
// registers.
template <class X, class H, class L, bool GATED>
struct Source {
  static constexpr bool kStaged = L::W == 1;
  static constexpr int kXAt = 0, kDyAt = sizeof(X);  // bytes per element before each tensor
  static constexpr int kDoutAt = kDyAt + sizeof(H), kHAt = kDoutAt + sizeof(X);
  static constexpr int kVectorBytes = static_cast<int>(sizeof(X) + sizeof(H)) * L::V;
  static constexpr int kStageBytes =  // per warp: dy and x, with a gate also dout and h
      kStaged ? (GATED ? 2 : 1) * L::K * kWarp * kVectorBytes : 0;
  // Few warps per block: a lane keeps three sums per column in registers, 108 at D = 1152, and two
  // rows of a warp take 18 KB of shared memory there, 36 KB in float32.
  static constexpr int kWarps = L::W > 4 ? L::W : L::W > 1 || sizeof(X) + sizeof(H) == 4 ? 4 : 2;
  static constexpr int kBlocks = L::V * L::K <= 12 ? 12 / kWarps : 1;  // per SM, at least
  static constexpr int kGroups = kWarps / L::W;
  static constexpr size_t kShared = shared_size<L>(3, kWarps) + size_t{2} * kWarps * kStageBytes;
  static constexpr size_t kBiasShared = sizeof(float) * kGroups * L::kColumns;  // on top of that

  const AdalnBackward& a;
  const int64_t b;
  unsigned char* const stages;  // two, of this warp
  const int part, lane, D;
  int stage;
  float next_mean, next_rstd;
  Pack<H, L::V> kept_dy[L::K];
  Pack<X, L::V> kept_x[L::K];

  __device__ __forceinline__ Source(const AdalnBackward& a, int64_t b, unsigned char* stages,
                                    int part, int lane)
      : a(a), b(b), stages(stages), part(part), lane(lane), D(static_cast<int>(a.D)), stage(1) {}

  // Vector j of this lane; `before` is the bytes that the tensors staged before it have per
  // element.
  template <class T>
  __device__ __forceinline__ T* staged(int before, int j) const {
    return reinterpret_cast<T*>(stages + stage * kStageBytes + before * L::K * kWarp * L::V) +
           (j * kWarp + lane) * L::V;
  }

  // Starts the copy of row n, into the stage that `take` did not make the current one.
  __device__ __forceinline__ void request(int64_t n, bool live_row) {
    next_mean = live_row ? a.mean[b * a.N + n] : 0.0f;
    next_rstd = live_row ? a.rstd[b * a.N + n] : 0.0f;
    if constexpr (kStaged) {
      stage ^= 1;
#pragma unroll
      for (int j = 0; j < L::K; ++j) {
        const int column = L::column(j, part, lane);
        if (!live_row || column >= D) continue;
        constexpr size_t kX = sizeof(Pack<X, L::V>), kH = sizeof(Pack<H, L::V>);
        __pipeline_memcpy_async(staged<X>(kXAt, j), row_of<X>(a.x, b, n) + column, kX);
        __pipeline_memcpy_async(staged<H>(kDyAt, j), row_of<H>(a.dy, b, n) + column, kH);
        if (GATED && a.dout.data != nullptr) {
          __pipeline_memcpy_async(staged<X>(kDoutAt, j), row_of<X>(a.dout, b, n) + column, kX);
        }
        if (GATED) {
          __pipeline_memcpy_async(staged<H>(kHAt, j), row_of<H>(a.h, b, n) + column, kH);
        }
      }
      __pipeline_commit();
      stage ^= 1;
    }
  }

  // Makes row n, requested before, the one that the functions below read.
  __device__ __forceinline__ void take(int64_t n, bool live_row) {
    if constexpr (kStaged) {
      __pipeline_wait_prior(0);
      stage ^= 1;
    } else {
#pragma unroll
      for (int j = 0; j < L::K; ++j) {
        const int column = L::column(j, part, lane);
        const bool live = live_row && column < D;
        kept_dy[j] = load_or_zero<H, L::V>(row_of<H>(a.dy, b, n) + column, live);
        kept_x[j] = load_or_zero<X, L::V>(row_of<X>(a.x, b, n) + column, live);
      }
    }
  }

  __device__ __forceinline__ Pack<H, L::V> dy(int j, bool live) const {
    if constexpr (kStaged) return load_or_zero<H, L::V>(staged<H>(kDyAt, j), live);
    return kept_dy[j];
  }
  __device__ __forceinline__ Pack<X, L::V> x(int j, bool live) const {
    if constexpr (kStaged) return load_or_zero<X, L::V>(staged<X>(kXAt, j), live);
    return kept_x[j];
  }
  __device__ __forceinline__ Pack<X, L::V> dout(int64_t n, int j, bool live) const {
    live = live && a.dout.data != nullptr;
    if constexpr (kStaged) return load_or_zero<X, L::V>(staged<X>(kDoutAt, j), live);
    return load_or_zero<X, L::V>(row_of<X>(a.dout, b, n) + L::column(j, part, lane), live);
  }
  __device__ __forceinline__ Pack<H, L::V> h(int64_t n, int j, bool live) const {
    if constexpr (kStaged) return load_or_zero<H, L::V>(staged<H>(kHAt, j), live);
    return load_or_zero<H, L::V>(row_of<H>(a.h, b, n) + L::column(j, part, lane), live);
  }
};

// X: dtype of x, dout and dx; H: dtype of dy, h and dh.
template <class X, class H, class L, bool GATED>
__global__ void __launch_bounds__(Source<X, H, L, GATED>::kWarps* kWarp,
                                  Source<X, H, L, GATED>::kBlocks)
    adaln_backward_kernel(const __grid_constant__ AdalnBackward a) {
  using From = Source<X, H, L, GATED>;
  constexpr int V = L::V, K = L::K, kGroups = From::kGroups;
  const int D = static_cast<int>(a.D);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = warp / L::W, part = warp % L::W;
  const unsigned chunks = static_cast<unsigned>((a.N + a.rows - 1) / a.rows);
  const int64_t b = blockIdx.x / chunks;
  const int64_t first = blockIdx.x % chunks * a.rows;
  const int64_t last = first + a.rows < a.N ? first + a.rows : a.N;

  float* const scale = shared_floats();
  float* const gate = scale + L::kColumns;
  unsigned char* const stages = shared_bytes + sizeof(float) * 3 * L::kColumns;
  float* const slots = reinterpret_cast<float*>(stages + 2 * From::kWarps * From::kStageBytes);
  // With a bias a fourth sum per column, of t, which is more than the registers hold: it lies in
  // shared memory, one array per group of warps, where a lane adds to its own columns.
  float* const totals = slots + (L::W > 1 ? 4 * From::kWarps : 0);
  const bool biased = GATED && a.bias.data != nullptr;
  From from(a, b, stages + 2 * warp * From::kStageBytes, part, lane);
  from.request(first + group, first + group < last);
  stage<L>(a.scale, b, D, 1.0f, scale);
  if (GATED) stage<L>(a.gate, b, D, 0.0f, gate);
  for (int i = 4 * threadIdx.x; biased && i < kGroups * L::kColumns; i += 4 * blockDim.x) {
    *reinterpret_cast<float4*>(totals + i) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  __syncthreads();

  float dgate[GATED ? K : 1][V] = {}, dshift[K][V] = {}, dscale[K][V] = {};
  int turn = 0;
  const float per_column = 1.0f / static_cast<float>(D);
#pragma unroll 1
  for (int64_t start = first; start < last; start += kGroups) {
    const int64_t n = start + group;
    if (L::W == 1 && n >= last) break;
    const bool live_row = n < last;
    const float mean = from.next_mean, rstd = from.next_rstd;
    from.take(n, live_row);
    from.request(n + kGroups, n + kGroups < last);
    float sum = 0.0f, product = 0.0f;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int column = L::column(j, part, lane);
      const bool live = live_row && column < D;
      float slope[V], normed[V], factor[V];
      unpack(from.dy(j, live), slope);
      unpack(from.x(j, live), normed);
      read_shared(scale + L::slot(column), factor);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        normed[e] = (normed[e] - mean) * rstd;
        dshift[j][e] += slope[e];
        dscale[j][e] += slope[e] * normed[e];
        slope[e] *= factor[e];
        sum += slope[e];
        product += slope[e] * normed[e];
      }
    }
    const float2 total = row_sum<L>(sum, product, slots, turn);
    const float average = a.rms ? 0.0f : total.x * per_column;
    const float along = total.y * per_column;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int column = L::column(j, part, lane);
      const bool live = live_row && column < D;
      float grad[V], normed[V], factor[V];
      unpack(from.dy(j, live), grad);
      unpack(from.x(j, live), normed);
      read_shared(scale + L::slot(column), factor);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        normed[e] = (normed[e] - mean) * rstd;
        grad[e] = rstd * (grad[e] * factor[e] - average - normed[e] * along);
      }
      if (GATED) {
        float direct[V], branch[V], opening[V];
        unpack(from.dout(n, j, live), direct);
        unpack(from.h(n, j, live), branch);
        read_shared(gate + L::slot(column), opening);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          grad[e] += direct[e];
          dgate[j][e] += grad[e] * branch[e];
          opening[e] *= grad[e];
        }
        if (live) store(row_of<H>(a.dh, b, n) + column, pack<H>(opening));
        if (biased && live) add_shared(totals + group * L::kColumns + L::slot(column), grad);
      }
      if (live) store(row_of<X>(a.dx, b, n) + column, pack<X>(grad));
      // No load moves up across this: without it the compiler starts those of all nine vectors at
      // once, and spills.
      if (j % 3 == 2) __syncwarp();
    }
  }

  __syncthreads();  // scale and gate are no longer read
  float* const sums = shared_floats();
  if constexpr (GATED) add_groups<L, kGroups>(dgate, sums, group, part, lane);
  add_groups<L, kGroups>(dshift, sums + L::kColumns, group, part, lane);
  add_groups<L, kGroups>(dscale, sums + 2 * L::kColumns, group, part, lane);
  float* const partial = a.partial + static_cast<int64_t>(blockIdx.x) * 4 * D;
  for (int column = 4 * threadIdx.x; biased && column < D; column += 4 * blockDim.x) {
    float4 total = *reinterpret_cast<const float4*>(totals + L::slot(column));
    for (int i = 1; i < kGroups; ++i) {
      const float* const at = totals + i * L::kColumns + L::slot(column);
      const float4 four = *reinterpret_cast<const float4*>(at);
      total.x += four.x, total.y += four.y, total.z += four.z, total.w += four.w;
    }
    *reinterpret_cast<float4*>(partial + 3 * D + column) = total;
  }
#pragma unroll 1
  for (int row = GATED ? 0 : 1; row < 3; ++row) {
    for (int column = 4 * threadIdx.x; column < D; column += 4 * blockDim.x) {
      *reinterpret_cast<float4*>(partial + row * D + column) =
          *reinterpret_cast<const float4*>(sums + row * L::kColumns + L::slot(column));
    }
  }
}

// Without a norm no row needs a sum: a thread keeps its V columns and walks down the rows, so that
// gate is read once and dgate stays in registers. Blocks of 32 column vectors x 8 rows.
constexpr int kGateRows = 8;

template <int V>
__device__ __forceinline__ void load_vector(const Rows& t, int64_t b, int64_t column,
                                            float (&to)[V]) {
#pragma unroll
  for (int e = 0; e < V; e += 4) {
    float four[4];
    load4(t.data, t.dtype, b * t.batch_stride + column + e, four);
    to[e] = four[0], to[e + 1] = four[1], to[e + 2] = four[2], to[e + 3] = four[3];
  }
}

// Adds the block's rows in order, through shared memory: [row][element of the vector][vector].
template <int V>
__device__ __forceinline__ void add_rows(const float (&mine)[V], float* to, bool live) {
  float* const sums = shared_floats();
#pragma unroll
  for (int e = 0; e < V; ++e) sums[(threadIdx.y * V + e) * kWarp + threadIdx.x] = mine[e];
  __syncthreads();
  for (int e = threadIdx.y; e < V && live; e += kGateRows) {
    float total = 0.0f;
    for (int row = 0; row < kGateRows; ++row) total += sums[(row * V + e) * kWarp + threadIdx.x];
    to[e] = total;
  }
}

template <class X, class H, int V>
__global__ void __launch_bounds__(kGateRows* kWarp)
    gate_forward_kernel(const __grid_constant__ AdalnForward a) {
  const int column = (blockIdx.y * kWarp + threadIdx.x) * V;
  if (column >= a.D) return;
  const unsigned chunks = static_cast<unsigned>((a.N + a.rows - 1) / a.rows);
  const int64_t b = blockIdx.x / chunks;
  const int64_t first = blockIdx.x % chunks * a.rows;
  const int64_t last = first + a.rows < a.N ? first + a.rows : a.N;
  float gate[V], bias[V] = {};
  load_vector(a.gate, b, column, gate);
  if (a.bias.data != nullptr) load_vector(a.bias, 0, column, bias);
#pragma unroll 4
  for (int64_t n = first + threadIdx.y; n < last; n += kGateRows) {
    float value[V], branch[V];
    unpack(load<X, V>(row_of<X>(a.x, b, n) + column), value);
    unpack(load<H, V>(row_of<H>(a.h, b, n) + column), branch);
#pragma unroll
    for (int e = 0; e < V; ++e) value[e] += gate[e] * (branch[e] + bias[e]);
    store(row_of<X>(a.out, b, n) + column, pack<X>(value));
  }
}

template <class X, class H, int V>
__global__ void __launch_bounds__(kGateRows* kWarp)
    gate_backward_kernel(const __grid_constant__ AdalnBackward a) {
  const int column = (blockIdx.y * kWarp + threadIdx.x) * V;
  const bool live = column < a.D;
  const unsigned chunks = static_cast<unsigned>((a.N + a.rows - 1) / a.rows);
  const int64_t b = blockIdx.x / chunks;
  const int64_t first = blockIdx.x % chunks * a.rows;
  const int64_t last = first + a.rows < a.N ? first + a.rows : a.N;
  float gate[V] = {}, dgate[V] = {}, total[V] = {};
  if (live) {
    load_vector(a.gate, b, column, gate);
#pragma unroll 4
    for (int64_t n = first + threadIdx.y; n < last; n += kGateRows) {
      float grad[V], branch[V];
      unpack(load<X, V>(row_of<X>(a.dout, b, n) + column), grad);
      unpack(load<H, V>(row_of<H>(a.h, b, n) + column), branch);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        dgate[e] += grad[e] * branch[e];
        total[e] += grad[e];
        grad[e] *= gate[e];
      }
      store(row_of<H>(a.dh, b, n) + column, pack<H>(grad));
    }
  }
  float* const partial = a.partial + static_cast<int64_t>(blockIdx.x) * 4 * a.D + column;
  add_rows(dgate, partial, live);
  if (a.bias.data == nullptr) return;
  __syncthreads();
  add_rows(total, partial + 3 * a.D, live);
}

// V = 8 makes 16-byte vectors of 16-bit elements; where float32 takes part a vector is four
// elements, and twice as many of them.
template <class X, class H, int V, int K, int W>
struct Fitting {
  static constexpr bool kNarrow = sizeof(X) == 2 && sizeof(H) == 2;
  using type = Layout<kNarrow ? V : 4, kNarrow ? K : V * K / 4, W>;
};

template <class X, class H, int V, int K, int W>
void forward_with(const AdalnForward& a, const Place& place) {
  using L = typename Fitting<X, H, V, K, W>::type;
  const bool gated = a.h.data != nullptr;
  const auto kernel =
      gated ? adaln_forward_kernel<X, H, L, true> : adaln_forward_kernel<X, H, L, false>;
  const int64_t blocks = a.B * ((a.N + a.rows - 1) / a.rows);
  launch("adaln_forward", place, grid_size(blocks, "adaln_forward"), kForwardWarps<L> * kWarp,
         shared_size<L>(a.bias.data != nullptr ? 4 : gated ? 3 : 2, kForwardWarps<L>), kernel, a);
}

template <class X, class H, class L, bool GATED>
void backward_gated(const AdalnBackward& a, const Place& place) {
  using From = Source<X, H, L, GATED>;
  const int64_t blocks = a.B * ((a.N + a.rows - 1) / a.rows);
  launch("adaln_backward", place, grid_size(blocks, "adaln_backward"), From::kWarps * kWarp,
         From::kShared + (a.bias.data != nullptr ? From::kBiasShared : 0),
         adaln_backward_kernel<X, H, L, GATED>, a);
}

template <class X, class H, int V, int K, int W>
void backward_with(const AdalnBackward& a, const Place& place) {
  using L = typename Fitting<X, H, V, K, W>::type;
  if (a.h.data != nullptr) return backward_gated<X, H, L, true>(a, place);
  backward_gated<X, H, L, false>(a, place);
}

// The layouts, smallest first; 384, 768, 1024, 1152, 2048 and 4096 columns leave no lane idle.
#define ETUDE_BY_WIDTH(function, X, H, a, place)               \
  do {                                                         \
    if (a.D <= 384) return function<X, H, 4, 3, 1>(a, place);  \
    if (a.D <= 768) return function<X, H, 8, 3, 1>(a, place);  \
    if (a.D <= 1024) return function<X, H, 8, 4, 1>(a, place); \
    if (a.D <= 1152) return function<X, H, 4, 9, 1>(a, place); \
    if (a.D <= 2048) return function<X, H, 8, 2, 4>(a, place); \
    return function<X, H, 8, 2, 8>(a, place);                  \
  } while (false)

}  // namespace

template <class X, class H>
void forward_of(const AdalnForward& a, const Place& place) {
  if (a.scale.data != nullptr) ETUDE_BY_WIDTH(forward_with, X, H, a, place);
  constexpr int V = sizeof(X) == 2 && sizeof(H) == 2 ? 8 : 4;
  const dim3 grid(grid_size(a.B * ((a.N + a.rows - 1) / a.rows), "gate_residual"),
                  static_cast<unsigned>((a.D / V + kWarp - 1) / kWarp));
  launch("gate_residual", place, grid, dim3(kWarp, kGateRows), 0, gate_forward_kernel<X, H, V>, a);
}

template <class X, class H>
void backward_of(const AdalnBackward& a, const Place& place) {
  if (a.scale.data != nullptr) ETUDE_BY_WIDTH(backward_with, X, H, a, place);
  constexpr int V = sizeof(X) == 2 && sizeof(H) == 2 ? 8 : 4;
  const dim3 grid(grid_size(a.B * ((a.N + a.rows - 1) / a.rows), "gate_residual_backward"),
                  static_cast<unsigned>((a.D / V + kWarp - 1) / kWarp));
  launch("gate_residual_backward", place, grid, dim3(kWarp, kGateRows),
         sizeof(float) * kGateRows * V * kWarp, gate_backward_kernel<X, H, V>, a);
}

}  // namespace etude
