// Few rows, as when one token is decoded: packing a tile would cost more than using it, so keys and values are read
// where they lie, once, and become float on the way. A row's sums do not depend on the rows beside it.
#pragma once

#include "packing.h"

namespace sightline {
namespace {

constexpr int kTogether = 4;            // rows that share what is read
constexpr int64_t kDirectRows = 8;      // more are worth packing
constexpr int64_t kDirectDepth = 8;    // keys whose values stay in L1 while the columns pass
constexpr int64_t kKeysAhead = 12;      // fetched early: rows are short runs of memory, which no prefetcher follows

// Known from the call alone: how a row is summed must not depend on how the work is cut. Columns come in whole vectors.
static bool reads_directly(const Call& call) {
  return call.heads / call.groups * call.queries <= least(kRows, kDirectRows) && call.width % kLanes == 0 &&
         call.value_width % kLanes == 0;
}

template <typename T>
INLINE void fetch_rows(const T* from, int64_t row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += (int64_t)(64 / sizeof(T))) __builtin_prefetch(from + i * row + j);
}

// out[r][i] = query[r] . key[i]. kCount x kAtOnce sums fill 12 of 16 registers, beside the keys and one query.
template <int kCount, int kAtOnce, typename T>
static void dots_at_once(const float* query, const T* key, int64_t key_row, int64_t width, float* out) {
  V sums[kCount][kAtOnce];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) sums[r][i] = zero();
  for (int64_t j = 0; j < width; j += kLanes) {
    V columns[kAtOnce];
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) columns[i] = load(key + i * key_row + j);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      V x = load(query + r * width + j);
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) sums[r][i] = fma(x, columns[i], sums[r][i]);
    }
  }
  for (int r = 0; r < kCount; ++r)
    for (int i = 0; i < kAtOnce; ++i) out[r * kTile + i] = sum_lanes(sums[r][i]);
}

template <int kCount, typename T>
static void dots(const float* query, const T* key, int64_t key_row, int64_t keys, int64_t width, float* out) {
  constexpr int kAtOnce = kCount == 1 ? 8 : 12 / kCount;
  int64_t i = 0;
  for (; i + kAtOnce <= keys; i += kAtOnce) {
    fetch_rows(key + (i + kKeysAhead) * key_row, key_row, kAtOnce, width);
    dots_at_once<kCount, kAtOnce>(query, key + i * key_row, key_row, width, out + i);
  }
  for (; i < keys; ++i) dots_at_once<kCount, 1>(query, key + i * key_row, key_row, width, out + i);
}

// sums[r][column] += sum over i of weights[r][i] * value[i][column], for kVectors vectors of columns.
template <int kCount, int kVectors, typename T>
static void add_columns(const float* weights, const T* value, int64_t value_row, int64_t keys, float* sums,
                        int64_t sums_row) {
  V more[kCount][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) more[r][j] = zero();
  for (int64_t i = 0; i < keys; ++i) {
    V columns[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) columns[j] = load(value + i * value_row + j * kLanes);
    __builtin_prefetch(value + (i + kDirectDepth) * value_row);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      V x = splat(weights[r * kTile + i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) more[r][j] = fma(x, columns[j], more[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* to = sums + r * sums_row + j * kLanes;
      store(to, add(load(to), more[r][j]));
    }
}

// As many columns at once as fill 8 registers with sums: enough chains to hide the latency of an addition.
template <int kCount, int kVectors = kCount == 1 ? 8 : kCount == 2 ? 4 : 2, typename T>
static void add_values(const float* weights, const T* value, int64_t value_row, int64_t keys, int64_t columns,
                       float* sums, int64_t sums_row) {
  int64_t j = 0;
  for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes)
    add_columns<kCount, kVectors>(weights, value + j, value_row, keys, sums + j, sums_row);
  if constexpr (kVectors > 1)
    if (j < columns)
      add_values<kCount, kVectors / 2>(weights, value + j, value_row, keys, columns - j, sums + j, sums_row);
}

template <int n>
struct Constant {
  static constexpr int value = n;
};

// work(count) with the count of rows, 1 to kTogether, as a constant.
template <typename Work>
INLINE void by_count(int64_t count, const Work& work) {
  if (count == 1) work(Constant<1>{});
  else if (count == 2) work(Constant<2>{});
  else if (count == 3) work(Constant<3>{});
  else work(Constant<4>{});
}

// Scores of `rows` rows (row, width) against keys [first, last): scores[r][key - from].
static void score_directly(const Call& call, int64_t batch, int64_t group, const float* query, int64_t rows,
                           int64_t first, int64_t last, float* scores) {
  by_dtype(call.dtype, call.key.data, [&](auto* key) {
    key += batch * call.key.batch + group * call.key.head + first * call.key.row;
    for (int64_t r = 0; r < rows; r += kTogether)
      by_count(least(kTogether, rows - r), [&](auto count) {
        dots<decltype(count)::value>(query + r * call.width, key, call.key.row, last - first, call.width,
                                     scores + r * kTile);
      });
  });
  by_dtype(call.dtype, call.value.data, [&](auto* value) {  // while the softmax runs
    value += batch * call.value.batch + group * call.value.head + first * call.value.row;
    fetch_rows(value, call.value.row, least(kDirectDepth, last - first), call.value_width);
  });
}

// sums[r] = sums[r] * factor[r] + weights[r] . values of keys [first, last).
static void weigh_directly(const Call& call, int64_t batch, int64_t group, const float* weights, int64_t rows,
                           int64_t first, int64_t last, const float* factor, float* sums, int64_t sums_row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < call.value_width; j += kLanes) {
      float* to = sums + r * sums_row + j;
      store(to, mul(load(to), splat(factor[r])));
    }
  by_dtype(call.dtype, call.value.data, [&](auto* value) {
    value += batch * call.value.batch + group * call.value.head;
    // Blocks end at multiples of kDirectDepth, so that they do not depend on where a row begins to see.
    for (int64_t begin = first; begin < last;) {
      int64_t end = least(last, (begin / kDirectDepth + 1) * kDirectDepth);
      for (int64_t r = 0; r < rows; r += kTogether)
        by_count(least(kTogether, rows - r), [&](auto count) {
          add_values<decltype(count)::value>(weights + r * kTile + begin - first, value + begin * call.value.row,
                                             call.value.row, end - begin, call.value_width, sums + r * sums_row,
                                             sums_row);
        });
      begin = end;
    }
  });
}

}  // namespace
}  // namespace sightline
