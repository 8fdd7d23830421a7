// The Python face of resizing.cpp. Called by kernels/resizing.py alone, which checks shapes, makes
// the tables and allocates the output.
#include "resizing.h"

#include <array>
#include <vector>

#include "bindings.h"

namespace etude {
namespace {

using Addresses = std::vector<std::tuple<Address, Address, Address>>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// pictures: (address, H, W, row, column and channel stride, table across, table down, whether
// columns come first) per picture.
// axes: Pillow's (bounds, taps, ksize as a number), or TensorFlow's (low, high, share).
void resize(const std::vector<std::array<int64_t, 9>>& pictures, const Addresses& axes,
            bool tensorflow, std::tuple<int64_t, int64_t, int64_t, int64_t> shape, Address out,
            int kind, bool planar, Address scale, Address offset, int threads) {
  std::vector<ResizePicture> items;
  for (const auto& p : pictures)
    items.push_back({at<const uint8_t>(p[0]), p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8] != 0});
  std::vector<ResizeTable> tables;
  std::vector<ResizeLerp> lerps;
  for (const auto& [first, second, third] : axes) {
    if (tensorflow)
      lerps.push_back({at<const int32_t>(first), at<const int32_t>(second), at<const float>(third)});
    else
      tables.push_back({at<const int32_t>(first), at<const int32_t>(second),
                        static_cast<int64_t>(third)});
  }
  const auto [B, H, W, C] = shape;
  ETUDE_CALL(resize)({B, H, W, C, items.data(), tensorflow ? nullptr : tables.data(),
                    tensorflow ? lerps.data() : nullptr, at<void>(out), kind, planar,
                    floats(scale), floats(offset), threads});
}

const Binding resizing([](py::module_& m) { m.def("resize", &resize, release()); });

}  // namespace
}  // namespace etude
