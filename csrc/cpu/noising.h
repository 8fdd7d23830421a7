// Arguments of the noising kernels (noising.cpp); filled in by noising_bindings.cpp.
#pragma once
#include "latents.h"

namespace etude {

// Which noise: one position per sample, and Philox's key.
struct Draw {
  const int64_t* positions;
  uint32_t seed, stream;
};

struct NoisingSizes {
  int64_t B, C, S;  // samples, channels, pixels
  int threads;
};

// x_t = alpha x0 + sigma eps; without x0 it is eps.
struct Diffuse {
  NoisingSizes sizes;
  Draw draw;
  Latents x0, out;
  const float* alpha;
  const float* sigma;
};

enum Target : int { kFlow = 0, kEps = 1, kV = 2, kX0 = 3 };

struct DiffusionLoss {
  NoisingSizes sizes;
  Draw draw;
  Latents prediction, variance, x0;  // a variance goes with a bound
  const float* alpha;
  const float* sigma;
  const float* weight;  // (B,) or absent
  const float* bound;   // (B, 4): mean_scale, log_smallest, log_largest, first; or absent
  int target;
  float* partial;     // (B, ceil(C * S / kNoiseChunk)), workspace of the forward pass
  float* loss;        // (B,), written by the forward pass
  const float* grad;  // (B,), read by the backward pass
  Latents dprediction, dvariance;
};

constexpr int64_t kNoiseChunk = 1024;  // elements; fixed, so that sums do not depend on threads

ETUDE_DECLARE(
    void uniform_pairs(const NoisingSizes& sizes, const Draw& draw, float* u, float* angle);
    void diffuse(const Diffuse& a);
    void diffusion_loss(const DiffusionLoss& a);
    void diffusion_loss_backward(const DiffusionLoss& a);
)

}  // namespace etude
