// From tensors of any strides and dtype to the panels that the microkernel reads: float, zeros up to whole panels,
// so that no other code knows tails, strides or half precision. Nothing outside a tensor is ever read.
#pragma once

#include "vectors.h"

namespace sightline {
namespace {

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Steps of depth that n numbers take.
template <typename Number>
INLINE int64_t steps_of(int64_t n) {
  return (n + kDeep<Number> - 1) / kDeep<Number>;
}

// No memory at all may be cleared of no floats.
INLINE void clear(float* p, int64_t floats) {
  if (floats > 0) __builtin_memset(p, 0, sizeof(float) * (size_t)floats);
}

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
#elif defined(__AVX2__)
  V a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    store(out + j * out_row, _mm256_permute2f128_ps(b[j], b[4 + j], 0x20));
    store(out + (j + 4) * out_row, _mm256_permute2f128_ps(b[j], b[4 + j], 0x31));
  }
#else
  float square[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(square[i], in[i]);
  for (int j = 0; j < kLanes; ++j)
    for (int i = 0; i < kLanes; ++i) out[j * out_row + i] = square[i][j];
#endif
}

// rows x columns as out[column * out_row + row], times `scale`; rows padded with zeros to `padded`, a multiple of
// kLanes. row(i) points at the i-th row.
template <typename RowAt>
static void pack_transposed(const RowAt& row, int64_t rows, int64_t columns, float scale, float* out, int64_t out_row,
                            int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      int wide = (int)least(kLanes, columns - j);
      V square[kLanes];
      for (int k = 0; k < kLanes; ++k) {
        if (i + k >= rows) square[k] = zero();
        else if (wide == kLanes) square[k] = mul(load(row(i + k) + j), splat(scale));
        else square[k] = mul(load_some(row(i + k) + j, wide), splat(scale));
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

// rows x columns of `from`, times `scale`, as panels:
// out[(column / kPanel) * panel_floats + row * kPanel + column % kPanel].
template <typename T>
static void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, float scale, float* out,
                      int64_t panel_floats) {
  for (int64_t j = 0; j < columns; j += kPanel, out += panel_floats)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < kPanel; k += kLanes) {
        int wide = (int)least(kLanes, columns - j - k);
        const T* row = from + i * stride + j + k;
        V x = wide == kLanes ? load(row) : wide > 0 ? load_some(row, wide) : zero();
        store(out + i * kPanel + k, mul(x, splat(scale)));
      }
}

template <int n>
struct Constant {
  static constexpr int value = n;
};

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

INLINE int64_t key_floats(const Call& call) { return kTile * round_up(call.width, 2); }  // of one packed tile
INLINE int64_t value_floats(const Call& call) { return kTile * round_up(call.value_width, kPanel); }

// Rows [first, first + rows) of one head as panels of `panel` rows, (panel, column, row).
static void pack_as_columns(Dtype dtype, const Strided& from, int64_t batch, int64_t head, int64_t first, int64_t rows,
                            int64_t columns, float scale, float* out, int64_t panel) {
  by_dtype(dtype, from.data, [&](auto* data) {
    data += batch * from.batch + head * from.head + first * from.row;
    for (int64_t k = 0; k < rows; k += panel)
      pack_transposed([&](int64_t i) { return data + (k + i) * from.row; }, least(panel, rows - k), columns, scale,
                      out + k * columns, panel, panel);
  });
}

// Rows [first, first + rows) of one head as panels of kPanel columns, (panel, row, column).
static void pack_as_rows(Dtype dtype, const Strided& from, int64_t batch, int64_t head, int64_t first, int64_t rows,
                         int64_t columns, float scale, float* out, int64_t panel_floats) {
  by_dtype(dtype, from.data, [&](auto* data) {
    data += batch * from.batch + head * from.head + first * from.row;
    pack_rows(data, from.row, rows, columns, scale, out, panel_floats);
  });
}

#if defined(SIGHTLINE_DOT)
constexpr bool kDot = true;

// rows x width of bf16 as pairs along the width, out[width / 2 * out_row + row]: the transposition of pack_transposed,
// whose numbers are pairs here.
template <typename RowAt>
static void pack_pairs_transposed(const RowAt& row, int64_t rows, int64_t width, Pair* out, int64_t out_row,
                                  int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int64_t j = 0; j < width; j += 2 * kLanes) {
      V square[kLanes];
      for (int k = 0; k < kLanes; ++k) square[k] = i + k < rows ? load_pairs(row(i + k) + j, width - j) : zero();
      if (width - j >= 2 * kLanes) {
        transpose(square, (float*)out + j / 2 * out_row + i, out_row);
        continue;
      }
      float whole[kLanes * kLanes];
      transpose(square, whole, kLanes);
      for (int64_t k = 0; k < least(kLanes, (width - j + 1) / 2); ++k)
        store((float*)out + (j / 2 + k) * out_row + i, load(whole + k * kLanes));
    }
}

