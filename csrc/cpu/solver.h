// Arguments of the sampling kernels (solver.cpp); filled in by solver_bindings.cpp.
#pragma once
#include "latents.h"

namespace etude {

struct SolverStep {
  int64_t B, C, S;
  Latents x, prediction;  // prediction: scales + 1 blocks of B samples; channels beyond C are skipped
  Latents extra;          // a previous x0 or a noise; may be absent
  Latents next, x0;       // written; x0 may be absent
  const float* coefficients;  // 8 per sample
  int64_t coefficient_stride;
  const float* guidance;  // `scales` per sample
  int64_t guidance_stride;
  int scales;        // 0, 1 or 2
  int64_t guided;    // channels that guidance changes
  int threads;
};

struct ToUint8 {
  int64_t B, C, S;
  Latents images;
  uint8_t* out;  // (B, S, C)
  int threads;
};

ETUDE_DECLARE(
    void solver_step(const SolverStep& a);
    void to_uint8(const ToUint8& a);
)

}  // namespace etude
