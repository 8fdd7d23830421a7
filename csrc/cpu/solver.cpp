// One step of a sampler over the latents, and pictures as bytes. The mathematics is in
// kernels/solver.py, which is also the only caller.
//
// A task is a chunk of one sample in logical (c, h, w) order: the guided prediction, the clean
// estimate and the next x are formed while the chunk is in the first-level cache.
#include "solver.h"

#include "walk.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

constexpr int64_t kChunk = 2048;

// full + semantic (full - control) + spatial (control - none), with one scale control = none.
void guide(float* full, const float* control, const float* none, float first, float second,
           int64_t count) {
  if (none) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      full[i] = full[i] + first * (full[i] - control[i]) + second * (control[i] - none[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) full[i] = full[i] + first * (full[i] - control[i]);
  }
}

void step_chunk(const SolverStep& a, int64_t b, int64_t first, int64_t count) {
  const int64_t S = a.S;
  float xb[kChunk], pb[kChunk], cb[kChunk], ub[kChunk], eb[kChunk], nb[kChunk], zb[kChunk];
  const float* const x = load(a.x, b, S, first, count, xb);
  const float* p = load(a.prediction, b, S, first, count, pb);
  const int64_t guided = min64(count, a.guided * S - first);
  if (a.scales > 0 && guided > 0) {
    const float* const w = a.guidance + b * a.guidance_stride;
    if (p != pb) {
      __builtin_memcpy(pb, p, static_cast<size_t>(count) * sizeof(float));
      p = pb;
    }
    const float* const control = load(a.prediction, a.B + b, S, first, count, cb);
    const float* const none =
        a.scales > 1 ? load(a.prediction, 2 * a.B + b, S, first, count, ub) : nullptr;
    guide(pb, control, none, w[0], none ? w[1] : 0.0f, guided);
  }
  const float* const k = a.coefficients + b * a.coefficient_stride;
  const float x0_x = k[0], x0_p = k[1], eps_x = k[2], eps_p = k[3];
  const float from_x = k[4], from_x0 = k[5], from_eps = k[6], from_extra = k[7];
  float* const next = place(a.next, b, S, first, nb);
  float* const x0 = a.x0.data ? place(a.x0, b, S, first, zb) : zb;
  if (a.extra.data) {
    const float* const extra = load(a.extra, b, S, first, count, eb);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float clean = x0_x * x[i] + x0_p * p[i], eps = eps_x * x[i] + eps_p * p[i];
      x0[i] = clean;
      next[i] = (from_x * x[i] + from_x0 * clean) + (from_eps * eps + from_extra * extra[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float clean = x0_x * x[i] + x0_p * p[i], eps = eps_x * x[i] + eps_p * p[i];
      x0[i] = clean;
      next[i] = from_x * x[i] + (from_x0 * clean + from_eps * eps);
    }
  }
  store(a.next, b, S, first, count, next);
  if (a.x0.data) store(a.x0, b, S, first, count, x0);
}

// Adding 1.5 * 2^23 rounds to the nearest integer, halves to the even one.
inline int32_t level_of(float value) {
  const float scaled = (value + 1.0f) * 127.5f;
  const float held = scaled > 0.0f ? (scaled < 255.0f ? scaled : 255.0f) : 0.0f;
  return static_cast<int32_t>((held + 12582912.0f) - 12582912.0f);
}

void bytes_chunk(const ToUint8& a, int64_t b, int64_t first, int64_t count) {
  float buffer[kChunk];
  uint8_t* const out = a.out + (b * a.S + first) * a.C;
  const Latents& t = a.images;
  for (int64_t c = 0; c < a.C; ++c) {
    const Latents plane = {t.data, t.dtype, t.batch_stride, t.channel_stride, t.pixel_stride};
    // Channel c's pixels are contiguous in the logical order.
    const float* const from = load(plane, b, a.S, c * a.S + first, count, buffer);
    const int64_t C = a.C;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i * C + c] = static_cast<uint8_t>(level_of(from[i]));
  }
}

}  // namespace

void solver_step(const SolverStep& a) {
  const int64_t numel = a.C * a.S, per = (numel + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && a.B * per > 8)
  for (int64_t task = 0; task < a.B * per; ++task) {
    const int64_t first = task % per * kChunk;
    step_chunk(a, task / per, first, min64(kChunk, numel - first));
  }
}

void to_uint8(const ToUint8& a) {
  const int64_t per = (a.S + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && a.B * per > 8)
  for (int64_t task = 0; task < a.B * per; ++task) {
    const int64_t first = task % per * kChunk;
    bytes_chunk(a, task / per, first, min64(kChunk, a.S - first));
  }
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
