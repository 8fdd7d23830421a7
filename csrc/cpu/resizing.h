// Arguments of the resizing kernels (resizing.cpp); filled in by resizing_bindings.cpp.
#pragma once
#include "common.h"

namespace etude {

// One axis of a resampling: output i reads `bounds[2i+1]` inputs from `bounds[2i]` on.
struct ResizeTable {
  const int32_t* bounds;  // (out, 2)
  const int32_t* taps;    // (out, ksize), fixed point with 22 fractional bits
  int64_t ksize;
};

// One axis of TensorFlow 1's bilinear rule: low + (high - low) * share.
struct ResizeLerp {
  const int32_t* low;  // (out)
  const int32_t* high;
  const float* share;
};

struct ResizePicture {
  const uint8_t* data;
  int64_t H, W, row, column, channel;  // size and strides
  int64_t across, down;                // numbers of the tables of the two axes
  bool columns_first;                  // Pillow resamples along the height first
};

enum ResizeOutput : int { kBytes = 0, kFloats = 1, kHalves = 2 };  // uint8, float32, bfloat16

struct Resize {
  int64_t B, H, W, C;  // of the output
  const ResizePicture* pictures;
  const ResizeTable* tables;  // of Pillow's filters, or
  const ResizeLerp* lerps;    // of TensorFlow's; the other one is null
  void* out;
  int kind;      // a ResizeOutput
  bool planar;   // output memory is (B, C, H, W), else (B, H, W, C)
  const float* scale;   // (C): float outputs are value * scale + offset
  const float* offset;  // (C)
  int threads;
};

ETUDE_DECLARE(void resize(const Resize& a);)

}  // namespace etude
