// Screening of blocks of inner products, and exact distances of the few pairs that are left. The
// mathematics is in kernels/knn.py, which is also the only caller.
//
// The matrix product that makes a block is the library's; what is here reads each block once, while
// it is in the cache, and keeps O(k) per row. A pair that the error bound cannot decide is computed
// again by differences in float64, in one fixed order of summation: results do not depend on the
// product's rounding, on blocks, on the level or on the number of threads.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "knn.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

constexpr int64_t kStep = 64;  // columns that are looked at together

struct Entry {
  float lower, upper;  // bounds of the squared distance
  int64_t index;
};

struct List {
  Entry* data;
  int64_t count, capacity;
  float limit;  // the k-th smallest upper bound so far: nothing above it can be among the nearest
};

// The distance of two rows, correctly rounded but for the last bits of float64.
float exact(const float* x, const float* y, int64_t width) {
  double sums[16] = {0};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
#pragma omp simd
    for (int64_t j = 0; j < 16; ++j) {
      const double gap = static_cast<double>(x[i + j]) - static_cast<double>(y[i + j]);
      sums[j] += gap * gap;
    }
  }
  for (; i < width; ++i) {
    const double gap = static_cast<double>(x[i]) - static_cast<double>(y[i]);
    sums[i % 16] += gap * gap;
  }
  for (int64_t half = 8; half; half /= 2)
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  return static_cast<float>(sqrt(sums[0]));
}

// The k-th smallest of n numbers (k from 1), which are reordered.
float kth(float* v, int64_t n, int64_t k) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    const float pivot = v[(low + high) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (v[i] < pivot) ++i;
      while (v[j] > pivot) --j;
      if (i <= j) {
        const float swap = v[i];
        v[i++] = v[j], v[j--] = swap;
      }
    }
    if (k - 1 <= j)
      high = j;
    else if (k - 1 >= i)
      low = i;
    else
      break;
  }
  return v[k - 1];
}

// Lowers the limit and drops what is above it; makes room if nearly everything stays.
void shrink(List& list, int64_t k) {
  if (list.count >= k) {
    float* const uppers = static_cast<float*>(malloc(list.count * sizeof(float)));
    for (int64_t i = 0; i < list.count; ++i) uppers[i] = list.data[i].upper;
    const float limit = kth(uppers, list.count, k);
    free(uppers);
    list.limit = limit < list.limit ? limit : list.limit;
    int64_t kept = 0;
    for (int64_t i = 0; i < list.count; ++i)
      if (list.data[i].lower <= list.limit) list.data[kept++] = list.data[i];
    list.count = kept;
  }
  if (2 * list.count > list.capacity) {
    list.capacity *= 2;
    list.data = static_cast<Entry*>(realloc(list.data, list.capacity * sizeof(Entry)));
  }
}

void scan_row(const NearestScan& a, int64_t i) {
  const GramBlock& b = a.block;
  List& list = static_cast<List*>(a.lists)[i];
  const float* const gram = b.gram + i * b.columns;
  const float norm = b.row_norms[i], keep = 1.0f - b.relative;
  for (int64_t first = 0; first < b.columns; first += kStep) {
    const int64_t last = first + kStep < b.columns ? first + kStep : b.columns;
    const float limit = list.limit + b.absolute;
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = first; j < last; ++j)
      any |= (norm + b.column_norms[j]) * keep - 2.0f * gram[j] <= limit;
    if (!any) continue;
    for (int64_t j = first; j < last; ++j) {
      const float norms = norm + b.column_norms[j];
      const float about = norms - 2.0f * gram[j], error = norms * b.relative + b.absolute;
      if (about - error > list.limit || a.first_column + j == a.self + i) continue;
      list.data[list.count++] = {about - error, about + error, a.first_column + j};
      if (list.count == list.capacity) shrink(list, a.k);
    }
  }
}

void finish_row(const NearestFinish& a, int64_t i) {
  List& list = static_cast<List*>(a.lists)[i];
  shrink(list, a.k);
  float* const distance = a.distance + i * a.k;
  int64_t* const index = a.index + i * a.k;
  int64_t found = 0;
  for (int64_t n = 0; n < list.count; ++n) {
    const int64_t at = list.data[n].index;
    const float d = exact(a.x + i * a.width, a.y + at * a.width, a.width);
    // Ascending by distance, then by index.
    int64_t place = found < a.k ? found : a.k;
    while (place > 0 && (d < distance[place - 1] || (d == distance[place - 1] && at < index[place - 1])))
      --place;
    if (place == a.k) continue;
    found = found < a.k ? found + 1 : a.k;
    for (int64_t j = found - 1; j > place; --j)
      distance[j] = distance[j - 1], index[j] = index[j - 1];
    distance[place] = d, index[place] = at;
  }
  free(list.data);
}

