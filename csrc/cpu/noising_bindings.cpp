// The Python face of noising.cpp: raw addresses, dtypes and strides. Called by kernels/noising.py and
// kernels/philox.py alone, which check shapes and allocate outputs.
#include "noising.h"

#include "latents_bindings.h"

namespace etude {
namespace {

using Sizes = std::tuple<int64_t, int64_t, int64_t, int>;           // B, C, S, threads
using Key = std::tuple<Address, uint32_t, uint32_t>;                // positions, seed, stream

NoisingSizes sizes(const Sizes& s) {
  return {std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s)};
}

Draw draw(const Key& k) {
  return {reinterpret_cast<const int64_t*>(std::get<0>(k)), std::get<1>(k), std::get<2>(k)};
}

void uniform_pairs(Address positions, int64_t B, int64_t blocks, uint32_t seed, uint32_t stream,
                   Address u, Address angle, int threads) {
  ETUDE_CALL(uniform_pairs)({B, 1, blocks, threads}, draw({positions, seed, stream}), floats(u),
                            floats(angle));
}

void diffuse(const Sizes& shape, const Key& key, const Field& x0, const Field& out, Address alpha,
             Address sigma) {
  ETUDE_CALL(diffuse)({sizes(shape), draw(key), latents(x0), latents(out), floats(alpha),
                       floats(sigma)});
}

void diffusion_loss(const Sizes& shape, const Key& key, const Field& prediction,
                    const Field& variance, const Field& x0, Address alpha, Address sigma,
                    Address weight, Address bound, int target, Address partial, Address loss) {
  ETUDE_CALL(diffusion_loss)({sizes(shape), draw(key), latents(prediction), latents(variance),
                              latents(x0), floats(alpha), floats(sigma), floats(weight),
                              floats(bound), target, floats(partial), floats(loss), nullptr, {},
                              {}});
}

void diffusion_loss_backward(const Sizes& shape, const Key& key, const Field& prediction,
                             const Field& variance, const Field& x0, Address alpha, Address sigma,
                             Address weight, Address bound, int target, Address grad,
                             const Field& dprediction, const Field& dvariance) {
  ETUDE_CALL(diffusion_loss_backward)({sizes(shape), draw(key), latents(prediction),
                                       latents(variance), latents(x0), floats(alpha),
                                       floats(sigma), floats(weight), floats(bound), target,
                                       nullptr, nullptr, floats(grad), latents(dprediction),
                                       latents(dvariance)});
}

const Binding noising([](py::module_& m) {
  m.attr("NOISE_CHUNK") = kNoiseChunk;
  m.def("uniform_pairs", &uniform_pairs, release());
  m.def("diffuse", &diffuse, release());
  m.def("diffusion_loss", &diffusion_loss, release());
  m.def("diffusion_loss_backward", &diffusion_loss_backward, release());
});

}  // namespace
}  // namespace etude
