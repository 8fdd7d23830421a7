// AdamW and up to four weight averages in one pass over any number of tensors. The equations are in
// kernels/optimizer.py; kernels/optimizer_cuda.py is the only caller.
//
// Every tensor is read and written once: 28 bytes per float32 parameter for AdamW, 8 per average, 2
// for a 16-bit copy of the new parameter. The clip coefficient, the learning rate, the step counts
// and the flag that skips the step are read on the GPU: nothing waits for the host, and a captured
// graph stays right when they change.
//
// Two launches per 40 tensors. The first, of one block, turns step counts into bias corrections,
// writes them to the workspace and counts the step; the second updates the parameters. They cannot
// be one: a block must not count a step that others have yet to read. The table of addresses is a
// kernel parameter, so that a graph holds it by value and no copy is made.
//
// The arithmetic is that of csrc/cpu/optimizer.cpp, operation by operation: float64, rounded once
// when a result is stored, each operation by itself (the _rn intrinsics are never contracted to a
// fused multiply-add). The two give the same bits. It is affordable on the GPUs this is built for:
// per element about 30 float64 operations stand beside 36 bytes and more of memory traffic, and
// sm_90 completes 64 of them per clock and multiprocessor while it receives less than 20 bytes.
#include "optimizer.h"

#include "common.cuh"

