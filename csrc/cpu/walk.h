// Chunks of a field in logical (c, h, w) order, as float32 rows; included by kernel files only.
#pragma once
#include "latents.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

inline bool dense(const Latents& t, int64_t S) { return t.pixel_stride == 1 && t.channel_stride == S; }

// Calls run(offset in the tensor, offset in the chunk, length) for every stretch of elements
// [first, first + count) of sample b in which the address grows by the pixel stride.
template <class Run>
void stretches(const Latents& t, int64_t b, int64_t S, int64_t first, int64_t count, Run run) {
  if (dense(t, S)) {
    run(b * t.batch_stride + first, static_cast<int64_t>(0), count);
    return;
  }
  for (int64_t done = 0; done < count;) {
    const int64_t c = (first + done) / S, pixel = (first + done) % S;
    const int64_t length = min64(count - done, S - pixel);
    run(b * t.batch_stride + c * t.channel_stride + pixel * t.pixel_stride, done, length);
    done += length;
  }
}

// A chunk as float32: in place where it already is, else gathered into `buffer`.
inline const float* load(const Latents& t, int64_t b, int64_t S, int64_t first, int64_t count,
                  float* buffer) {
  const int64_t step = t.pixel_stride;
  if (t.dtype == kFloat32) {
    const float* const from = static_cast<const float*>(t.data);
    if (dense(t, S)) return from + b * t.batch_stride + first;
    stretches(t, b, S, first, count, [=](int64_t at, int64_t to, int64_t length) {
      for (int64_t i = 0; i < length; ++i) buffer[to + i] = from[at + i * step];
    });
    return buffer;
  }
  const uint16_t* const from = static_cast<const uint16_t*>(t.data);
  stretches(t, b, S, first, count, [=](int64_t at, int64_t to, int64_t length) {
    if (step == 1) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) buffer[to + i] = from_bf16(from[at + i]);
    } else {
      for (int64_t i = 0; i < length; ++i) buffer[to + i] = from_bf16(from[at + i * step]);
    }
  });
  return buffer;
}

// Where to compute a chunk of an output; `store` then brings it into a tensor that is not dense
// float32.
inline float* place(const Latents& t, int64_t b, int64_t S, int64_t first, float* buffer) {
  if (t.dtype != kFloat32 || !dense(t, S)) return buffer;
  return static_cast<float*>(t.data) + b * t.batch_stride + first;
}

inline void store(const Latents& t, int64_t b, int64_t S, int64_t first, int64_t count,
           const float* row) {
  const int64_t step = t.pixel_stride;
  if (t.dtype == kFloat32) {
    if (dense(t, S)) return;
    float* const to = static_cast<float*>(t.data);
    stretches(t, b, S, first, count, [=](int64_t at, int64_t from, int64_t length) {
      for (int64_t i = 0; i < length; ++i) to[at + i * step] = row[from + i];
    });
    return;
  }
  uint16_t* const to = static_cast<uint16_t*>(t.data);
  stretches(t, b, S, first, count, [=](int64_t at, int64_t from, int64_t length) {
    if (step == 1) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) to[at + i] = to_bf16(row[from + i]);
    } else {
      for (int64_t i = 0; i < length; ++i) to[at + i * step] = to_bf16(row[from + i]);
    }
  });
}

}  // namespace
}  // namespace ETUDE_LEVEL
}  // namespace etude
