// Pillow's 8-bit resampling, bit for bit, and TensorFlow 1's bilinear rule. The mathematics is in
// kernels/resizing.py, which is also the only caller.
//
// Pillow resamples rows first and rounds to bytes, then columns. The second pass is easy to
// vectorise: neighbouring bytes of a row have the same taps. In the first one they do not, so
// sixteen rows are transposed into a tile whose sixteen lanes are rows: a tap is then one number for
// all lanes, and no gather is needed whatever the scale. A byte is moved twice by 16 x 16 transposes
// (a quarter of an instruction each), and may change between planar and interleaved on the way.
//
// Sums are of 32-bit integers and exact; float arithmetic is compiled without contraction
// (setup.py): every level and every number of threads gives the bits of the reference.
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "resizing.h"

namespace etude {
namespace ETUDE_LEVEL {
namespace {

constexpr int kBits = 22;       // fractional bits of a tap
constexpr int32_t kHalf = 1 << (kBits - 1);
constexpr int64_t kRows = 16;   // lanes of a tile
constexpr int64_t kBlock = 64;  // bytes of a row that one step of the second pass makes

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Sixteen 32-bit sums of byte * tap. Compilers widen bytes badly, hence the intrinsics; a product
// of 9 and 24 bits needs the full 32-bit multiplication, which SSE2 lacks: there the tap is split
// into 11 low bits and the rest, and each half multiplied as 16-bit numbers.
struct Sums {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  __m512i sum;
  void start() { sum = _mm512_set1_epi32(kHalf); }
  void add(const uint8_t* from, int32_t tap) {
    const __m512i x =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(x, _mm512_set1_epi32(tap)));
  }
  void store(uint8_t* to) const {
    const __m512i value = _mm512_max_epi32(_mm512_srai_epi32(sum, kBits), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(value));
  }
#elif defined(__AVX2__)
  __m256i sum[2];
  void start() { sum[0] = sum[1] = _mm256_set1_epi32(kHalf); }
  void add(const uint8_t* from, int32_t tap) {
    const __m256i weight = _mm256_set1_epi32(tap);
    for (int i = 0; i < 2; ++i) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
      const __m256i x = _mm256_cvtepu8_epi32(bytes);
      sum[i] = _mm256_add_epi32(sum[i], _mm256_mullo_epi32(x, weight));
    }
  }
  void store(uint8_t* to) const {
    const __m256i low = _mm256_srai_epi32(sum[0], kBits), high = _mm256_srai_epi32(sum[1], kBits);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi16(_mm256_castsi256_si128(both),
                                      _mm256_extracti128_si256(both, 1)));
  }
#elif defined(__SSE2__)
  __m128i sum[4];
  void start() {
    for (int i = 0; i < 4; ++i) sum[i] = _mm_set1_epi32(kHalf);
  }
  void add(const uint8_t* from, int32_t tap) {
    const __m128i zero = _mm_setzero_si128();
    const __m128i low = _mm_set1_epi32(tap & 0x7ff), high = _mm_set1_epi32((tap >> 11) & 0xffff);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i half[2] = {_mm_unpacklo_epi8(bytes, zero), _mm_unpackhi_epi8(bytes, zero)};
    for (int i = 0; i < 4; ++i) {
      const __m128i x = i % 2 ? _mm_unpackhi_epi16(half[i / 2], zero)
                              : _mm_unpacklo_epi16(half[i / 2], zero);
      const __m128i upper = _mm_slli_epi32(_mm_madd_epi16(x, high), 11);
      sum[i] = _mm_add_epi32(sum[i], _mm_add_epi32(_mm_madd_epi16(x, low), upper));
    }
  }
  void store(uint8_t* to) const {
    __m128i value[4];
    for (int i = 0; i < 4; ++i) value[i] = _mm_srai_epi32(sum[i], kBits);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi16(_mm_packs_epi32(value[0], value[1]),
                                      _mm_packs_epi32(value[2], value[3])));
  }
