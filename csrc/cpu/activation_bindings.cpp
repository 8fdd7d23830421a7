// The Python face of activation.cpp: raw addresses, dtypes and strides. Called by
// kernels/activation.py alone, which checks shapes and allocates outputs.
#include "activation.h"

#include "bindings.h"

namespace etude {
namespace {

using Size = std::tuple<int64_t, int64_t>;

void gelu_forward(Size size, const Tensor& x, const Tensor& bias, const Tensor& y, bool tanh,
                  int threads) {
  const auto [N, D] = size;
  ETUDE_CALL(gelu_forward)({N, D, rows(x), rows(bias), rows(y), tanh, threads});
}

void gelu_backward(Size size, const Tensor& dy, const Tensor& x, const Tensor& bias,
                   const Tensor& dx, const Tensor& dbias, Address partial, bool tanh, int threads) {
  const auto [N, D] = size;
  ETUDE_CALL(gelu_backward)({N, D, rows(dy), rows(x), rows(bias), rows(dx), rows(dbias),
                             floats(partial), tanh, threads});
}

void swiglu_forward(Size size, const Tensor& gate, const Tensor& value, const Tensor& y,
                    int threads) {
  const auto [N, D] = size;
  ETUDE_CALL(swiglu_forward)({N, D, rows(gate), rows(value), rows(y), threads});
}

void swiglu_backward(Size size, const Tensor& dy, const Tensor& gate, const Tensor& value,
                     const Tensor& dgate, const Tensor& dvalue, int threads) {
  const auto [N, D] = size;
  ETUDE_CALL(swiglu_backward)({N, D, rows(dy), rows(gate), rows(value), rows(dgate), rows(dvalue),
                               threads});
}

const Binding activation([](py::module_& m) {
  m.attr("ACTIVATION_ROWS") = kActivationRows;
  m.def("gelu_forward", &gelu_forward, release());
  m.def("gelu_backward", &gelu_backward, release());
  m.def("swiglu_forward", &swiglu_forward, release());
  m.def("swiglu_backward", &swiglu_backward, release());
});

}  // namespace
}  // namespace etude
