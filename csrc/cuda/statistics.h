// Arguments of the moments kernels (statistics.cu); filled in by bindings.cpp from
// kernels/statistics_cuda.py.
#pragma once
#include "common.h"

namespace etude {

constexpr int kMomentsTile = 64;  // rows and columns of the scatter matrix that a block makes

struct Moments {
  int64_t N, D;
  const void* x;  // (N, D), columns contiguous
  int dtype;
  int64_t stride;      // between rows
  int64_t rows;        // of x that a block adds
  const double* mean;  // (D,)
  double* parts;       // (runs of `rows` rows, tiles on or above the diagonal, tile, tile)
  double* scatter;     // (D, D)
};

void moments(const Moments& a, const Place& place);

}  // namespace etude