namespace etude {
namespace {

constexpr int kThreads = 256;
// Elements per block: the tables that a block reads at its start are then 1% of its traffic.
constexpr int64_t kChunk = 8192;

struct Group {
  AdamwTensor tensors[kAdamwTensors];
  unsigned first_chunk[kAdamwTensors + 1];
  int8_t grad_dtypes[kAdamwTensors], copy_dtypes[kAdamwTensors];
  int count, profiles;
  double beta1, beta2;
  const double* scalars;      // shrink, rest1, rest2, skip, then decay and 1 - decay per profile
  const double* corrections;  // per tensor the step size and eps, both bias-corrected
};
static_assert(sizeof(Group) <= 4096, "kernel parameters of every GPU hold 4 KB");

struct Start {
  float* steps[kAdamwTensors];
  int count, profiles;
  double beta1, beta2, eps, weight_decay;
  Scalar lr, grad_scale, found_inf;
  Scalar decays[kProfiles];
  double* scalars;
  double* corrections;
};

__device__ double read(const Scalar& scalar) {
  if (scalar.data == nullptr) return scalar.value;
  if (scalar.dtype == kFloat64) return *static_cast<const double*>(scalar.data);
  return load1(scalar.data, scalar.dtype, 0);
}

__global__ void __launch_bounds__(64) adamw_start_kernel(const __grid_constant__ Start a) {
  const bool skip = read(a.found_inf) != 0.0;
  const double lr = read(a.lr);
  if (threadIdx.x == 0) {
    const double scale = read(a.grad_scale);
    const double rest2 = __dmul_rn(__dsub_rn(1.0, a.beta2), scale);
    a.scalars[0] = __dsub_rn(1.0, __dmul_rn(lr, a.weight_decay));
    a.scalars[1] = __dmul_rn(__dsub_rn(1.0, a.beta1), scale);
    a.scalars[2] = __dmul_rn(rest2, scale);
    a.scalars[3] = skip ? 1.0 : 0.0;
    for (int k = 0; k < a.profiles; ++k) {
      const double decay = read(a.decays[k]);
      a.scalars[4 + 2 * k] = decay;
      a.scalars[5 + 2 * k] = __dsub_rn(1.0, decay);
    }
  }
  const int i = threadIdx.x;
  if (i >= a.count || skip) return;
  const float step = *a.steps[i];
  const double t = static_cast<double>(step) + 1.0;
  const double first = __dsub_rn(1.0, pow(a.beta1, t));
  const double root = __dsqrt_rn(__dsub_rn(1.0, pow(a.beta2, t)));
  a.corrections[2 * i] = __dmul_rn(__ddiv_rn(lr, first), root);
  a.corrections[2 * i + 1] = __dmul_rn(a.eps, root);
  *a.steps[i] = __fadd_rn(step, 1.0f);
}

struct Factors {
  double beta1, rest1, beta2, rest2, shrink;
  double step_size, eps;  // both times sqrt(1/2)
  float narrow_eps;       // not
  double decay[kProfiles], rest[kProfiles];
};

__device__ __forceinline__ double times_plus(double a, double b, double c, double d) {
  return __dadd_rn(__dmul_rn(a, b), __dmul_rn(c, d));
}

// One element: the parameter, its moments and its averages.
__device__ __forceinline__ void update(const Factors& f, int profiles, double grad, float& param,
                                       float& m, float& v, float (&emas)[kProfiles]) {
  const double first = times_plus(m, f.beta1, grad, f.rest1);
  const double second = times_plus(v, f.beta2, __dmul_rn(grad, grad), f.rest2);
  // The seeds of root and quotient in float32, then one Newton step of each in float64: within
  // 2^-42 for a fraction of what the float64 ones cost. csrc/cpu/optimizer.cpp explains sqrt(1/2).
  const float narrow = __fsqrt_rn(static_cast<float>(second));
  const double y = __fdiv_rn(0.70710678f, __fadd_rn(narrow, 1e-23f));
  const double q = __fdiv_rn(1.41421356f, __fadd_rn(narrow, f.narrow_eps));
  const double half = __dmul_rn(second, y);
  const double newton = __dsub_rn(1.5, __dmul_rn(half, y));
  const double bottom = __dadd_rn(__dmul_rn(half, newton), f.eps);
  const double quotient = __dmul_rn(__dmul_rn(first, f.step_size), q);
  const double step = __dmul_rn(quotient, __dsub_rn(2.0, __dmul_rn(q, bottom)));
  m = static_cast<float>(first);
  v = static_cast<float>(second);
  param = static_cast<float>(__dsub_rn(__dmul_rn(param, f.shrink), step));
#pragma unroll
  for (int k = 0; k < kProfiles; ++k) {
    if (k >= profiles) continue;
    emas[k] = static_cast<float>(times_plus(emas[k], f.decay[k], param, f.rest[k]));
  }
}

__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Group a) {
  if (a.scalars[3] != 0.0) return;
  int index = 0, above = a.count;  // the tensor whose chunks include this block
  while (above - index > 1) {
    const int middle = (index + above) / 2;
    if (a.first_chunk[middle] <= blockIdx.x) index = middle;
    else above = middle;
  }
  const AdamwTensor& t = a.tensors[index];
  const int dtype = a.grad_dtypes[index], copy_dtype = a.copy_dtypes[index];
  const int64_t first = static_cast<int64_t>(blockIdx.x - a.first_chunk[index]) * kChunk;
  const int64_t last = first + kChunk < t.numel ? first + kChunk : t.numel;
  Factors f;
  f.beta1 = a.beta1, f.beta2 = a.beta2;
  f.shrink = a.scalars[0], f.rest1 = a.scalars[1], f.rest2 = a.scalars[2];
  constexpr double kHalfRoot = 0.70710678118654752;
  f.step_size = __dmul_rn(a.corrections[2 * index], kHalfRoot);
  f.eps = __dmul_rn(a.corrections[2 * index + 1], kHalfRoot);
  f.narrow_eps = static_cast<float>(a.corrections[2 * index + 1]);
  uintptr_t bits = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad) |
                   reinterpret_cast<uintptr_t>(t.exp_avg) | reinterpret_cast<uintptr_t>(t.copy) |
                   reinterpret_cast<uintptr_t>(t.exp_avg_sq);
#pragma unroll
  for (int k = 0; k < kProfiles; ++k) {
    const bool used = k < a.profiles;
    f.decay[k] = used ? a.scalars[4 + 2 * k] : 0.0;
    f.rest[k] = used ? a.scalars[5 + 2 * k] : 0.0;
    if (used) bits |= reinterpret_cast<uintptr_t>(t.emas[k]);
  }
  // A slice of a flat buffer may start anywhere: it is then taken by elements.
  const int64_t whole = bits % 16 == 0 ? last - (last - first) % 4 : first;
  for (int64_t i = first + 4 * threadIdx.x; i < whole; i += 4 * kThreads) {
    float grad[4], param[4], m[4], v[4], emas[kProfiles][4] = {};
    load4(t.grad, dtype, i, grad);
    unpack(load<float, 4>(t.param + i), param);
    unpack(load<float, 4>(t.exp_avg + i), m);
    unpack(load<float, 4>(t.exp_avg_sq + i), v);
#pragma unroll
    for (int k = 0; k < kProfiles; ++k) {
      if (k < a.profiles) unpack(load<float, 4>(t.emas[k] + i), emas[k]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float averages[kProfiles];
#pragma unroll
      for (int k = 0; k < kProfiles; ++k) averages[k] = emas[k][e];
      update(f, a.profiles, grad[e], param[e], m[e], v[e], averages);
#pragma unroll
      for (int k = 0; k < kProfiles; ++k) emas[k][e] = averages[k];
    }
    store(t.param + i, pack<float>(param));
    store(t.exp_avg + i, pack<float>(m));
    store(t.exp_avg_sq + i, pack<float>(v));
#pragma unroll
    for (int k = 0; k < kProfiles; ++k) {
      if (k < a.profiles) store(t.emas[k] + i, pack<float>(emas[k]));
    }
    if (t.copy != nullptr) store4(t.copy, copy_dtype, i, param);
  }
  for (int64_t i = whole + threadIdx.x; i < last; i += kThreads) {
    float param = t.param[i], m = t.exp_avg[i], v = t.exp_avg_sq[i], emas[kProfiles] = {};
#pragma unroll
    for (int k = 0; k < kProfiles; ++k) {
      if (k < a.profiles) emas[k] = t.emas[k][i];
    }
    update(f, a.profiles, load1(t.grad, dtype, i), param, m, v, emas);
    t.param[i] = param;
    t.exp_avg[i] = m;
    t.exp_avg_sq[i] = v;
#pragma unroll
    for (int k = 0; k < kProfiles; ++k) {
      if (k < a.profiles) t.emas[k][i] = emas[k];
    }
    if (t.copy != nullptr) store1(t.copy, copy_dtype, i, param);
  }
}

void run_group(const Adamw& a, int64_t from, int64_t to, const Place& place) {
  Start start = {};
  Group group = {};
  start.count = group.count = static_cast<int>(to - from);
  start.profiles = group.profiles = a.profiles;
  start.beta1 = group.beta1 = a.beta1, start.beta2 = group.beta2 = a.beta2;
  start.eps = a.eps, start.weight_decay = a.weight_decay;
  start.lr = a.lr, start.grad_scale = a.grad_scale, start.found_inf = a.found_inf;
  for (int k = 0; k < a.profiles; ++k) start.decays[k] = a.decays[k];
  start.scalars = a.workspace;
  start.corrections = a.workspace + kAdamwScalars + 2 * from;
  group.scalars = start.scalars, group.corrections = start.corrections;
  int64_t chunks = 0;
  for (int64_t i = from; i < to; ++i) {
    const AdamwTensor& tensor = a.tensors[i];
    group.tensors[i - from] = tensor;
    group.grad_dtypes[i - from] = static_cast<int8_t>(a.grad_dtypes[i]);
    group.copy_dtypes[i - from] = static_cast<int8_t>(a.copy_dtypes[i]);
    group.first_chunk[i - from] = static_cast<unsigned>(chunks);
    start.steps[i - from] = tensor.step;
    chunks += (tensor.numel + kChunk - 1) / kChunk;
  }
  group.first_chunk[group.count] = grid_size(chunks, "adamw_ema");
  launch("adamw_ema", place, 1, 64, 0, adamw_start_kernel, start);
  if (chunks > 0) {
    launch("adamw_ema", place, grid_size(chunks, "adamw_ema"), kThreads, 0, adamw_kernel, group);
  }
}

}  // namespace

void adamw_ema(const Adamw& a, const Place& place) {
  for (int64_t from = 0; from < a.count; from += kAdamwTensors) {
    run_group(a, from, from + kAdamwTensors < a.count ? from + kAdamwTensors : a.count, place);
  }
}

}  // namespace etude
