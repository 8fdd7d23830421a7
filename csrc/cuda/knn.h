// Arguments of the membership kernel (knn.cu); filled in by bindings.cpp from kernels/knn_cuda.py.
#pragma once
#include "common.h"

namespace etude {

constexpr int kCountTile = 64;  // queries, and balls, of a block

struct Counts {
  int64_t N, M, D;
  const float* query;      // (N, D), contiguous
  const float* reference;  // (M, D), contiguous
  const double* centre;    // (D,)
  const double* query_norms;      // squared, of centred rows
  const double* reference_norms;
  const float* radii;     // (M,)
  uint8_t* per_query;      // (tiles of balls, N)
  uint8_t* per_reference;  // (tiles of queries, M)
};

void membership_counts(const Counts& a, const Place& place);

}  // namespace etude
