// Mean and scatter matrix of float32 rows in float64. The mathematics is in kernels/statistics.py,
// which is also the only caller.
//
// The scatter matrix is symmetric, so only tiles on and above the diagonal are computed: half the
// work of a matrix product. Rows are centred and widened while they are packed, kDepth at a time,
// into panels of kWide columns; both factors of a tile are such panels, so one packing serves both.
// A tile keeps its sums in registers: kHigh broadcast elements times three vectors leave, with the
// three loaded vectors, no register idle and none spilt (24 + 3 + 1 of 32 for AVX-512, 12 + 3 + 1 of
// 16 for AVX2). kDepth rows amortise reading and writing the sums; kGroup panels of so many rows,
// about half a megabyte, stay in the second-level cache while every panel to their right passes by.
//
// Every sum runs over the rows in order: its bits do not depend on the number of threads.
#include <stdlib.h>

#include "statistics.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8, kHigh = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4, kHigh = 4;
#else
constexpr int kLanes = 2, kHigh = 3;
#endif
constexpr int kWide = 3 * kLanes;
constexpr int64_t kDepth = 384;
constexpr int64_t kGroup = 8;
constexpr int64_t kSpan = 32 * kWide;

typedef double Lanes __attribute__((vector_size(8 * kLanes)));
// The same in memory of doubles, wherever it lies.
typedef double Loaded __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));

// Panel p of rows [first, first + count): their columns from p * kWide on, less the mean, row by
// row; zeros beyond the last column.
void pack(const Moments& a, int64_t p, int64_t first, int64_t count, double* panel) {
  const int64_t left = p * kWide;
  const int64_t live = a.width - left < kWide ? a.width - left : kWide;
  for (int64_t k = 0; k < count; ++k) {
    const float* const from = a.x + (first + k) * a.stride + left;
    double* const to = panel + k * kWide;
    if (live == kWide) {
#pragma omp simd
      for (int i = 0; i < kWide; ++i) to[i] = static_cast<double>(from[i]) - a.mean[left + i];
      continue;
    }
    for (int64_t i = 0; i < kWide; ++i)
      to[i] = i < live ? static_cast<double>(from[i]) - a.mean[left + i] : 0.0;
  }
}

// sums[kHigh][kWide] += the product of kHigh columns of one panel and all of another.
void tile(const double* one, const double* two, int64_t count, double* sums, int64_t stride) {
  Lanes total[kHigh][3];
#pragma GCC unroll 8
  for (int i = 0; i < kHigh; ++i) total[i][0] = total[i][1] = total[i][2] = Lanes{};
  for (int64_t k = 0; k < count; ++k) {
    const Loaded* const b = reinterpret_cast<const Loaded*>(two + k * kWide);
    const Lanes b0 = b[0], b1 = b[1], b2 = b[2];
    // Unrolled by force: only then do the sums become registers.
#pragma GCC unroll 8
    for (int i = 0; i < kHigh; ++i) {
      const double a = one[k * kWide + i];
      total[i][0] += a * b0;
      total[i][1] += a * b1;
      total[i][2] += a * b2;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kHigh; ++i) {
    Loaded* const row = reinterpret_cast<Loaded*>(sums + i * stride);
    row[0] += total[i][0];
    row[1] += total[i][1];
    row[2] += total[i][2];
  }
}

}  // namespace

void moments(const Moments& a) {
  const int64_t panels = (a.width + kWide - 1) / kWide, padded = panels * kWide;
  const int64_t panel = kDepth * kWide;
  double* const packed = static_cast<double*>(malloc(panels * panel * sizeof(double)));
  double* const sums = static_cast<double*>(calloc(padded * padded, sizeof(double)));
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    // Runs of kSpan columns: a thread reads several kilobytes of a row together, not a line or two
    // of every page.
#pragma omp for schedule(static)
    for (int64_t left = 0; left < a.width; left += kSpan) {
      const int64_t count = a.width - left < kSpan ? a.width - left : kSpan;
      double total[kSpan] = {0};
      for (int64_t row = 0; row < a.rows; ++row) {
        const float* const from = a.x + row * a.stride + left;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) total[i] += from[i];
      }
      for (int64_t i = 0; i < count; ++i) a.mean[left + i] = total[i] / static_cast<double>(a.rows);
    }
    for (int64_t first = 0; first < a.rows; first += kDepth) {
      const int64_t count = a.rows - first < kDepth ? a.rows - first : kDepth;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < panels; p += kSpan / kWide) {
        const int64_t end = p + kSpan / kWide < panels ? p + kSpan / kWide : panels;
        for (int64_t k = 0; k < count; k += 8)
          for (int64_t q = p; q < end; ++q)
            pack(a, q, first + k, count - k < 8 ? count - k : 8, packed + q * panel + k * kWide);
      }
      for (int64_t group = 0; group < panels; group += kGroup) {
        // A turn's tiles are its own, so groups need not wait for one another.
#pragma omp for schedule(dynamic) nowait
        for (int64_t right = group; right < panels; ++right) {
          const int64_t end = right < group + kGroup ? right + 1 : group + kGroup;
          for (int64_t i = group * kWide; i < end * kWide; i += kHigh)
            tile(packed + i / kWide * panel + i % kWide, packed + right * panel, count,
                 sums + i * padded + right * kWide, padded);
        }
      }
#pragma omp barrier
    }
    // Blocks of 64 x 64, so that reading a column touches each cache line once.
#pragma omp for schedule(static)
    for (int64_t top = 0; top < a.width; top += 64)
      for (int64_t left = 0; left < a.width; left += 64)
        for (int64_t i = top; i < top + 64 && i < a.width; ++i)
          for (int64_t j = left; j < left + 64 && j < a.width; ++j)
            a.scatter[i * a.width + j] = i <= j ? sums[i * padded + j] : sums[j * padded + i];
  }
  free(packed), free(sums);
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
