// The Python face of optimizer.cpp: raw addresses, dtypes and strides. Called by kernels/optimizer.py alone,
// which checks shapes and memory layouts.
#include "optimizer.h"

#include <vector>

#include "bindings.h"

namespace etude {
namespace {

// tensors: (param, grad, grad dtype, exp_avg, exp_avg_sq, emas, copy or 0, numel, step size, eps)
using AdamwRow = std::tuple<Address, Address, int, Address, Address, std::vector<Address>, Address,
                            int64_t, double, double>;

void adamw_ema(const std::vector<AdamwRow>& tensors, const std::vector<double>& decays,
               double beta1, double beta2, double shrink, double grad_scale, int threads) {
  std::vector<std::vector<float*>> emas;
  std::vector<AdamwTensor> list;
  emas.reserve(tensors.size());
  for (const auto& [param, grad, dtype, m, v, averages, copy, numel, step_size, eps] : tensors) {
    emas.emplace_back();
    for (Address address : averages) emas.back().push_back(floats(address));
    list.push_back({floats(param), reinterpret_cast<const void*>(grad), dtype, floats(m), floats(v),
                    emas.back().data(), reinterpret_cast<uint16_t*>(copy), numel, step_size, eps});
  }
  ETUDE_CALL(adamw_ema)({list.data(), static_cast<int64_t>(list.size()),
                         static_cast<int>(decays.size()), decays.data(), beta1, beta2, shrink,
                         grad_scale, threads});
}

const Binding optimizer([](py::module_& m) {
  m.def("adamw_ema", &adamw_ema, release());
});

}  // namespace
}  // namespace etude
