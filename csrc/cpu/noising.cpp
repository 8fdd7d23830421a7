// Noise from Philox counters, noising, and the diffusion losses with their gradients. The mathematics
// is in kernels/noising.py and kernels/philox.py, which are also the only callers.
//
// A sample is worked on in chunks of kNoiseChunk elements in logical (c, h, w) order. Every chunk
// draws its noise into a buffer of the first-level cache and uses it at once: the noise never goes to
// memory. Logarithm, sine, cosine and exponential are polynomials
// without branches, because calls into libm would keep the compiler from using vectors.
#include "noising.h"

#include <math.h>

#include "walk.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace etude {
namespace ETUDE_LEVEL {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float of_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// log of a normal positive number: mantissa in [sqrt(1/2), sqrt(2)), log(1 + f) = f - f^2/2 + f^3 P.
inline float log_of(float x) {
  const int32_t e = static_cast<int32_t>(bits_of(x) - 0x3f3504f3u) >> 23;
  const float f = of_bits(bits_of(x) - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  float p = 0.07149833f;
  p = p * f - 0.11571308f;
  p = p * f + 0.11661531f;
  p = p * f - 0.12411038f;
  p = p * f + 0.14249933f;
  p = p * f - 0.1666848f;
  p = p * f + 0.20000708f;
  p = p * f - 0.2499999f;
  p = p * f + 0.3333333f;
  const float n = static_cast<float>(e);
  return n * 0.69140625f + (f + (n * 0.0017409306f + (f * f * (p * f) - 0.5f * (f * f))));
}

// e^x for |x| < 87, held there: 2^n e^r with |r| <= log(2) / 2.
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.69140625f) - n * 0.0017409306f;
  float p = 1.9899286e-4f;
  p = p * r + 1.3933651e-3f;
  p = p * r + 8.3332984e-3f;
  p = p * r + 4.1666467e-2f;
  p = p * r + 0.16666667f;
  p = p * r + 0.5f;
  const float y = 1.0f + (r + r * r * p);
  return y * of_bits((bits_of(shifted) - 0x4b400000u + 127u) << 23);
}

constexpr int64_t kCounters = kNoiseChunk / 4;

// A counter's words, each in the low half of a 64-bit lane: the multiplication of low halves to whole
// lanes is then all that a round needs beside shifts and exclusive ors, and what the high halves hold
// does not matter. (From plain C++ the compiler makes shuffles to widen and narrow in every round.)
#if defined(__AVX512F__)
constexpr int64_t kLanes = 8;
using Lanes = __m512i;
inline Lanes fill(uint32_t x) { return _mm512_set1_epi64(x); }
inline Lanes steps() { return _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
inline Lanes high(Lanes a) { return _mm512_srli_epi64(a, 32); }
inline Lanes mix(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline void narrow(Lanes a, uint32_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi64_epi32(a));
}
#elif defined(__AVX2__)
constexpr int64_t kLanes = 4;
using Lanes = __m256i;
inline Lanes fill(uint32_t x) { return _mm256_set1_epi64x(x); }
inline Lanes steps() { return _mm256_setr_epi64x(0, 1, 2, 3); }
inline Lanes add(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
inline Lanes high(Lanes a) { return _mm256_srli_epi64(a, 32); }
inline Lanes mix(Lanes a, Lanes b, Lanes c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
inline void narrow(Lanes a, uint32_t* to) {
  const __m256i low = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(low));
}
#elif defined(__SSE2__)
constexpr int64_t kLanes = 2;
using Lanes = __m128i;
inline Lanes fill(uint32_t x) { return _mm_set1_epi64x(x); }
inline Lanes steps() { return _mm_set_epi64x(1, 0); }
inline Lanes add(Lanes a, Lanes b) { return _mm_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm_mul_epu32(a, b); }
inline Lanes high(Lanes a) { return _mm_srli_epi64(a, 32); }
inline Lanes mix(Lanes a, Lanes b, Lanes c) { return _mm_xor_si128(_mm_xor_si128(a, b), c); }
inline void narrow(Lanes a, uint32_t* to) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi32(a, _MM_SHUFFLE(3, 1, 2, 0)));
}
#else
constexpr int64_t kLanes = 1;
using Lanes = uint64_t;
inline Lanes fill(uint32_t x) { return x; }
inline Lanes steps() { return 0; }
inline Lanes add(Lanes a, Lanes b) { return a + b; }
inline Lanes multiply(Lanes a, Lanes b) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b);
}
inline Lanes high(Lanes a) { return a >> 32; }
inline Lanes mix(Lanes a, Lanes b, Lanes c) { return a ^ b ^ c; }
inline void narrow(Lanes a, uint32_t* to) { *to = static_cast<uint32_t>(a); }
#endif

