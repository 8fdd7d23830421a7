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
template <class Layout>
struct fragment<matrix_a, 8, 8, 4, double, Layout> { double x[1]; };
template <class Layout>
struct fragment<matrix_b, 8, 8, 4, double, Layout> { double x[1]; };
template <>
struct fragment<accumulator, 8, 8, 4, double> { double x[2]; };

template <class Layout>
using A = fragment<matrix_a, 8, 8, 4, double, Layout>;
template <class Layout>
using B = fragment<matrix_b, 8, 8, 4, double, Layout>;
using C = fragment<accumulator, 8, 8, 4, double>;

inline void fill_fragment(C& c, double value) { c.x[0] = c.x[1] = value; }

// A lane has row (of the right operand: column) lane / 4 and depth lane % 4.
inline double operand(const double* from, unsigned row, unsigned depth, int line) {
  cuda_on_cpu::warp_barrier(0xffffffffu, line);
  return from[cuda_on_cpu::lane() / 4 * row + cuda_on_cpu::lane() % 4 * depth];
}
inline void load_matrix_sync(A<row_major>& a, const double* from, unsigned pitch,
                             int line = __builtin_LINE()) {
  a.x[0] = operand(from, pitch, 1, line);
}
inline void load_matrix_sync(A<col_major>& a, const double* from, unsigned pitch,
                             int line = __builtin_LINE()) {
  a.x[0] = operand(from, 1, pitch, line);
}
inline void load_matrix_sync(B<row_major>& b, const double* from, unsigned pitch,
                             int line = __builtin_LINE()) {
  b.x[0] = operand(from, 1, pitch, line);
}
inline void load_matrix_sync(B<col_major>& b, const double* from, unsigned pitch,
                             int line = __builtin_LINE()) {
  b.x[0] = operand(from, pitch, 1, line);
}

inline void store_matrix_sync(double* to, const C& c, unsigned pitch, layout_t,
                              int line = __builtin_LINE()) {
  cuda_on_cpu::warp_barrier(0xffffffffu, line);
  for (int n = 0; n < 2; ++n) {
    to[cuda_on_cpu::lane() / 4 * pitch + cuda_on_cpu::lane() % 4 * 2 + n] = c.x[n];
  }
}

template <class Left, class Right>
void mma_sync(C& d, const A<Left>& a, const B<Right>& b, const C& c, int line = __builtin_LINE()) {
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
