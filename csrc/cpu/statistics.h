// Arguments of the covariance kernel (statistics.cpp); filled in by statistics_bindings.cpp.
#pragma once
#include "common.h"

namespace etude {

struct Moments {
  int64_t rows, width;
  const float* x;     // (rows, width), rows `stride` elements apart
  int64_t stride;
  double* mean;       // (width), written
  double* scatter;    // (width, width), written
  int threads;
};

ETUDE_DECLARE(void moments(const Moments& a);)

}  // namespace etude