// Ten rounds of Philox on the counters (position, position >> 32, first + j, 0), j below count; up to
// kLanes - 1 words beyond them are written too.
void philox(const Draw& draw, int64_t b, uint32_t first, int64_t count,
            uint32_t words[4][kCounters]) {
  const uint64_t position = static_cast<uint64_t>(draw.positions[b]);
  const Lanes low = fill(static_cast<uint32_t>(position));
  const Lanes top = fill(static_cast<uint32_t>(position >> 32));
  const Lanes first_factor = fill(0xD2511F53u), second_factor = fill(0xCD9E8D57u);
  for (int64_t j = 0; j < count; j += kLanes) {
    Lanes c0 = low, c1 = top, c2 = add(fill(first + static_cast<uint32_t>(j)), steps());
    Lanes c3 = fill(0);
    uint32_t seed = draw.seed, stream = draw.stream;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Lanes one = multiply(c0, first_factor), two = multiply(c2, second_factor);
      c0 = mix(high(two), c1, fill(seed));
      c1 = two;
      c2 = mix(high(one), c3, fill(stream));
      c3 = one;
      seed += 0x9E3779B9u;
      stream += 0xBB67AE85u;
    }
    narrow(c0, words[0] + j);
    narrow(c1, words[1] + j);
    narrow(c2, words[2] + j);
    narrow(c3, words[3] + j);
  }
}

// 24 bits pass through int32: signed conversions have vector instructions at every level.
inline float uniform(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8) + 1) * 0x1p-24f;
}

inline float angle_of(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) *
         static_cast<float>(2.0 * 3.14159265358979323846 * 0x1p-24);
}

// radius cos(angle) and radius sin(angle). The quadrant comes from the word's own bits, exactly; the
// angle, in the float32 that every backend rounds it to, then loses q pi/2 in three exact-ish parts.
inline void box_muller(uint32_t first, uint32_t second, float* cosine, float* sine) {
  const float radius = sqrtf(-2.0f * log_of(uniform(first)));
  const uint32_t quadrant = ((second >> 8) + (1u << 21)) >> 22;
  const float q = static_cast<float>(static_cast<int32_t>(quadrant));
  const float x =
      ((angle_of(second) - q * 1.5703125f) - q * 4.83751297e-4f) - q * 7.54979013e-8f;
  const float z = x * x;
  const float s = x + x * z * (-0.16666667f + z * (8.3333319e-3f +
                  z * (-1.9840075e-4f + z * 2.7248402e-6f)));
  const float c = (1.0f - 0.5f * z) + z * z * (4.1666668e-2f + z * (-1.3888888e-3f +
                  z * (2.4800591e-5f - z * 2.7299683e-7f)));
  const bool swap = quadrant & 1u;
  const float cos_sign = of_bits(0x3f800000u | (((quadrant + 1u) & 2u) << 30));
  const float sin_sign = of_bits(0x3f800000u | ((quadrant & 2u) << 30));
  *cosine = radius * (cos_sign * (swap ? s : c));
  *sine = radius * (sin_sign * (swap ? c : s));
}

