// The Python face of knn.cpp. Called by kernels/knn.py alone, which makes the blocks of inner
// products and allocates the outputs.
#include "knn.h"

#include "bindings.h"

namespace etude {
namespace {

// (rows, columns, width), addresses of gram, row and column norms, x and y, and the error's bounds.
using Block = std::tuple<std::tuple<int64_t, int64_t, int64_t>,
                         std::tuple<Address, Address, Address, Address, Address>, double, double>;

GramBlock block(const Block& b, int threads) {
  const auto [rows, columns, width] = std::get<0>(b);
  const auto [gram, row_norms, column_norms, x, y] = std::get<1>(b);
  return {rows, columns, floats(gram), floats(row_norms), floats(column_norms),
          static_cast<float>(std::get<2>(b)), static_cast<float>(std::get<3>(b)),
          floats(x), floats(y), width, threads};
}

int64_t* whole(Address address) { return reinterpret_cast<int64_t*>(address); }

Address open_lists(int64_t rows, int64_t k) {
  return reinterpret_cast<Address>(ETUDE_CALL(open_lists)(rows, k));
}

void nearest_scan(const Block& b, Address lists, int64_t k, int64_t first_column, int64_t self,
                  int threads) {
  ETUDE_CALL(nearest_scan)({block(b, threads), reinterpret_cast<void*>(lists), k, first_column,
                          self});
}

void nearest_finish(Address lists, int64_t rows, int64_t k, int64_t width, Address x, Address y,
                    Address distance, Address index, int threads) {
  ETUDE_CALL(nearest_finish)({reinterpret_cast<void*>(lists), rows, k, width, floats(x), floats(y),
                            floats(distance), whole(index), threads});
}

void count_scan(const Block& b, Address radii, Address inside, Address outside, Address per_row,
                Address per_column, int threads) {
  ETUDE_CALL(count_scan)({block(b, threads), floats(radii), floats(inside), floats(outside),
                        whole(per_row), whole(per_column)});
}

int64_t pair_scan(const Block& b, Address row_reach, Address column_reach, int64_t capacity,
                  Address row, Address column, Address distance, Address whose, int threads) {
  return ETUDE_CALL(pair_scan)({block(b, threads), floats(row_reach), floats(column_reach),
                              capacity, whole(row), whole(column), floats(distance),
                              reinterpret_cast<uint8_t*>(whose)});
}

const Binding knn([](py::module_& m) {
  m.def("open_lists", &open_lists, release());
  m.def("nearest_scan", &nearest_scan, release());
  m.def("nearest_finish", &nearest_finish, release());
  m.def("count_scan", &count_scan, release());
  m.def("pair_scan", &pair_scan, release());
});

}  // namespace
}  // namespace etude
