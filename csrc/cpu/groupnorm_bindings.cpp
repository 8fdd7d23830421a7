// The Python face of groupnorm.cpp: raw addresses, dtypes and strides. Called by kernels/groupnorm.py
// alone, which checks shapes and allocates outputs.
#include "groupnorm.h"

#include "bindings.h"

namespace etude {
namespace {

using Size = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // B, S, C, groups

void groupnorm_forward(Size size, const Tensor& x, const Tensor& weight, const Tensor& bias,
                       const Tensor& y, Address mean, Address rstd, Address partial, double eps,
                       bool silu, bool channels_last, int threads) {
  const auto [B, S, C, groups] = size;
  ETUDE_CALL(groupnorm_forward)({B, S, C, groups, rows(x), rows(weight), rows(bias), rows(y),
                                 floats(mean), floats(rstd), floats(partial),
                                 static_cast<float>(eps), silu, channels_last, threads});
}

void groupnorm_backward(Size size, const Tensor& dy, const Tensor& x, const Tensor& weight,
                        const Tensor& bias, Address mean, Address rstd, const Tensor& dx,
                        const Tensor& dweight, const Tensor& dbias, const Tensor& kept,
                        Address partial, bool silu, bool channels_last, int threads) {
  const auto [B, S, C, groups] = size;
  ETUDE_CALL(groupnorm_backward)({B, S, C, groups, rows(dy), rows(x), rows(weight), rows(bias),
                                  floats(mean), floats(rstd), rows(dx), rows(dweight), rows(dbias),
                                  rows(kept), floats(partial), silu, channels_last, threads});
}

const Binding groupnorm([](py::module_& m) {
  m.attr("GROUPNORM_POSITIONS") = kPositions;
  m.def("groupnorm_forward", &groupnorm_forward, release());
  m.def("groupnorm_backward", &groupnorm_backward, release());
});

}  // namespace
}  // namespace etude
