// How fields of pixels are handed over; shared by the noising and the solver kernels.
#pragma once
#include "common.h"

namespace etude {

// A (B, C, ...) tensor whose pixels are evenly spaced: strides in elements. NCHW, NHWC and views of
// them by chunk() all fit. An absent one has data == nullptr.
struct Latents {
  void* data;
  int dtype;
  int64_t batch_stride, channel_stride, pixel_stride;
};

}  // namespace etude