// The noise of logical elements [first, first + 4 * blocks) of one position; first is 4 block0.
void draw_noise(const Draw& draw, int64_t b, int64_t block0, int64_t blocks, float* to) {
  const int32_t count = static_cast<int32_t>(blocks);
  uint32_t words[4][kCounters];
  float lanes[4][kCounters];
  philox(draw, b, static_cast<uint32_t>(block0), count, words);
#pragma omp simd
  for (int32_t j = 0; j < count; ++j) {
    box_muller(words[0][j], words[1][j], &lanes[0][j], &lanes[1][j]);
    box_muller(words[2][j], words[3][j], &lanes[2][j], &lanes[3][j]);
  }
#pragma omp simd
  for (int32_t j = 0; j < count; ++j) {
    to[4 * j] = lanes[0][j];
    to[4 * j + 1] = lanes[1][j];
    to[4 * j + 2] = lanes[2][j];
    to[4 * j + 3] = lanes[3][j];
  }
}

// target = eps_scale * eps + x0_scale * x0
void target_scales(const DiffusionLoss& a, int64_t b, float* eps_scale, float* x0_scale) {
  const float eps[4] = {1.0f, 1.0f, a.alpha[b], 0.0f};
  const float x0[4] = {-1.0f, 0.0f, -a.sigma[b], 1.0f};
  *eps_scale = eps[a.target];
  *x0_scale = x0[a.target];
}

struct Bound {
  float mean_scale, log_smallest, log_largest, first;
};

Bound bound_of(const DiffusionLoss& a, int64_t b) {
  const float* const row = a.bound + 4 * b;
  return {row[0], row[1], row[2], row[3]};
}

// The divergence of the predicted from the true posterior, and its slope by log_hat.
inline float divergence(const Bound& k, float difference, float log_hat, float* slope) {
  const float ratio = exp_of(k.log_smallest - log_hat);
  const float miss = k.mean_scale * difference;
  const float squares = miss * miss * exp_of(-log_hat);
  *slope = 0.5f * (1.0f - ratio - squares);
  return 0.5f * ((log_hat - k.log_smallest - 1.0f + ratio) + squares);
}

// The tanh approximation of the normal distribution function is a logistic one; z is its argument
// and *slope the derivative by x.
inline float normal_cdf(float x, float* slope) {
  const float z = 1.5957691216f * (x + 0.044715f * x * x * x);
  const float y = 1.0f / (1.0f + exp_of(-z));
  *slope = y * (1.0f - y) * 1.5957691216f * (1.0f + 0.134145f * x * x);
  return y;
}

// Minus the log likelihood of the 8-bit level of x0 under a normal, and its slope by log_hat. The
// level between two bounds is taken on the lower tail, where the difference of two small numbers
// keeps its digits.
inline float likelihood(const Bound& k, float x0, float difference, float log_hat, float* slope) {
  const float scale = exp_of(-0.5f * log_hat);
  const float centred = k.mean_scale * difference;
  const bool lowest = x0 < -0.999f, highest = x0 > 0.999f, open = lowest || highest;
  const float folded = open ? (lowest ? centred : -centred) : (centred < 0 ? centred : -centred);
  const float upper = (folded + 1.0f / 255.0f) * scale, lower = (folded - 1.0f / 255.0f) * scale;
  float upper_slope, lower_slope;
  const float upper_cdf = normal_cdf(upper, &upper_slope);
  const float lower_cdf = normal_cdf(lower, &lower_slope);
  const float inside = open ? upper_cdf : upper_cdf - lower_cdf;
  // d upper / d log_hat = -upper / 2
  const float change = -0.5f * (upper * upper_slope - (open ? 0.0f : lower * lower_slope));
  const bool held = inside < 1e-12f;
  *slope = held ? 0.0f : -change / inside;
  // log_of sees bits alone and would make a number of a NaN.
  return inside != inside ? inside : -log_of(held ? 1e-12f : inside);
}

