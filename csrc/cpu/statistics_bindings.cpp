// The Python face of statistics.cpp. Called by kernels/statistics.py alone, which checks shapes and
// allocates the outputs.
#include "statistics.h"

#include "bindings.h"

namespace etude {
namespace {

void moments(int64_t rows, int64_t width, Address x, int64_t stride, Address mean, Address scatter,
             int threads) {
  ETUDE_CALL(moments)({rows, width, floats(x), stride, reinterpret_cast<double*>(mean),
                     reinterpret_cast<double*>(scatter), threads});
}

const Binding statistics([](py::module_& m) { m.def("moments", &moments, release()); });

}  // namespace
}  // namespace etude
