// The Python face of solver.cpp: raw addresses, dtypes and strides. Called by kernels/solver.py alone,
// which checks shapes and allocates outputs.
#include "solver.h"

#include "latents_bindings.h"

namespace etude {
namespace {

using Shape = std::tuple<int64_t, int64_t, int64_t>;  // B, C, S
using Scales = std::tuple<Address, int64_t, int, int64_t>;  // address, stride, scales, channels

void solver_step(const Shape& shape, const Field& x, const Field& prediction, const Field& extra,
                 const Field& next, const Field& x0, Address coefficients, int64_t stride,
                 const Scales& guidance, int threads) {
  const auto [B, C, S] = shape;
  const auto [weights, weight_stride, scales, guided] = guidance;
  ETUDE_CALL(solver_step)({B, C, S, latents(x), latents(prediction), latents(extra), latents(next),
                           latents(x0), floats(coefficients), stride, floats(weights),
                           weight_stride, scales, guided, threads});
}

void to_uint8(const Shape& shape, const Field& images, Address out, int threads) {
  const auto [B, C, S] = shape;
  ETUDE_CALL(to_uint8)({B, C, S, latents(images), reinterpret_cast<uint8_t*>(out), threads});
}

const Binding solver([](py::module_& m) {
  m.def("solver_step", &solver_step, release());
  m.def("to_uint8", &to_uint8, release());
});

}  // namespace
}  // namespace etude
