// From tensors of any strides and dtype to the panels that the microkernel reads: float, zeros up to whole panels,
// so that no other code knows tails, strides or half precision. Nothing outside a tensor is ever read.
#pragma once

#include "vectors.h"

namespace sightline {
namespace {

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The square in[i][j] becomes out[j * out_row + i].
static void transpose(const V (&in)[kLanes], float* out, int64_t out_row) {
#if defined(__AVX512F__)
  // Pairs of rows, then pairs of pairs, within 128-bit lanes; then the lanes change places.
  V a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(in[i], in[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    V even_low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), odd_low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    V even_high = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    V odd_high = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    store(out + j * out_row, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    store(out + (j + 4) * out_row, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    store(out + (j + 8) * out_row, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    store(out + (j + 12) * out_row, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
#else
  float square[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(square[i], in[i]);
  for (int j = 0; j < kLanes; ++j)
    for (int i = 0; i < kLanes; ++i) out[j * out_row + i] = square[i][j];
#endif
}

// rows x columns of `from` as out[column * out_row + row], rows padded with zeros to `padded`, a multiple of kLanes.
template <typename T>
static void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t columns, float* out, int64_t out_row,
                            int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      int wide = (int)least(kLanes, columns - j);
      V square[kLanes];
      for (int k = 0; k < kLanes; ++k) {
        if (i + k >= rows) square[k] = zero();
        else if (wide == kLanes) square[k] = load(from + (i + k) * stride + j);
        else square[k] = load_some(from + (i + k) * stride + j, wide);
      }
      if (wide == kLanes) {
        transpose(square, out + j * out_row + i, out_row);
      } else {
        float whole[kLanes * kLanes];
        transpose(square, whole, kLanes);
        for (int k = 0; k < wide; ++k) store(out + (j + k) * out_row + i, load(whole + k * kLanes));
      }
    }
}

// rows x columns of `from` as panels: out[(column / kPanel) * panel_floats + row * kPanel + column % kPanel].
template <typename T>
static void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, float* out, int64_t panel_floats) {
  for (int64_t j = 0; j < columns; j += kPanel, out += panel_floats)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < kPanel; k += kLanes) {
        int wide = (int)least(kLanes, columns - j - k);
        const T* row = from + i * stride + j + k;
        store(out + i * kPanel + k, wide == kLanes ? load(row) : wide > 0 ? load_some(row, wide) : zero());
      }
}

// A function object called with a pointer of the tensor's own type.
template <typename Work>
INLINE void by_dtype(Dtype dtype, const void* data, const Work& work) {
  if (dtype == Dtype::float32) work((const float*)data);
  else if (dtype == Dtype::bfloat16) work((const bfloat16*)data);
  else work((const float16*)data);
}

template <typename T>
INLINE T* writable(const T* data) {
  return const_cast<T*>(data);
}

INLINE int64_t key_floats(const Call& call) { return kTile * call.width; }  // of one packed tile
INLINE int64_t value_floats(const Call& call) { return kTile * round_up(call.value_width, kPanel); }

// The keys of a tile as panels of kPanel keys, (panel, width, key).
static void pack_keys(const Call& call, int64_t batch, int64_t group, int64_t tile, float* out) {
  const Strided& key = call.key;
  int64_t first = tile * kTile, keys = least(kTile, call.keys - first);
  by_dtype(call.dtype, key.data, [&](auto* data) {
    data += batch * key.batch + group * key.head;
    for (int64_t k = 0; k < keys; k += kPanel)
      pack_transposed(data + (first + k) * key.row, key.row, least(kPanel, keys - k), call.width,
                      out + k * call.width, kPanel, kPanel);
  });
}

// The values of a tile as panels of kPanel columns, (panel, key, column).
static void pack_values(const Call& call, int64_t batch, int64_t group, int64_t tile, float* out) {
  const Strided& value = call.value;
  int64_t first = tile * kTile, keys = least(kTile, call.keys - first);
  by_dtype(call.dtype, value.data, [&](auto* data) {
    data += batch * value.batch + group * value.head + first * value.row;
    pack_rows(data, value.row, keys, call.value_width, out, kTile * kPanel);
  });
}

}  // namespace
}  // namespace sightline
