// AdamW, any number of weight averages and a bfloat16 copy of the weights in one pass over each
// tensor. The equations and the only caller are in kernels/optimizer.py.
//
// Sums and products are computed in float64 and rounded once, when stored. Compiled without
// fused multiply-add, so the bits are the same at every processor level, for every thread count and
// however a tensor is cut.
//
// What bounds it. Per float32 weight with one average 36 bytes move, and the processor executes
// about 45 vector instructions per kLanes weights. Hence the economies here. Float64 roots and
// quotients would take longer than all the rest: float32 seeds and one Newton step each do. A loop
// over the lanes of just one float64 register converts with one instruction per load; a loop over
// float32 registers, which a compiler makes of mixed types by itself, unpacks and packs halves
// around each conversion. And no operation is spent where a constant can absorb it (update_piece).
//
// Error bound, before a result is rounded to float32 (half a unit in the last place). exp_avg,
// exp_avg_sq and the averages are two products and a sum in float64: 2^-51 of the larger term. The
// update is within 2^-42 of itself (update_piece), which is 2^(k - 18) units of a weight that is
// 2^-k of its update: 0.52 units in all where they cancel to 2^-12, 1.5 where they do to 2^-18.
// A second moment below 2^-126 has a worse seed; its root, below 2^-63, is nothing beside eps.
#include <math.h>

#include "optimizer.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));

constexpr int64_t kLine = 16;        // float32 numbers per cache line
constexpr int64_t kPiece = 64;       // elements at a time: their averages find them in the L1 cache
constexpr int64_t kAhead = 512;      // elements that memory is asked for before their turn
constexpr int64_t kAlone = 1 << 15;  // fewer elements than this are not worth a second thread

inline Doubles load(const double* from) {
  Doubles x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline void store(double* to, Doubles x) { __builtin_memcpy(to, &x, sizeof x); }

inline void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }

// Loops over lanes: one instruction each in GCC and Clang.
inline Doubles wide(const float* from) {
  Doubles made;
  for (int i = 0; i < kLanes; ++i) made[i] = from[i];
  return made;
}

inline Floats root_of(const float* from) {
  Floats made;
  for (int i = 0; i < kLanes; ++i) made[i] = sqrtf(from[i]);
  return made;
}

inline Floats narrow(Doubles x) { return __builtin_convertvector(x, Floats); }

// One cache line per stream at a time: asked for in bursts, five streams and more fill the buffers
// of the L1 cache, and loads that are due wait behind loads that are not.
inline void ask(const void* data, int64_t byte) {
  __builtin_prefetch(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(data) + byte), 1);
}

struct Streams {
  const void *param, *grad, *m, *v;
  int64_t first, width;

  Streams(const AdamwTensor& t, int64_t start)
      : param(t.param), grad(t.grad), m(t.exp_avg), v(t.exp_avg_sq), first(start + kAhead),
        width(t.grad_dtype == kFloat32 ? 4 : 2) {}

  void prefetch(int64_t i) const {
    ask(param, (first + i) * 4);
    ask(grad, (first + i) * width);
    ask(m, (first + i) * 4);
    ask(v, (first + i) * 4);
  }
};

struct Factors {
  double beta1, rest1, beta2, rest2, shrink, step_size, eps;
  float narrow_eps;

  Factors(const Adamw& a, const AdamwTensor& t)
      : beta1(a.beta1), rest1((1.0 - a.beta1) * a.grad_scale), beta2(a.beta2),
        rest2((1.0 - a.beta2) * a.grad_scale * a.grad_scale), shrink(a.shrink),
        step_size(t.step_size * kHalfRoot), eps(t.eps * kHalfRoot),
        narrow_eps(static_cast<float>(t.eps)) {}

  static constexpr double kHalfRoot = 0.70710678118654752;
};