#else
  int32_t sum[16];
  void start() {
    for (int i = 0; i < 16; ++i) sum[i] = kHalf;
  }
  void add(const uint8_t* from, int32_t tap) {
    for (int i = 0; i < 16; ++i) sum[i] += from[i] * tap;
  }
  void store(uint8_t* to) const {
    for (int i = 0; i < 16; ++i) {
      const int32_t value = sum[i] >> kBits;
      to[i] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
    }
  }
#endif
};

// 16 rows of 16 bytes, `from_stride` apart, to their transpose, `to_stride` apart.
inline void transpose16(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
#if defined(__SSE2__)
  __m128i a[16], b[16];
  for (int i = 0; i < 16; ++i)
    a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
  // Four perfect shuffles of rows i and i + 8 make a transpose.
  for (int step = 0; step < 2; ++step) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
      a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
    }
  }
  for (int i = 0; i < 16; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), a[i]);
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

// `count` (at most 16) rows of `length` bytes to tile[length][16]; the last row fills what is left.
void pack(const uint8_t* from, int64_t stride, int64_t count, int64_t length, uint8_t* tile) {
  int64_t done = 0;
  if (count == kRows)
    for (; done + 16 <= length; done += 16)
      transpose16(from + done, stride, tile + done * kRows, kRows);
  for (int64_t i = 0; i < kRows; ++i) {
    const uint8_t* const row = from + least(i, count - 1) * stride;
    for (int64_t j = done; j < length; ++j) tile[j * kRows + i] = row[j];
  }
}

struct Scratch {
  uint8_t* tile;      // transposed rows
  uint8_t* resized;   // the same, resampled along the width
  uint8_t* middle;    // rows after the first pass
  uint8_t* bytes;     // one row after the second pass, or rows of a picture gathered
  float* lines[2];    // two rows after TensorFlow's first pass
  float* scale;       // scale and offset for each element of a row
  float* offset;
};

// Rows [first, last) of a picture resampled along the width, to rows of a.W * a.C bytes in the
// output's order of columns and channels, `line` bytes apart; rows up to a multiple of 16 are filled.
void across(const Resize& a, const ResizePicture& p, int64_t first, int64_t last, uint8_t* rows,
            int64_t line, const Scratch& s) {
  const ResizeTable& t = a.tables[p.across];
  const int64_t left = t.bounds[0];
  const int64_t right = t.bounds[2 * (a.W - 1)] + t.bounds[2 * (a.W - 1) + 1];
  const int64_t width = right - left, length = a.W * a.C;
  const bool interleaved = p.column == a.C && p.channel == 1;
  // Where column w and channel c lie in the tile, and where x and c lie in a row of the output.
  const int64_t step = interleaved ? a.C : 1, plane = interleaved ? 1 : width;
  const int64_t to_x = a.planar ? 1 : a.C, to_c = a.planar ? a.W : 1;
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t count = least(kRows, p.H - row);
    const uint8_t* const from = p.data + row * p.row + left * p.column;
    if (interleaved) {
      pack(from, p.row, count, width * a.C, s.tile);
    } else if (p.column == 1) {
      for (int64_t c = 0; c < a.C; ++c)
        pack(from + c * p.channel, p.row, count, width, s.tile + c * width * kRows);
    } else {
      for (int64_t c = 0; c < a.C; ++c)
        for (int64_t w = 0; w < width; ++w)
          for (int64_t i = 0; i < kRows; ++i)
            s.tile[(c * width + w) * kRows + i] =
                from[least(i, count - 1) * p.row + w * p.column + c * p.channel];
    }
    for (int64_t x = 0; x < a.W; ++x) {
      const int64_t count_taps = t.bounds[2 * x + 1];
      const int32_t* const taps = t.taps + x * t.ksize;
      for (int64_t c = 0; c < a.C; ++c) {
        const uint8_t* at = s.tile + ((t.bounds[2 * x] - left) * step + c * plane) * kRows;
        Sums sums;
        sums.start();
        for (int64_t k = 0; k < count_taps; ++k) sums.add(at + k * step * kRows, taps[k]);
        sums.store(s.resized + (x * to_x + c * to_c) * kRows);
      }
    }
    for (int64_t i = 0; i < length; i += 16)
      transpose16(s.resized + i * kRows, kRows, rows + (row - first) * line + i, line);
  }
}

