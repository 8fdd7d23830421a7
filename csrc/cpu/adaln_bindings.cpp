// The Python face of adaln.cpp: raw addresses, dtypes and strides. Called by kernels/adaln.py alone,
// which checks shapes and allocates outputs.
#include "adaln.h"

#include "bindings.h"

namespace etude {
namespace {

void adaln_forward(std::tuple<int64_t, int64_t, int64_t> shape, const Tensor& x, const Tensor& h,
                   const Tensor& gate, const Tensor& shift, const Tensor& scale, const Tensor& bias,
                   const Tensor& out, const Tensor& y, Address mean, Address rstd, double eps,
                   bool rms, int threads) {
  const auto [B, N, D] = shape;
  ETUDE_CALL(adaln_forward)({B, N, D, rows(x), rows(h), rows(gate), rows(shift), rows(scale),
                           rows(bias), rows(out), rows(y), floats(mean), floats(rstd),
                           static_cast<float>(eps), rms, threads});
}

void adaln_backward(std::tuple<int64_t, int64_t, int64_t> shape, const Tensor& dout,
                    const Tensor& dy, const Tensor& x, const Tensor& h, const Tensor& gate,
                    const Tensor& scale, const Tensor& bias, Address mean, Address rstd,
                    const Tensor& dx, const Tensor& dh, const Tensor& dgate, const Tensor& dshift,
                    const Tensor& dscale, const Tensor& dbias, Address partial, bool rms,
                    int threads) {
  const auto [B, N, D] = shape;
  ETUDE_CALL(adaln_backward)({B, N, D, rows(dout), rows(dy), rows(x), rows(h), rows(gate),
                            rows(scale), rows(bias), floats(mean), floats(rstd), rows(dx),
                            rows(dh), rows(dgate), rows(dshift), rows(dscale), rows(dbias),
                            floats(partial), rms, threads});
}

const Binding adaln([](py::module_& m) {
  m.attr("ROWS_PER_CHUNK") = kRowsPerChunk;
  m.def("adaln_forward", &adaln_forward, release());
  m.def("adaln_backward", &adaln_backward, release());
});

}  // namespace
}  // namespace etude