int64_t count_row(const CountScan& a, int64_t i, int32_t* columns) {
  const GramBlock& b = a.block;
  const float* const gram = b.gram + i * b.columns;
  const float norm = b.row_norms[i];
  int64_t total = 0;
  for (int64_t first = 0; first < b.columns; first += kStep) {
    const int64_t last = first + kStep < b.columns ? first + kStep : b.columns;
    int sure = 0, open = 0;
#pragma omp simd reduction(+ : sure, open)
    for (int64_t j = first; j < last; ++j) {
      const float norms = norm + b.column_norms[j];
      const float about = norms - 2.0f * gram[j], error = norms * b.relative + b.absolute;
      const int inside = about + error < a.inside[j];
      columns[j] += inside;
      sure += inside;
      open += !inside & (about - error <= a.outside[j]);
    }
    total += sure;
    for (int64_t j = first; open && j < last; ++j) {
      const float norms = norm + b.column_norms[j];
      const float about = norms - 2.0f * gram[j], error = norms * b.relative + b.absolute;
      if (about + error < a.inside[j] || about - error > a.outside[j]) continue;
      const int inside = exact(b.x + i * b.width, b.y + j * b.width, b.width) < a.radii[j];
      columns[j] += inside;
      total += inside;
      --open;
    }
  }
  return total;
}

struct Found {
  int64_t row, column;
  float distance;
  uint8_t whose;
};

struct FoundList {
  Found* data;
  int64_t count, capacity;
};

void pair_row(const PairScan& a, int64_t i, FoundList& list) {
  const GramBlock& b = a.block;
  const float* const gram = b.gram + i * b.columns;
  const float norm = b.row_norms[i], keep = 1.0f - b.relative, reach = a.row_reach[i];
  // A hair above the square of the larger radius: float32 rounds.
  const float slack = 1.0f + 1e-6f;
  for (int64_t first = 0; first < b.columns; first += kStep) {
    const int64_t last = first + kStep < b.columns ? first + kStep : b.columns;
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = first; j < last; ++j) {
      const float far = a.column_reach[j] > reach ? a.column_reach[j] : reach;
      const float low = (norm + b.column_norms[j]) * keep - 2.0f * gram[j];
      any |= low <= far * far * slack + b.absolute;
    }
    if (!any) continue;
    for (int64_t j = first; j < last; ++j) {
      const float far = a.column_reach[j] > reach ? a.column_reach[j] : reach;
      const float low = (norm + b.column_norms[j]) * keep - 2.0f * gram[j];
      if (!(low <= far * far * slack + b.absolute)) continue;
      const float d = exact(b.x + i * b.width, b.y + j * b.width, b.width);
      const int whose = (d < reach) + 2 * (d < a.column_reach[j]);
      if (!whose) continue;
      if (list.count == list.capacity) {
        list.capacity = 2 * list.capacity + 64;
        list.data = static_cast<Found*>(realloc(list.data, list.capacity * sizeof(Found)));
      }
      list.data[list.count++] = {i, j, d, static_cast<uint8_t>(whose)};
    }
  }
}

}  // namespace

void* open_lists(int64_t rows, int64_t k) {
  List* const lists = static_cast<List*>(malloc(rows * sizeof(List)));
  const int64_t capacity = 4 * k + 48;
  for (int64_t i = 0; i < rows; ++i)
    lists[i] = {static_cast<Entry*>(malloc(capacity * sizeof(Entry))), 0, capacity, INFINITY};
  return lists;
}

void nearest_scan(const NearestScan& a) {
#pragma omp parallel for schedule(static) num_threads(a.block.threads) if (a.block.threads > 1)
  for (int64_t i = 0; i < a.block.rows; ++i) scan_row(a, i);
}

void nearest_finish(const NearestFinish& a) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(a.threads) if (a.threads > 1)
  for (int64_t i = 0; i < a.rows; ++i) finish_row(a, i);
  free(a.lists);
}

void count_scan(const CountScan& a) {
  const GramBlock& b = a.block;
#pragma omp parallel num_threads(b.threads) if (b.threads > 1)
  {
    int32_t* const columns = static_cast<int32_t*>(calloc(b.columns, sizeof(int32_t)));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b.rows; ++i) a.per_row[i] += count_row(a, i, columns);
    // Whole numbers: the order of the threads does not show.
#pragma omp critical(etude_count_scan)
    for (int64_t j = 0; j < b.columns; ++j) a.per_column[j] += columns[j];
    free(columns);
  }
}

// How many pairs there are; they are written, by row and column, where `capacity` suffices.
int64_t pair_scan(const PairScan& a) {
  const int64_t parts = a.block.threads > 1 ? a.block.threads : 1;
  const int64_t rows = (a.block.rows + parts - 1) / parts;
  FoundList* const lists = static_cast<FoundList*>(calloc(parts, sizeof(FoundList)));
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = part * rows; i < (part + 1) * rows && i < a.block.rows; ++i)
      pair_row(a, i, lists[part]);
  int64_t total = 0, at = 0;
  for (int64_t part = 0; part < parts; ++part) total += lists[part].count;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t n = 0; n < lists[part].count && total <= a.capacity; ++n, ++at) {
      const Found& found = lists[part].data[n];
      a.row[at] = found.row, a.column[at] = found.column;
      a.distance[at] = found.distance, a.whose[at] = found.whose;
    }
    free(lists[part].data);
  }
  free(lists);
  return total;
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