// One row of `length` bytes (up to a multiple of 64 is written) from `count` rows `line` apart.
void down(const uint8_t* from, int64_t line, const int32_t* taps, int64_t count, int64_t length,
          uint8_t* to) {
  for (int64_t i = 0; i < length; i += kBlock) {
    Sums sums[4];
    for (int j = 0; j < 4; ++j) sums[j].start();
    for (int64_t k = 0; k < count; ++k)
      for (int j = 0; j < 4; ++j) sums[j].add(from + k * line + i + 16 * j, taps[k]);
    for (int j = 0; j < 4; ++j) sums[j].store(to + i + 16 * j);
  }
}

// One row of values, bytes or float32, to row y of output picture b, normalised if it is of floats.
template <class Value>
void put(const Resize& a, const Value* row, int64_t b, int64_t y, const Scratch& s) {
  const int64_t runs = a.planar ? a.C : 1, length = a.planar ? a.W : a.W * a.C;
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t at = ((b * runs + r) * a.H + y) * length;
    const Value* const from = row + r * length;
    const float* const scale = s.scale + r * length;
    const float* const offset = s.offset + r * length;
    if (a.kind == kFloats) {
      float* const to = static_cast<float*>(a.out) + at;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) to[i] = from[i] * scale[i] + offset[i];
    } else if (a.kind == kHalves) {
      uint16_t* const to = static_cast<uint16_t*>(a.out) + at;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) to[i] = to_bf16(from[i] * scale[i] + offset[i]);
    } else {
      memcpy(static_cast<uint8_t*>(a.out) + at, from, length);
    }
  }
}

int64_t line_of(int64_t elements) { return up(elements + kBlock, kBlock); }

// Output rows [top, bottom) of picture b by Pillow's rule, along the width first.
void pillow_rows(const Resize& a, int64_t b, int64_t top, int64_t bottom, const Scratch& s) {
  const ResizePicture& p = a.pictures[b];
  const ResizeTable& t = a.tables[p.down];
  const int64_t first = t.bounds[2 * top];
  const int64_t last = t.bounds[2 * (bottom - 1)] + t.bounds[2 * (bottom - 1) + 1];
  const int64_t length = a.W * a.C, line = line_of(length);
  across(a, p, first, last, s.middle, line, s);
  for (int64_t y = top; y < bottom; ++y) {
    down(s.middle + (t.bounds[2 * y] - first) * line, line, t.taps + y * t.ksize,
         t.bounds[2 * y + 1], length, s.bytes);
    put(a, s.bytes, b, y, s);
  }
}

// The same along the height first; rare, so its rows are simply gathered before.
void pillow_columns(const Resize& a, int64_t b, int64_t top, int64_t bottom, const Scratch& s) {
  const ResizePicture& p = a.pictures[b];
  const ResizeTable& t = a.tables[p.down];
  const int64_t first = t.bounds[2 * top];
  const int64_t last = t.bounds[2 * (bottom - 1)] + t.bounds[2 * (bottom - 1) + 1];
  const int64_t length = p.W * a.C, line = line_of(length);
  for (int64_t h = first; h < last; ++h)
    for (int64_t w = 0; w < p.W; ++w)
      for (int64_t c = 0; c < a.C; ++c)
        s.bytes[(h - first) * line + w * a.C + c] =
            p.data[h * p.row + w * p.column + c * p.channel];
  for (int64_t y = top; y < bottom; ++y)
    down(s.bytes + (t.bounds[2 * y] - first) * line, line, t.taps + y * t.ksize,
         t.bounds[2 * y + 1], length, s.middle + (y - top) * line);
  const ResizePicture q{s.middle, bottom - top, p.W, line, a.C, 1, p.across, p.down, false};
  const int64_t out_line = line_of(a.W * a.C);
  across(a, q, 0, bottom - top, s.bytes, out_line, s);
  for (int64_t y = top; y < bottom; ++y) put(a, s.bytes + (y - top) * out_line, b, y, s);
}