// kPiece elements in place. step_size * first / (sqrt(second) + eps) has its numerator and
// denominator both times sqrt(1/2): the Newton step for 1 / sqrt(x) from y is y (1.5 - x y^2 / 2),
// and with y standing for sqrt(1/2) / sqrt(x) the last division by two is gone. That seed is within
// 4 * 2^-24, which the step squares and multiplies by 1.5; that of the quotient within 5 * 2^-24,
// which its step squares: 49 * 2^-48 in all. 1e-23 is below the root of every float32 number and
// keeps a root of 0 from making infinity.
//
// Three loops and not one: from the loads to the weight it is a chain of some hundred cycles, and
// the instructions that a processor looks ahead at then hold too few that could already run.
inline void update_piece(const Factors& f, const float* grad, float* param, float* m, float* v,
                         const Streams& streams) {
  alignas(64) double first[kPiece], second[kPiece];
  alignas(64) float root_seed[kPiece], quotient_seed[kPiece];
  for (int64_t i = 0; i < kPiece; i += kLine) {
    streams.prefetch(i);
    for (int64_t j = i; j < i + kLine; j += kLanes) {
      const Doubles g = wide(grad + j);
      const Doubles sum = wide(m + j) * f.beta1 + g * f.rest1;
      const Doubles squares = wide(v + j) * f.beta2 + (g * g) * f.rest2;
      store(first + j, sum);
      store(second + j, squares);
      store(m + j, narrow(sum));
      store(v + j, narrow(squares));
    }
  }
  // As wide as the stores above: a load over two stores would wait until both reach the cache.
  for (int64_t i = 0; i < kPiece; i += kLanes) {
    const Floats root = root_of(v + i);
    store(root_seed + i, 0.70710678f / (root + 1e-23f));
    store(quotient_seed + i, 1.41421356f / (root + f.narrow_eps));
  }
  for (int64_t i = 0; i < kPiece; i += kLanes) {
    const Doubles y = wide(root_seed + i), q = wide(quotient_seed + i);
    const Doubles half = load(second + i) * y;
    const Doubles bottom = half * (1.5 - half * y) + f.eps;
    const Doubles update = ((load(first + i) * f.step_size) * q) * (2.0 - q * bottom);
    store(param + i, narrow(wide(param + i) * f.shrink - update));
  }
}

inline void average_piece(double decay, const float* param, float* ema, int64_t ahead) {
  const double rest = 1.0 - decay;
  for (int64_t i = 0; i < kPiece; i += kLine) {
    ask(ema, (i + ahead) * 4);
    for (int64_t j = i; j < i + kLine; j += kLanes) {
      store(ema + j, narrow(wide(ema + j) * decay + wide(param + j) * rest));
    }
  }
}

// A whole piece in place; the last one of a tensor beside zeros.
inline void run_piece(const Adamw& a, const AdamwTensor& t, const Factors& f, int64_t first,
                      int64_t count) {
  const bool whole = count == kPiece;
  const int64_t bytes = count * 4;
  alignas(64) float padded[4][kPiece];
  float* param = t.param + first;
  float* m = t.exp_avg + first;
  float* v = t.exp_avg_sq + first;
  const float* grad = static_cast<const float*>(t.grad) + first;
  if (!whole) {
    __builtin_memset(padded, 0, sizeof padded);
    param = static_cast<float*>(__builtin_memcpy(padded[0], param, bytes));
    m = static_cast<float*>(__builtin_memcpy(padded[1], m, bytes));
    v = static_cast<float*>(__builtin_memcpy(padded[2], v, bytes));
  }
  if (t.grad_dtype != kFloat32) {
    const uint16_t* const brief = static_cast<const uint16_t*>(t.grad) + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) padded[3][i] = from_bf16(brief[i]);
    grad = padded[3];
  } else if (!whole) {
    grad = static_cast<float*>(__builtin_memcpy(padded[3], grad, bytes));
  }
  update_piece(f, grad, param, m, v, Streams(t, first));
  if (!whole) {
    __builtin_memcpy(t.param + first, param, bytes);
    __builtin_memcpy(t.exp_avg + first, m, bytes);
    __builtin_memcpy(t.exp_avg_sq + first, v, bytes);
  }
  for (int k = 0; k < a.profiles; ++k) {
    float* const ema = t.emas[k] + first;
    float* const used = whole ? ema : static_cast<float*>(__builtin_memcpy(padded[1], ema, bytes));
    average_piece(a.decays[k], param, used, whole ? kAhead : 0);
    if (!whole) __builtin_memcpy(ema, used, bytes);
  }
  if (t.copy != nullptr) {
    uint16_t* const copy = t.copy + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) copy[i] = to_bf16(param[i]);
  }
}

}  // namespace

// Every thread takes one stretch of the elements of all tensors laid end to end: one start and one
// wait per call, and equal shares however many or small the tensors are.
void adamw_ema(const Adamw& a) {
  int64_t total = 0;
  for (int64_t i = 0; i < a.count; ++i) total += a.tensors[i].numel;
  const int parts = total < kAlone ? 1 : a.threads;
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
  for (int part = 0; part < parts; ++part) {
    const int64_t share = (total / parts + kLine) / kLine * kLine;
    const int64_t from = part * share, to = from + share;
    int64_t start = 0;  // of the tensor among all elements
    for (int64_t i = 0; i < a.count && start < to; start += a.tensors[i].numel, ++i) {
      const AdamwTensor& t = a.tensors[i];
      int64_t first = from - start < 0 ? 0 : from - start;
      const int64_t last = to - start < t.numel ? to - start : t.numel;
      if (first >= last) continue;
      const Factors f(a, t);
      for (; first < last; first += kPiece) {
        run_piece(a, t, f, first, last - first < kPiece ? last - first : kPiece);
      }
    }
  }
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
