// Arguments of the nearest-neighbour kernels (knn.cpp); filled in by knn_bindings.cpp.
#pragma once
#include "common.h"

namespace etude {

// One block of inner products of centred rows, and what bounds their error: the squared distance
// of row i and column j lies within relative * (row_norms[i] + column_norms[j]) + absolute of
// row_norms[i] + column_norms[j] - 2 gram[i * columns + j].
struct GramBlock {
  int64_t rows, columns;
  const float* gram;
  const float* row_norms;     // squared
  const float* column_norms;
  float relative, absolute;
  const float* x;  // the rows and columns themselves, (rows, width) and (columns, width)
  const float* y;
  int64_t width;
  int threads;
};

struct NearestScan {
  GramBlock block;
  void* lists;           // of `open_lists`, one per row
  int64_t k;
  int64_t first_column;  // index of the block's first column
  int64_t self;          // index of the column that is row 0 itself, or a negative number
};

struct NearestFinish {
  void* lists;
  int64_t rows, k, width;
  const float* x;   // (rows, width)
  const float* y;   // (all columns, width)
  float* distance;  // (rows, k)
  int64_t* index;   // (rows, k)
  int threads;
};

struct CountScan {
  GramBlock block;
  const float* radii;      // (columns)
  const float* inside;     // (columns), below it a squared distance is surely inside
  const float* outside;    // (columns), above it surely outside
  int64_t* per_row;        // (rows), added to
  int64_t* per_column;     // (columns), added to
};

struct PairScan {
  GramBlock block;
  const float* row_reach;     // (rows)
  const float* column_reach;  // (columns)
  int64_t capacity;           // of the arrays below
  int64_t* row;
  int64_t* column;
  float* distance;
  uint8_t* whose;  // 1: inside the row's ball, 2: inside the column's, 3: both
};

ETUDE_DECLARE(void* open_lists(int64_t rows, int64_t k); void nearest_scan(const NearestScan& a);
              void nearest_finish(const NearestFinish& a); void count_scan(const CountScan& a);
              int64_t pair_scan(const PairScan& a);)

}  // namespace etude