// As for floats, of bf16 in pairs along the columns, not scaled.
static void pack_as_columns(Dtype, const Strided& from, int64_t batch, int64_t head, int64_t first, int64_t rows,
                            int64_t columns, float, Pair* out, int64_t panel) {
  const bfloat16* data = (const bfloat16*)from.data + batch * from.batch + head * from.head + first * from.row;
  for (int64_t k = 0; k < rows; k += panel)
    pack_pairs_transposed([&](int64_t i) { return data + (k + i) * from.row; }, least(panel, rows - k), columns,
                          out + k * steps_of<Pair>(columns), panel, panel);
}

// As for floats, of bf16 in pairs along the rows, not scaled; columns up to whole vectors.
static void pack_as_rows(Dtype, const Strided& from, int64_t batch, int64_t head, int64_t first, int64_t rows,
                         int64_t columns, float, Pair* out, int64_t panel_pairs) {
  const bfloat16* data = (const bfloat16*)from.data + batch * from.batch + head * from.head + first * from.row;
  for (int64_t j = 0; j < columns; j += kLanes)
    for (int64_t i = 0; i < rows; i += 2) {
      const bfloat16* row = data + i * from.row + j;
      Pair* to = out + j / kPanel * panel_pairs + i / 2 * kPanel + j % kPanel;
      store_zipped(to, row, i + 1 < rows ? row + from.row : nullptr, columns - j);
    }
}
#else
constexpr bool kDot = false;
#endif

INLINE bool in_pairs(const Call& call) { return kDot && call.dtype == Dtype::bfloat16; }

// A function object called with a number of the kind that is multiplied.
template <typename Work>
INLINE void by_number(const Call& call, const Work& work) {
#if defined(SIGHTLINE_DOT)
  if (in_pairs(call)) return work(Pair{});
#endif
  (void)call;
  work(0.0f);
}

// How many of the keys [first, first + count) there are to be packed. A pair may reach one key beyond those that are
// seen: beyond the length there may be anything.
INLINE int64_t packed_keys(const Call& call, int64_t batch, int64_t first, int64_t count) {
  count = least(count, call.keys - first);
  return in_pairs(call) && call.lengths ? most(0, least(count, call.lengths[batch] - first)) : count;
}

// A tile of the forward: keys as panels of keys, values as panels of columns.
template <typename Number>
static void pack_tile_as(const Call& call, int64_t batch, int64_t group, int64_t tile, Number* keys, Number* values) {
  int64_t first = tile * kTile, count = packed_keys(call, batch, first, kTile);
  pack_as_columns(call.dtype, call.key, batch, group, first, count, call.width, 1.0f, keys, kPanel);
  pack_as_rows(call.dtype, call.value, batch, group, first, count, call.value_width, 1.0f, values,
               kTile / kDeep<Number> * kPanel);
}

static void pack_tile(const Call& call, int64_t batch, int64_t group, int64_t tile, float* keys, float* values) {
  by_number(call, [&](auto number) {
    pack_tile_as(call, batch, group, tile, (decltype(number)*)keys, (decltype(number)*)values);
  });
}

}  // namespace
}  // namespace sightline