// Input row h after TensorFlow's horizontal pass, in the output's order.
void lerp_row(const Resize& a, const ResizePicture& p, int64_t h, float* to) {
  const ResizeLerp& t = a.lerps[p.across];
  const int64_t to_x = a.planar ? 1 : a.C, to_c = a.planar ? a.W : 1;
  for (int64_t c = 0; c < a.C; ++c) {
    const uint8_t* const from = p.data + h * p.row + c * p.channel;
    for (int64_t x = 0; x < a.W; ++x) {
      const float low = from[t.low[x] * p.column], high = from[t.high[x] * p.column];
      to[x * to_x + c * to_c] = low + (high - low) * t.share[x];
    }
  }
}

// Output rows [top, bottom) of picture b by TensorFlow's rule.
void tensorflow_rows(const Resize& a, int64_t b, int64_t top, int64_t bottom, const Scratch& s) {
  const ResizePicture& p = a.pictures[b];
  const ResizeLerp& t = a.lerps[p.down];
  const int64_t length = a.W * a.C, line = line_of(length);
  float* const row = s.lines[1] + line;
  float* lines[2] = {s.lines[0], s.lines[1]};
  int64_t held[2] = {-1, -1};  // the input rows in them
  for (int64_t y = top; y < bottom; ++y) {
    if (t.low[y] == held[1]) {
      float* const swap = lines[0];
      lines[0] = lines[1], lines[1] = swap;
      held[1] = held[0], held[0] = t.low[y];
    }
    if (t.low[y] != held[0]) lerp_row(a, p, held[0] = t.low[y], lines[0]);
    if (t.high[y] != held[1]) lerp_row(a, p, held[1] = t.high[y], lines[1]);
    const float share = t.share[y];
    const float *const low = lines[0], *const high = lines[1];
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) row[i] = low[i] + (high[i] - low[i]) * share;
    put(a, row, b, y, s);
  }
}

}  // namespace

void resize(const Resize& a) {
  // Few pictures for many threads: each is cut into bands of output rows, which share only a few
  // rows of the first pass.
  const int64_t bands = least(a.H, a.B >= a.threads ? 1 : (a.threads + a.B - 1) / a.B);
  const int64_t band = (a.H + bands - 1) / bands;
  const int64_t line = line_of(a.W * a.C);
  int64_t longest = line, middle = line, bytes = line;
  for (int64_t b = 0; b < a.B; ++b) {
    const ResizePicture& p = a.pictures[b];
    const int64_t source = line_of(p.W * a.C);
    longest = most(longest, source);
    if (p.columns_first) {
      middle = most(middle, (band + kRows) * source);
      bytes = most(bytes, most(p.H * source, (band + kRows) * line));
    } else {
      middle = most(middle, (p.H + kRows) * line);
    }
  }
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && a.B * bands > 1)
  {
    // Whole vectors and tiles are read and written: lengths and numbers of rows are rounded up.
    Scratch s;
    s.tile = static_cast<uint8_t*>(malloc(longest * kRows));
    s.resized = static_cast<uint8_t*>(malloc(longest * kRows));
    s.middle = static_cast<uint8_t*>(malloc(middle));
    s.bytes = static_cast<uint8_t*>(malloc(bytes));
    float* const floats = static_cast<float*>(malloc(5 * line * sizeof(float)));
    s.lines[0] = floats, s.lines[1] = floats + line;
    s.scale = floats + 3 * line, s.offset = floats + 4 * line;
    for (int64_t i = 0; i < a.W * a.C; ++i) {
      const int64_t c = a.planar ? i / a.W : i % a.C;
      s.scale[i] = a.scale[c], s.offset[i] = a.offset[c];
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.B * bands; ++task) {
      const int64_t b = task / bands, top = task % bands * band, bottom = least(top + band, a.H);
      if (top >= bottom) continue;
      if (a.lerps)
        tensorflow_rows(a, b, top, bottom, s);
      else if (a.pictures[b].columns_first)
        pillow_columns(a, b, top, bottom, s);
      else
        pillow_rows(a, b, top, bottom, s);
    }
    free(s.tile), free(s.resized), free(s.middle), free(s.bytes), free(floats);
  }
}

}  // namespace ETUDE_LEVEL
}  // namespace etude
