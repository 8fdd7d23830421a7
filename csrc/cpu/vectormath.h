// Exponentials for the kernels that need one per element (activation.cpp, groupnorm.cpp), written so
// that a `#pragma omp simd` loop around them becomes straight vector code at every level: no calls,
// no tables, no branches.
//
// e^t comes as p * down * down2 with p in [0.7, 1.42] and two powers of two. Multiplying a number by
// p first and by the powers last keeps full precision in products such as x * e^-|x| down to the
// smallest normal float32, where e^t alone is already subnormal or zero. Below 2^-253 the second power
// is zero.
//
// Errors against float64 (tests/kernels/test_activation.py measures them over the whole range):
// x * sigmoid(x) and GELU's tanh form at most 4 units in the last place, GELU's erf form
// 4 * 2^-24 |z|, the slopes of all three 5 * 2^-24. A NaN stays a NaN.
#pragma once
#include "common.h"

namespace etude {

#define ETUDE_INLINE static inline __attribute__((always_inline))

ETUDE_INLINE float power_of_two(int32_t k) {  // -127 <= k <= 127; -127 gives 0
  const int32_t bits = (k + 127) << 23;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// e^r for |r| <= ln(2) / 2: minimax polynomial, relative error 2e-9 before rounding.
ETUDE_INLINE float exp_reduced(float r) {
  float p = 0.00138293846976012f;
  p = p * r + 0.00837479718029499f;
  p = p * r + 0.0416683591902256f;
  p = p * r + 0.16666419804096222f;
  p = p * r + 0.49999991059303284f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

ETUDE_INLINE void split_power(float n, float* down, float* down2) {
  const int32_t k = static_cast<int32_t>(n);
  const int32_t half = k >> 1;
  *down = power_of_two(half);
  *down2 = power_of_two(k - half);
}

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds a float32 to an integer
constexpr float kLowest = -176.0f;       // e^-176 = 2^-253.9

// e^t for t <= 0. ln(2) in two parts, the first of 9 bits: n times it is exact.
ETUDE_INLINE float exp_negative(float t, float* down, float* down2) {
  t = t < kLowest ? kLowest : t;
  const float n = (t * 1.44269504f + kRounder) - kRounder;
  const float r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
  split_power(n, down, down2);
  return exp_reduced(r);
}

// The same for an exponent in float64. e^t has the relative error that t has as an absolute one: a
// float32 exponent near -80 would cost 6 bits.
ETUDE_INLINE float exp_negative(double t, float* down, float* down2) {
  t = t < kLowest ? static_cast<double>(kLowest) : t;
  const float n = (static_cast<float>(t) * 1.44269504f + kRounder) - kRounder;
  const float r = static_cast<float>(t - static_cast<double>(n) * 0.6931471805599453);
  split_power(n, down, down2);
  return exp_reduced(r);
}

// x * sigmoid(x) = x / (1 + e^-x); for negative x as x e^x / (1 + e^x), which cannot overflow.
ETUDE_INLINE float silu(float x) {
  float down, down2;
  const float p = exp_negative(x < 0.0f ? x : -x, &down, &down2);
  const float bottom = 1.0f + p * down * down2;
  return (x < 0.0f ? x * p * down * down2 : x) / bottom;
}

// s = sigmoid(x); silu = x s; silu' = s (1 + x (1 - s)), with 1 - s = sigmoid(-x) free of cancellation.
ETUDE_INLINE float silu_slope(float x, float* value) {
  float down, down2;
  const float e = exp_negative(x < 0.0f ? x : -x, &down, &down2) * down * down2;
  const float larger = 1.0f / (1.0f + e);
  const float smaller = e * larger;
  const float s = x < 0.0f ? smaller : larger;
  const float rest = x < 0.0f ? larger : smaller;
  *value = x * s;
  return s * (1.0f + x * rest);
}

// sigmoid(x) where only absolute accuracy counts (after a GroupNorm), at a third of the cost: no
// division, which takes 16 cycles for 16 lanes, one power of two, put into the exponent bits of p,
// and ln(2) as one number, 2e-9 off. Beyond |x| = 69 it stays at its value there; the clamp is one of
// integers, since the compiler turns one of floats into branches and those into masks.
// *rest = 1 - sigmoid(x), without cancellation.
ETUDE_INLINE float quick_sigmoid(float x, float* rest) {
  int32_t power, bits;
  __builtin_memcpy(&bits, &x, 4);
  const int32_t size = bits & 0x7fffffff;
  bits = (size < 0x428a0000 ? size : 0x428a0000) | (bits & static_cast<int32_t>(0x80000000u));
  float t;
  __builtin_memcpy(&t, &bits, 4);
  const float rounded = t * -1.44269504f + kRounder;
  const float n = rounded - kRounder;
  const float p = exp_reduced(-(n * 0.693147181f + t));
  __builtin_memcpy(&power, &rounded, 4);
  __builtin_memcpy(&bits, &p, 4);
  bits += static_cast<int32_t>(static_cast<uint32_t>(power) << 23);
  float e;
  __builtin_memcpy(&e, &bits, 4);
  // 1 / (1 + e): 6% off by the exponent's and mantissa's bits alone, then to the third power and
  // squared.
  const float bottom = 1.0f + e;
  __builtin_memcpy(&bits, &bottom, 4);
  bits = 0x7ef311c7 - bits;
  float s;
  __builtin_memcpy(&s, &bits, 4);
  const float off = 1.0f - bottom * s;
  s = s + s * (off * off + off);
  s = s + s * (1.0f - bottom * s);
  *rest = e * s;
  return s;
}

ETUDE_INLINE float quick_silu(float x) {
  float rest;
  return x * quick_sigmoid(x, &rest);
}

ETUDE_INLINE float quick_silu_slope(float x) {
  float rest;
  const float s = quick_sigmoid(x, &rest);
  return s + s * x * rest;
}

// 0.5 z (1 + tanh(u)) = z sigmoid(2 u), u = sqrt(2/pi) (z + 0.044715 z^3): no tanh, and no
// cancellation of 1 + tanh(u) for negative z.
constexpr double kTanhLinear = 1.5957691216057308;     // 2 sqrt(2/pi)
constexpr double kTanhCubic = 0.07135481627260026;     // that times 0.044715

ETUDE_INLINE float gelu_tanh(float z) {
  const double wide = z < 0.0f ? z : -z;
  float down, down2;
  const float p =
      exp_negative(wide * (kTanhLinear + kTanhCubic * wide * wide), &down, &down2);
  const float bottom = 1.0f + p * down * down2;
  return (z < 0.0f ? z * p * down * down2 : z) / bottom;
}

ETUDE_INLINE float gelu_tanh_slope(float z) {
  const float a = z < 0.0f ? z : -z;
  const float square = z * z;
  const float linear = static_cast<float>(kTanhLinear), cubic = static_cast<float>(kTanhCubic);
  float down, down2;
  const float e = exp_negative(a * (linear + cubic * square), &down, &down2) * down * down2;
  const float larger = 1.0f / (1.0f + e);
  const float smaller = e * larger;
  const float s = z < 0.0f ? smaller : larger;
  const float inner = z * (linear + 3.0f * cubic * square);
  // Where s (1 - s) has vanished, z^3 may have overflowed: 0 * inf.
  return s + (e > 0.0f ? larger * smaller * inner : 0.0f);
}

// Phi(z) = 1/2 + erf(z / sqrt(2)) / 2 by a rational minimax fit of its odd part, absolute error 1e-8
// before rounding; beyond 5.75 it is 0 or 1. Relative accuracy in the left tail would
// need an exponential, which costs the forward pass as much again, for values below 1e-7 |z|.
constexpr float kNormalEnd = 5.75f;

ETUDE_INLINE float normal_cdf(float z) {
  const float q = z * z;
  float top = 2.131377740965945e-08f;
  top = top * q + 6.388235760823591e-06f;
  top = top * q + 0.00018236038158647716f;
  top = top * q + 0.004758951719850302f;
  top = top * q + 0.03523898124694824f;
  top = top * q + 0.3989422023296356f;
  float bottom = 1.1581662420212524e-06f;
  bottom = bottom * q + 7.768188515910879e-05f;
  bottom = bottom * q + 0.001961479429155588f;
  bottom = bottom * q + 0.029430756345391273f;
  bottom = bottom * q + 0.2549963593482971f;
  bottom = bottom * q + 1.0f;
  const float inside = 0.5f + z * (top / bottom);
  const float outside = z < 0.0f ? 0.0f : 1.0f;
  return q > kNormalEnd * kNormalEnd ? outside : inside;
}

ETUDE_INLINE float gelu_erf(float z) { return z * normal_cdf(z); }

// Phi(z) + z phi(z).
ETUDE_INLINE float gelu_erf_slope(float z) {
  float down, down2;
  const float e = exp_negative(-0.5f * z * z, &down, &down2) * down * down2;
  return normal_cdf(z) + (e > 0.0f ? z * e * 0.3989422804014327f : 0.0f);
}

}  // namespace etude
