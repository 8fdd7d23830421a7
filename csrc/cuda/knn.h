// Arguments of the kernels for neighbours (knn.cu); filled in by bindings.cpp from
// kernels/knn_cuda.py.
#pragma once
#include "common.h"

namespace etude {

constexpr int kCountTile = 64;  // queries, and references, of a block

struct Sets {
  int64_t N, M, D;
  const float* query;      // (N, D), contiguous
  const float* reference;  // (M, D), contiguous
  const double* centre;    // (D,)
  const double* query_norms;  // squared, of centred rows
  const double* reference_norms;
};

struct Counts {
  Sets sets;
  const float* radii;      // (M,)
  uint8_t* per_query;      // (tiles of balls, N)
  uint8_t* per_reference;  // (tiles of queries, M)
};

struct Nearest {
  Sets sets;
  int k;            // 1 to 32
  bool own;         // row i of the reference is query i, and no neighbour of it
  int64_t columns;  // references of a part
  int64_t parts;
  uint64_t* keys;   // (N, parts, k)
  float* distance;  // (N, k)
  int64_t* index;   // (N, k)
};

void membership_counts(const Counts& a, const Place& place);
void nearest_neighbours(const Nearest& a, const Place& place);

}  // namespace etude