// Sum of one chunk: weight * (prediction - target)^2, plus the bound in bits.
float loss_chunk(const DiffusionLoss& a, int64_t b, int64_t first, int64_t count) {
  const int64_t S = a.sizes.S;
  float eps[kNoiseChunk], pb[kNoiseChunk], xb[kNoiseChunk], vb[kNoiseChunk];
  draw_noise(a.draw, b, first / 4, (count + 3) / 4, eps);
  const float* const prediction = load(a.prediction, b, S, first, count, pb);
  float eps_scale, x0_scale, sum = 0.0f;
  target_scales(a, b, &eps_scale, &x0_scale);
  const bool needs_x0 = a.target != kEps || a.bound;
  const float* const x0 = needs_x0 ? load(a.x0, b, S, first, count, xb) : eps;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const float d = prediction[i] - (eps_scale * eps[i] + x0_scale * x0[i]);
    sum += d * d;
  }
  sum *= a.weight ? a.weight[b] : 1.0f;
  if (!a.bound) return sum;
  const Bound k = bound_of(a, b);
  const float* const variance = load(a.variance, b, S, first, count, vb);
  float bits = 0.0f;
  if (k.first != 0.0f) {
#pragma omp simd reduction(+ : bits)
    for (int64_t i = 0; i < count; ++i) {
      const float f = 0.5f * (variance[i] + 1.0f);
      const float log_hat = f * k.log_largest + (1.0f - f) * k.log_smallest;
      float slope;
      bits += likelihood(k, x0[i], prediction[i] - eps[i], log_hat, &slope);
    }
  } else {
#pragma omp simd reduction(+ : bits)
    for (int64_t i = 0; i < count; ++i) {
      const float f = 0.5f * (variance[i] + 1.0f);
      const float log_hat = f * k.log_largest + (1.0f - f) * k.log_smallest;
      float slope;
      bits += divergence(k, prediction[i] - eps[i], log_hat, &slope);
    }
  }
  return sum + bits * 1.44269504f;
}

void backward_chunk(const DiffusionLoss& a, int64_t b, int64_t first, int64_t count) {
  const int64_t S = a.sizes.S;
  float eps[kNoiseChunk], pb[kNoiseChunk], xb[kNoiseChunk], vb[kNoiseChunk], gb[kNoiseChunk];
  draw_noise(a.draw, b, first / 4, (count + 3) / 4, eps);
  const float* const prediction = load(a.prediction, b, S, first, count, pb);
  float eps_scale, x0_scale;
  target_scales(a, b, &eps_scale, &x0_scale);
  const bool needs_x0 = a.target != kEps || a.bound;
  const float* const x0 = needs_x0 ? load(a.x0, b, S, first, count, xb) : eps;
  const float mean = a.grad[b] / static_cast<float>(a.sizes.C * S);
  const float factor = 2.0f * mean * (a.weight ? a.weight[b] : 1.0f);
  float* const grad = place(a.dprediction, b, S, first, gb);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    grad[i] = factor * (prediction[i] - (eps_scale * eps[i] + x0_scale * x0[i]));
  store(a.dprediction, b, S, first, count, grad);
  if (!a.bound) return;
  const Bound k = bound_of(a, b);
  const float* const variance = load(a.variance, b, S, first, count, vb);
  float* const dv = place(a.dvariance, b, S, first, gb);
  const float rise = 0.5f * (k.log_largest - k.log_smallest) * mean * 1.44269504f;
  if (k.first != 0.0f) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float f = 0.5f * (variance[i] + 1.0f);
      const float log_hat = f * k.log_largest + (1.0f - f) * k.log_smallest;
      float slope;
      likelihood(k, x0[i], prediction[i] - eps[i], log_hat, &slope);
      dv[i] = rise * slope;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float f = 0.5f * (variance[i] + 1.0f);
      const float log_hat = f * k.log_largest + (1.0f - f) * k.log_smallest;
      float slope;
      divergence(k, prediction[i] - eps[i], log_hat, &slope);
      dv[i] = rise * slope;
    }
  }
  store(a.dvariance, b, S, first, count, dv);
}

