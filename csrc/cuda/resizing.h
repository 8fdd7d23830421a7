// Arguments of the resizing kernels (resizing.cu); filled in by bindings.cpp from
// kernels/resizing_cuda.py.
#pragma once
#include "common.h"

namespace etude {

constexpr int kBytes = -1;          // the dtype of uint8 outputs; the others are DType
constexpr int kResizeLanes = 128;   // neighbouring elements of a row that a block makes
constexpr int kResizeShared = 48 * 1024;  // bytes between the passes of one block, at most

// Pictures x of any strides to B x H x W x C outputs, dense in that order or, where `planar`, with
// the channels before the height. `vectors`: four neighbouring outputs are aligned to their size.
struct Resize {
  const uint8_t* x;
  int64_t x_b, x_h, x_w, x_c;
  void* out;
  int dtype;
  bool planar, vectors;
  int64_t B;
  int H, W, C;
  const float* scale;  // per channel; not read for bytes
  const float* offset;
};

// One axis by Pillow's rule: per output the first input and how many, and their weights. Along the
// width the weights lie by tap, (taps, W), along the height by output, (H, taps): what neighbouring
// threads or successive taps read are neighbours.
struct Axis {
  const int32_t* bounds;
  const int32_t* weights;
  int taps;
};

// One axis by TensorFlow 1's rule.
struct Lerp {
  const int32_t* low;
  const int32_t* high;
  const float* share;
};

// Width, then height, in one launch; a block makes `rows` rows from at most `span` of the input.
void resize_both(const Resize& a, const Axis& across, const Axis& down, int rows, int span,
                 const Place& place);
void resize_one(const Resize& a, const Axis& axis, bool down, const Place& place);
void resize_tf1(const Resize& a, const Lerp& across, const Lerp& down, const Place& place);

}  // namespace etude
