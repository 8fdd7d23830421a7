// The module etude.kernels._cpu: processor levels, and the functions that *_bindings.cpp register.
#include "bindings.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace etude {
namespace {

const char* const kNames[] = {"base", "v3", "v4"};

std::vector<void (*)(py::module_&)>& bindings() {
  static std::vector<void (*)(py::module_&)> all;
  return all;
}

// The best level that this build has and this processor can run.
int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef ETUDE_HAVE_V3
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#ifdef ETUDE_HAVE_V4
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  if (v3 && v4) return 2;
#endif
  if (v3) return 1;
#endif
#endif
  return 0;
}

int& chosen() {
  static int level = best_level();
  return level;
}

std::vector<std::string> level_names() { return {kNames, kNames + best_level() + 1}; }

std::string set_level(const std::string& name) {
  const std::string before = kNames[chosen()];
  for (int i = 0; i <= best_level(); ++i) {
    if (name == kNames[i]) {
      chosen() = i;
      return before;
    }
  }
  throw std::invalid_argument("this processor or build has no level " + name);
}

}  // namespace

Binding::Binding(void (*add)(py::module_&)) { bindings().push_back(add); }

int level() { return chosen(); }

}  // namespace etude

PYBIND11_MODULE(_cpu, m) {
  using namespace etude;
  m.doc() = "Etude's CPU kernels on raw addresses; called by etude.kernels only.";
  m.attr("FLOAT32") = static_cast<int>(kFloat32);
  m.attr("BFLOAT16") = static_cast<int>(kBFloat16);
  m.def("levels", &level_names, "Levels this processor can run, weakest first.");
  m.def("level", [] { return std::string(kNames[level()]); }, "The level in use.");
  m.def("set_level", &set_level, "Use a level (tests); returns the one used before.");
  for (auto add : bindings()) add(m);
}
