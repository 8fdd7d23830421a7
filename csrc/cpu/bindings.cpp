// The Python face of the CPU kernels: raw addresses, dtypes and strides, no torch headers.
// Called by kernels/adaln.py and kernels/optimizer.py, which check shapes and allocate outputs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace etude;

namespace {

using Address = uintptr_t;
using Tensor = std::tuple<Address, int, int64_t, int64_t>;  // address, dtype, batch and row stride

struct Level {
  const char* name;
  decltype(&base::adaln_forward) adaln_forward;
  decltype(&base::adaln_backward) adaln_backward;
  decltype(&base::adamw_ema) adamw_ema;
};

#define ETUDE_LEVEL_ROW(level) {#level, level::adaln_forward, level::adaln_backward, level::adamw_ema}

std::vector<Level> usable_levels() {
  std::vector<Level> levels{ETUDE_LEVEL_ROW(base)};
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef ETUDE_HAVE_V3
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (v3) levels.push_back(ETUDE_LEVEL_ROW(v3));
#ifdef ETUDE_HAVE_V4
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  if (v3 && v4) levels.push_back(ETUDE_LEVEL_ROW(v4));
#endif
#endif
#endif
  return levels;
}

const std::vector<Level>& levels() {
  static const std::vector<Level> found = usable_levels();
  return found;
}

Level& current() {
  static Level chosen = levels().back();
  return chosen;
}

std::vector<std::string> level_names() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.name);
  return names;
}

std::string set_level(const std::string& name) {
  const std::string before = current().name;
  for (const Level& level : levels()) {
    if (name == level.name) {
      current() = level;
      return before;
    }
  }
  throw std::invalid_argument("this processor or build has no level " + name);
}

Rows rows(const Tensor& t) {
  return {reinterpret_cast<void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

float* floats(Address address) { return reinterpret_cast<float*>(address); }

void adaln_forward(std::tuple<int64_t, int64_t, int64_t> shape, const Tensor& x, const Tensor& h,
                   const Tensor& gate, const Tensor& shift, const Tensor& scale, const Tensor& out,
                   const Tensor& y, Address mean, Address rstd, double eps, bool rms, int threads) {
  const auto [B, N, D] = shape;
  current().adaln_forward({B, N, D, rows(x), rows(h), rows(gate), rows(shift), rows(scale),
                           rows(out), rows(y), floats(mean), floats(rstd),
                           static_cast<float>(eps), rms, threads});
}

void adaln_backward(std::tuple<int64_t, int64_t, int64_t> shape, const Tensor& dout,
                    const Tensor& dy, const Tensor& x, const Tensor& h, const Tensor& gate,
                    const Tensor& scale, Address mean, Address rstd, const Tensor& dx,
                    const Tensor& dh, const Tensor& dgate, const Tensor& dshift,
                    const Tensor& dscale, Address partial, bool rms, int threads) {
  const auto [B, N, D] = shape;
  current().adaln_backward({B, N, D, rows(dout), rows(dy), rows(x), rows(h), rows(gate),
                            rows(scale), floats(mean), floats(rstd), rows(dx), rows(dh),
                            rows(dgate), rows(dshift), rows(dscale), floats(partial), rms,
                            threads});
}

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
  current().adamw_ema({list.data(), static_cast<int64_t>(list.size()),
                       static_cast<int>(decays.size()), kept.data(), rest.data(),
                       static_cast<float>(beta1), static_cast<float>(1.0 - beta1),
                       static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
                       static_cast<float>(eps), static_cast<float>(shrink),
                       static_cast<float>(grad_scale), scaled, threads});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Etude's CPU kernels on raw addresses; called by etude.kernels only.";
  m.attr("ROWS_PER_CHUNK") = kRowsPerChunk;
  m.attr("FLOAT32") = static_cast<int>(kFloat32);
  m.attr("BFLOAT16") = static_cast<int>(kBFloat16);
  m.def("levels", &level_names, "Levels this processor can run, weakest first.");
  m.def("level", [] { return std::string(current().name); }, "The level in use.");
  m.def("set_level", &set_level, "Use a level (tests); returns the one used before.");
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("adaln_forward", &adaln_forward, release);
  m.def("adaln_backward", &adaln_backward, release);
  m.def("adamw_ema", &adamw_ema, release);
}
