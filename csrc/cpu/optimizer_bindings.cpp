// The Python face of optimizer.cpp: raw addresses, dtypes and strides. Called by kernels/optimizer.py alone,
// which checks shapes and allocates outputs.
#include "optimizer.h"

#include <vector>

#include "bindings.h"

namespace etude {
namespace {

// tensors: (param, grad, grad dtype, exp_avg, exp_avg_sq, emas, numel, step size, sqrt(1 - beta2^t))
using AdamwRow = std::tuple<Address, Address, int, Address, Address, std::vector<Address>, int64_t,
                            double, double>;

void adamw_ema(const std::vector<AdamwRow>& tensors, const std::vector<double>& decays,
               double beta1, double beta2, double eps, double shrink, double grad_scale,
               bool scaled, int threads) {
  std::vector<float> kept, rest;
  for (double decay : decays) {
    kept.push_back(static_cast<float>(decay));
    rest.push_back(static_cast<float>(1.0 - decay));
  }
  std::vector<std::vector<float*>> emas;
  std::vector<AdamwTensor> list;
  emas.reserve(tensors.size());
  for (const auto& [param, grad, dtype, m, v, averages, numel, step_size, correction] : tensors) {
    emas.emplace_back();
    for (Address address : averages) emas.back().push_back(floats(address));
    list.push_back({floats(param), reinterpret_cast<const void*>(grad), dtype, floats(m), floats(v),
                    emas.back().data(), numel, static_cast<float>(step_size),
                    static_cast<float>(correction)});
  }
  ETUDE_CALL(adamw_ema)({list.data(), static_cast<int64_t>(list.size()),
                       static_cast<int>(decays.size()), kept.data(), rest.data(),
                       static_cast<float>(beta1), static_cast<float>(1.0 - beta1),
                       static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
                       static_cast<float>(eps), static_cast<float>(shrink),
                       static_cast<float>(grad_scale), scaled, threads});
}

const Binding optimizer([](py::module_& m) {
  m.def("adamw_ema", &adamw_ema, release());
});

}  // namespace
}  // namespace etude
