// What every *_bindings.cpp shares. A family's file registers its functions by itself:
//
//   const Binding adaln([](py::module_& m) { m.def("adaln_forward", &adaln_forward, release()); });
//
// and calls its kernel at the level in use by ETUDE_CALL(adaln_forward)(arguments).
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <type_traits>

#include "common.h"

namespace py = pybind11;

namespace etude {

using Address = uintptr_t;
using Tensor = std::tuple<Address, int, int64_t, int64_t>;  // address, dtype, batch and row stride

inline Rows rows(const Tensor& t) {
  return {reinterpret_cast<void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

inline float* floats(Address address) { return reinterpret_cast<float*>(address); }

// Kernels run without Python's lock.
inline py::call_guard<py::gil_scoped_release> release() { return {}; }

// One family's functions, added to the module when it is imported.
struct Binding {
  explicit Binding(void (*add)(py::module_&));
};

int level();  // the level in use: 0 base, 1 v3, 2 v4

template <class F>
F* at_level(F* base, std::common_type_t<F*> v3, std::common_type_t<F*> v4) {
  return level() == 2 ? v4 : level() == 1 ? v3 : base;
}

#ifdef ETUDE_HAVE_V3
#define ETUDE_V3(function) &v3::function
#else
#define ETUDE_V3(function) nullptr
#endif
#ifdef ETUDE_HAVE_V4
#define ETUDE_V4(function) &v4::function
#else
#define ETUDE_V4(function) nullptr
#endif
#define ETUDE_CALL(function) at_level(&base::function, ETUDE_V3(function), ETUDE_V4(function))

}  // namespace etude
