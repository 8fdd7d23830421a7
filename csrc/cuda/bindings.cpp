// The module etude.kernels._cuda: raw addresses, dtypes, strides, device and stream; no torch
// header. kernels/<family>_cuda.py are the only callers: they check shapes and allocate outputs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "adaln.h"
#include "knn.h"
#include "optimizer.h"
#include "resizing.h"
#include "statistics.h"

namespace py = pybind11;

namespace etude {
namespace {

using Address = uintptr_t;
using Tensor = std::tuple<Address, int, int64_t, int64_t>;  // address, dtype, batch and row stride
using Number = std::tuple<Address, int, double>;            // address or 0, dtype, value
using Shape = std::tuple<int64_t, int64_t, int64_t>;
using Where = std::tuple<int, Address>;  // device and stream

Rows rows(const Tensor& t) {
  return {reinterpret_cast<void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

Scalar scalar(const Number& n) {
  return {reinterpret_cast<const void*>(std::get<0>(n)), std::get<1>(n), std::get<2>(n)};
}

Place place(const Where& where) {
  return {std::get<0>(where), reinterpret_cast<void*>(std::get<1>(where))};
}

float* floats(Address address) { return reinterpret_cast<float*>(address); }

// t: x, h, gate, shift, scale, bias, out, y; memory: mean, rstd.
void forward(const Shape& shape, const std::vector<Tensor>& t, const std::vector<Address>& memory,
             double eps, bool rms, int64_t rows_per_block, const Where& where) {
  const auto [B, N, D] = shape;
  adaln_forward({B, N, D, rows(t.at(0)), rows(t.at(1)), rows(t.at(2)), rows(t.at(3)),
                 rows(t.at(4)), rows(t.at(5)), rows(t.at(6)), rows(t.at(7)), floats(memory.at(0)),
                 floats(memory.at(1)), static_cast<float>(eps), rms, rows_per_block},
                place(where));
}

// t: dout, dy, x, h, gate, scale, bias, dx, dh, dgate, dshift, dscale, dbias; memory: mean, rstd,
// partial.
void backward(const Shape& shape, const std::vector<Tensor>& t, const std::vector<Address>& memory,
              bool rms, int64_t rows_per_block, const Where& where) {
  const auto [B, N, D] = shape;
  adaln_backward({B, N, D, rows(t.at(0)), rows(t.at(1)), rows(t.at(2)), rows(t.at(3)),
                  rows(t.at(4)), rows(t.at(5)), rows(t.at(6)), floats(memory.at(0)),
                  floats(memory.at(1)), rows(t.at(7)), rows(t.at(8)), rows(t.at(9)),
                  rows(t.at(10)), rows(t.at(11)), rows(t.at(12)), floats(memory.at(2)), rms,
                  rows_per_block},
                 place(where));
}

// tensors: (param, grad, exp_avg, exp_avg_sq, copy or 0, step), emas, numel, dtypes of grad and
// copy.
using AdamwRow = std::tuple<std::vector<Address>, std::vector<Address>, int64_t, int, int>;

// numbers: lr, grad_scale, found_inf, then a decay per profile.
void adamw(const std::vector<AdamwRow>& tensors, const std::vector<Number>& numbers, double beta1,
           double beta2, double eps, double weight_decay, Address workspace, const Where& where) {
  std::vector<AdamwTensor> list;
  std::vector<int> grad_dtypes, copy_dtypes;
  for (const auto& [addresses, emas, numel, grad_dtype, copy_dtype] : tensors) {
    AdamwTensor one = {};
    one.param = floats(addresses.at(0));
    one.grad = reinterpret_cast<const void*>(addresses.at(1));
    one.exp_avg = floats(addresses.at(2));
    one.exp_avg_sq = floats(addresses.at(3));
    one.copy = reinterpret_cast<void*>(addresses.at(4));
    one.step = floats(addresses.at(5));
    for (size_t k = 0; k < emas.size() && k < kProfiles; ++k) one.emas[k] = floats(emas[k]);
    one.numel = numel;
    list.push_back(one);
    grad_dtypes.push_back(grad_dtype);
    copy_dtypes.push_back(copy_dtype);
  }
  Adamw a = {};
  a.tensors = list.data();
  a.grad_dtypes = grad_dtypes.data();
  a.copy_dtypes = copy_dtypes.data();
  a.count = static_cast<int64_t>(list.size());
  a.profiles = static_cast<int>(numbers.size()) - 3;
  if (a.profiles > kProfiles) throw std::invalid_argument("adamw_ema: too many averages");
  a.beta1 = beta1, a.beta2 = beta2, a.eps = eps, a.weight_decay = weight_decay;
  a.lr = scalar(numbers.at(0));
  a.grad_scale = scalar(numbers.at(1));
  a.found_inf = scalar(numbers.at(2));
  for (int k = 0; k < a.profiles; ++k) a.decays[k] = scalar(numbers[3 + k]);
  a.workspace = reinterpret_cast<double*>(workspace);
  adamw_ema(a, place(where));
}

// Addresses of x, out, scale and offset; strides of x; output sizes; dtype, planar, vectors.
using Pictures = std::tuple<std::vector<Address>, std::vector<int64_t>,
                            std::tuple<int64_t, int, int, int>, int, bool, bool>;
using AxisRow = std::tuple<Address, Address, int>;      // bounds, weights, taps
using LerpRow = std::tuple<Address, Address, Address>;  // low, high, share

template <class T>
const T* constants(Address address) {
  return reinterpret_cast<const T*>(address);
}

Resize pictures(const Pictures& p) {
  const auto& [memory, strides, sizes, dtype, planar, vectors] = p;
  const auto [B, H, W, C] = sizes;
  return {constants<uint8_t>(memory.at(0)), strides.at(0), strides.at(1), strides.at(2),
          strides.at(3), reinterpret_cast<void*>(memory.at(1)), dtype, planar, vectors, B, H, W, C,
          constants<float>(memory.at(2)), constants<float>(memory.at(3))};
}

Axis axis(const AxisRow& row) {
  return {constants<int32_t>(std::get<0>(row)), constants<int32_t>(std::get<1>(row)),
          std::get<2>(row)};
}

Lerp lerp(const LerpRow& row) {
  return {constants<int32_t>(std::get<0>(row)), constants<int32_t>(std::get<1>(row)),
          constants<float>(std::get<2>(row))};
}

void both(const Pictures& p, const AxisRow& across, const AxisRow& down, int rows, int span,
          const Where& where) {
  resize_both(pictures(p), axis(across), axis(down), rows, span, place(where));
}

void one(const Pictures& p, const AxisRow& row, bool down, const Where& where) {
  resize_one(pictures(p), axis(row), down, place(where));
}

void tf1(const Pictures& p, const LerpRow& across, const LerpRow& down, const Where& where) {
  resize_tf1(pictures(p), lerp(across), lerp(down), place(where));
}

// memory: x, mean, parts, scatter.
void scatter(const std::tuple<int64_t, int64_t>& shape, const std::vector<Address>& memory,
             int dtype, int64_t stride, int64_t rows_per_block, const Where& where) {
  const auto [N, D] = shape;
  moments({N, D, constants<void>(memory.at(0)), dtype, stride, rows_per_block,
           constants<double>(memory.at(1)), reinterpret_cast<double*>(memory.at(2)),
           reinterpret_cast<double*>(memory.at(3))},
          place(where));
}

// memory: query, reference, centre, norms of both.
Sets sets(const Shape& shape, const std::vector<Address>& memory) {
  const auto [N, M, D] = shape;
  return {N, M, D, constants<float>(memory.at(0)), constants<float>(memory.at(1)),
          constants<double>(memory.at(2)), constants<double>(memory.at(3)),
          constants<double>(memory.at(4))};
}

// memory: the sets', radii, per_query, per_reference.
void counts(const Shape& shape, const std::vector<Address>& memory, const Where& where) {
  membership_counts({sets(shape, memory), constants<float>(memory.at(5)),
                     reinterpret_cast<uint8_t*>(memory.at(6)),
                     reinterpret_cast<uint8_t*>(memory.at(7))},
                    place(where));
}

// memory: the sets', keys, distance, index.
void nearest(const Shape& shape, const std::vector<Address>& memory, int k, bool own,
             int64_t columns, int64_t parts, const Where& where) {
  nearest_neighbours({sets(shape, memory), k, own, columns, parts,
                      reinterpret_cast<uint64_t*>(memory.at(5)), floats(memory.at(6)),
                      reinterpret_cast<int64_t*>(memory.at(7))},
                     place(where));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("CUDA_VERSION") = ETUDE_CUDA_VERSION;
  m.attr("FLOAT32") = static_cast<int>(kFloat32);
  m.attr("BFLOAT16") = static_cast<int>(kBFloat16);
  m.attr("FLOAT16") = static_cast<int>(kFloat16);
  m.attr("FLOAT64") = static_cast<int>(kFloat64);
  m.attr("MAX_WIDTH") = kMaxWidth;
  m.attr("PROFILES") = kProfiles;
  m.attr("SCALARS") = kAdamwScalars;
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("adaln_forward", &forward, release);
  m.def("adaln_backward", &backward, release);
  m.def("adamw_ema", &adamw, release);
  m.def("resize_both", &both, release);
  m.def("resize_one", &one, release);
  m.def("resize_tf1", &tf1, release);
  m.def("moments", &scatter, release);
  m.def("membership_counts", &counts, release);
  m.def("nearest_neighbours", &nearest, release);
}

}  // namespace etude