void diffuse_chunk(const Diffuse& a, int64_t b, int64_t first, int64_t count) {
  const int64_t S = a.sizes.S;
  float eps[kNoiseChunk], xb[kNoiseChunk], ob[kNoiseChunk];
  draw_noise(a.draw, b, first / 4, (count + 3) / 4, eps);
  float* const out = place(a.out, b, S, first, ob);
  if (a.x0.data) {
    const float* const x0 = load(a.x0, b, S, first, count, xb);
    const float alpha = a.alpha[b], sigma = a.sigma[b];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = alpha * x0[i] + sigma * eps[i];
  } else {
    __builtin_memcpy(out, eps, static_cast<size_t>(count) * sizeof(float));
  }
  store(a.out, b, S, first, count, out);
}

// run(sample, first element, elements, task) for every chunk of every sample.
template <class Run>
void chunks(const NoisingSizes& sizes, Run run) {
  const int64_t numel = sizes.C * sizes.S, per = (numel + kNoiseChunk - 1) / kNoiseChunk;
#pragma omp parallel for schedule(static) num_threads(sizes.threads) \
    if (sizes.threads > 1 && sizes.B * per > 4)
  for (int64_t task = 0; task < sizes.B * per; ++task) {
    const int64_t first = task % per * kNoiseChunk;
    run(task / per, first, min64(kNoiseChunk, numel - first), task);
  }
}

}  // namespace

// Here C is 1 and S the number of counters per position.
void uniform_pairs(const NoisingSizes& sizes, const Draw& draw, float* u, float* angle) {
  chunks(sizes, [&](int64_t b, int64_t first, int64_t count, int64_t) {
    for (int64_t done = 0; done < count; done += kCounters) {
      const int32_t now = static_cast<int32_t>(min64(kCounters, count - done));
      uint32_t words[4][kCounters];
      philox(draw, b, static_cast<uint32_t>(first + done), now, words);
      float* const to_u = u + 2 * (b * sizes.S + first + done);
      float* const to_angle = angle + 2 * (b * sizes.S + first + done);
#pragma omp simd
      for (int32_t j = 0; j < now; ++j) {
        to_u[2 * j] = uniform(words[0][j]);
        to_u[2 * j + 1] = uniform(words[2][j]);
        to_angle[2 * j] = angle_of(words[1][j]);
        to_angle[2 * j + 1] = angle_of(words[3][j]);
      }
    }
  });
}

void diffuse(const Diffuse& a) {
  chunks(a.sizes, [&](int64_t b, int64_t first, int64_t count, int64_t) {
    diffuse_chunk(a, b, first, count);
  });
}

void diffusion_loss(const DiffusionLoss& a) {
  chunks(a.sizes, [&](int64_t b, int64_t first, int64_t count, int64_t task) {
    a.partial[task] = loss_chunk(a, b, first, count);
  });
  // Second stage: a sample's chunks in order.
  const int64_t numel = a.sizes.C * a.sizes.S, per = (numel + kNoiseChunk - 1) / kNoiseChunk;
  for (int64_t b = 0; b < a.sizes.B; ++b) {
    float sum = 0.0f;
    for (int64_t c = 0; c < per; ++c) sum += a.partial[b * per + c];
    a.loss[b] = sum / static_cast<float>(numel);
  }
}

void diffusion_loss_backward(const DiffusionLoss& a) {
  chunks(a.sizes, [&](int64_t b, int64_t first, int64_t count, int64_t) {
    backward_chunk(a, b, first, count);
  });
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
