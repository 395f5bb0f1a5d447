// Few rows, as when one token is decoded: packing a tile would cost more than using it, so keys and values are read
// where they lie, once, and become float on the way. A row's sums do not depend on the rows beside it.
#pragma once

#include "packing.h"

namespace sightline {
namespace {

constexpr int kTogether = 4;            // rows that share what is read
constexpr int64_t kDirectRows = 8;      // more are worth packing; they may be two row groups
constexpr int64_t kDirectDepth = 8;     // keys whose values stay in L1 while the columns pass
constexpr int64_t kBytesAhead = 12 << 10;  // fetched early: no prefetcher of the CPU follows what is read here

// Known from the call alone: how a row is summed must not depend on how the work is cut. Columns come in whole vectors.
static bool reads_directly(const Call& call) {
  return call.heads / call.groups * call.queries <= kDirectRows && call.width % kLanes == 0 &&
         call.value_width % kLanes == 0;
}

// Rows of keys or of values, as they lie in memory, and how many of them are kBytesAhead.
template <typename T>
struct Rows {
  const T* first;
  int64_t row, columns, ahead;
};

template <typename T>
INLINE Rows<T> rows_of(const T* data, const Strided& of, int64_t columns, int64_t batch, int64_t group, int64_t first) {
  return {data + batch * of.batch + group * of.head + first * of.row, of.row, columns,
          kBytesAhead / (int64_t)sizeof(T) / most(1, columns)};
}

// What is read later, fetched line by line in the order of memory, which the sums here are not in: the CPU drops what
// comes in bursts. Into L2, where more lines can be under way at once than into L1; half as many bytes need no more.
template <typename T>
struct Ahead {
  const T* at;
  int64_t row, columns, column = 0;
  template <int kNumbers>
  inline __attribute__((always_inline)) void fetch() {
#pragma GCC unroll 8
    for (int i = 0; i < kNumbers; i += (int)(64 / sizeof(T)))
      __builtin_prefetch(at + column + i, 0, sizeof(T) == sizeof(float) ? 2 : 3);
    column += kNumbers;
    if (column >= columns) column -= columns, at += row;
  }
};

// What is fetched while row i is used; after `count` rows come those of `then`.
template <typename T>
INLINE Ahead<T> ahead_of(const Rows<T>& rows, int64_t i, int64_t count, const Rows<T>& then) {
  i += rows.ahead;
  if (i < count) return {rows.first + i * rows.row, rows.row, rows.columns};
  return {then.first + (i - count) * then.row, then.row, then.columns};
}

// out[r][i] = query[r] . key[i], whose kCount x kAtOnce sums stay in registers.
template <int kCount, int kAtOnce, typename T>
static void dots_at_once(const float* query, const T* key, int64_t key_row, int64_t width, float* out, Ahead<T> ahead) {
  V sums[kCount][kAtOnce];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) sums[r][i] = zero();
  for (int64_t j = 0; j < width; j += kLanes) {
    ahead.template fetch<kAtOnce * kLanes>();
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

// 8 sums are enough chains to hide the latency of an addition; fewer keys at once are nearer to the order of memory.
template <int kCount, typename T>
static void dots(const float* query, const Rows<T>& keys, int64_t count, float* out, const Rows<T>& then) {
  constexpr int kAtOnce = kCount == 3 ? 3 : 8 / kCount;
  int64_t i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce)
    dots_at_once<kCount, kAtOnce>(query, keys.first + i * keys.row, keys.row, keys.columns, out + i,
                                  ahead_of(keys, i, count, then));
  for (; i < count; ++i)
    dots_at_once<kCount, 1>(query, keys.first + i * keys.row, keys.row, keys.columns, out + i,
                            ahead_of(keys, i, count, then));
}

// sums[r][column] += sum over i of weights[r][i] * value[i][column], for kVectors vectors of columns.
template <int kCount, int kVectors, typename T>
static void add_columns(const float* weights, const T* value, int64_t value_row, int64_t keys, float* sums,
                        int64_t sums_row, Ahead<T>& ahead) {
  V more[kCount][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) more[r][j] = zero();
  for (int64_t i = 0; i < keys; ++i) {
    ahead.template fetch<kVectors * kLanes>();
    V columns[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) columns[j] = load(value + i * value_row + j * kLanes);
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

// As many columns at once as fill 8 registers with sums.
template <int kCount, int kVectors = kCount == 1 ? 8 : kCount == 2 ? 4 : 2, typename T>
static void add_values(const float* weights, const T* value, int64_t value_row, int64_t keys, int64_t columns,
                       float* sums, int64_t sums_row, Ahead<T>& ahead) {
  int64_t j = 0;
  for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes)
    add_columns<kCount, kVectors>(weights, value + j, value_row, keys, sums + j, sums_row, ahead);
  if constexpr (kVectors > 1)
    if (j < columns)
      add_values<kCount, kVectors / 2>(weights, value + j, value_row, keys, columns - j, sums + j, sums_row, ahead);
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
    auto keys = rows_of(key, call.key, call.width, batch, group, first);
    auto then = rows_of((decltype(key))call.value.data, call.value, call.value_width, batch, group, first);
    for (int64_t r = 0; r < rows; r += kTogether)
      by_count(least(kTogether, rows - r), [&](auto count) {
        dots<decltype(count)::value>(query + r * call.width, keys, last - first, scores + r * kTile, then);
      });
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
    auto values = rows_of(value, call.value, call.value_width, batch, group, first);
    auto then = rows_of((decltype(value))call.key.data, call.key, call.width, batch, group, last);
    // Blocks end at multiples of kDirectDepth, so that they do not depend on where a row begins to see.
    for (int64_t begin = first; begin < last;) {
      int64_t end = least(last, (begin / kDirectDepth + 1) * kDirectDepth);
      for (int64_t r = 0; r < rows; r += kTogether)
        by_count(least(kTogether, rows - r), [&](auto count) {
          auto ahead = ahead_of(values, begin - first, last - first, then);
          add_values<decltype(count)::value>(weights + r * kTile + begin - first,
                                             values.first + (begin - first) * values.row, values.row, end - begin,
                                             call.value_width, sums + r * sums_row, sums_row, ahead);
        });
      begin = end;
    }
  });
}

}  // namespace
}  // namespace sightline
