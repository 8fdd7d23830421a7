// The double-precision part of the CUDA header of this name: products of 8 x 8 x 4 by a warp whose
// lanes hold one element of each operand and two of the sum, as the instruction has it.
#pragma once
#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment;
template <>
struct fragment<matrix_a, 8, 8, 4, double, col_major> { double x[1]; };
template <>
struct fragment<matrix_b, 8, 8, 4, double, row_major> { double x[1]; };
template <>
struct fragment<accumulator, 8, 8, 4, double> { double x[2]; };

using A = fragment<matrix_a, 8, 8, 4, double, col_major>;
using B = fragment<matrix_b, 8, 8, 4, double, row_major>;
using C = fragment<accumulator, 8, 8, 4, double>;

inline void fill_fragment(C& c, double value) { c.x[0] = c.x[1] = value; }

template <class Operand>
void load_matrix_sync(Operand& operand, const double* from, unsigned pitch,
                      int line = __builtin_LINE()) {
  cuda_on_cpu::warp_barrier(0xffffffffu, line);
  operand.x[0] = from[cuda_on_cpu::lane() % 4 * pitch + cuda_on_cpu::lane() / 4];
}

inline void store_matrix_sync(double* to, const C& c, unsigned pitch, layout_t,
                              int line = __builtin_LINE()) {
  cuda_on_cpu::warp_barrier(0xffffffffu, line);
  for (int n = 0; n < 2; ++n) {
    to[cuda_on_cpu::lane() / 4 * pitch + cuda_on_cpu::lane() % 4 * 2 + n] = c.x[n];
  }
}

inline void mma_sync(C& d, const A& a, const B& b, const C& c, int line = __builtin_LINE()) {
  static double left[32][32], right[32][32];  // of a warp, by lane
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = cuda_on_cpu::lane();
  left[warp][lane] = a.x[0], right[warp][lane] = b.x[0];
  cuda_on_cpu::warp_barrier(0xffffffffu, line);
  for (int n = 0; n < 2; ++n) {
    double sum = c.x[n];
    for (int k = 0; k < 4; ++k) {
      sum = fma(left[warp][lane / 4 * 4 + k], right[warp][(lane % 4 * 2 + n) * 4 + k], sum);
    }
    d.x[n] = sum;
  }
  cuda_on_cpu::warp_barrier(0xffffffffu, line);
}

}  // namespace nvcuda::wmma
