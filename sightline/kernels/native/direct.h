// Few rows, as when one token is decoded: packing a tile would cost more than using it, so keys and values are read
// where they lie, once, and become float on the way, or are multiplied in pairs. A row's sums do not depend on the
// rows beside it.
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
// comes in bursts. Into L2, where most CPUs can have more lines under way at once than into L1.
template <typename T>
struct Ahead {
  const T* at;
  int64_t row, columns, column = 0;
  template <int kNumbers>
  inline __attribute__((always_inline)) void fetch() {
#pragma GCC unroll 8
    for (int i = 0; i < kNumbers; i += (int)(64 / sizeof(T)))
      if (fetches_near) __builtin_prefetch(at + column + i, 0, 3);
      else __builtin_prefetch(at + column + i, 0, 2);
    column += kNumbers;
    if (column >= columns) column = 0, at += row;
  }
};

// What is fetched while row i is used; after `count` rows come those of `then`.
template <typename T>
INLINE Ahead<T> ahead_of(const Rows<T>& rows, int64_t i, int64_t count, const Rows<T>& then) {
  i += rows.ahead;
  if (i < count) return {rows.first + i * rows.row, rows.row, rows.columns};
  return {then.first + (i - count) * then.row, then.row, then.columns};
}

// What one multiply-add takes of a row, `left` numbers before its end: floats, or pairs where the query is bf16 too.
template <typename Query, typename T>
INLINE auto factor_of(const T* row, int64_t left) {
#if defined(SIGHTLINE_DOT)
  if constexpr (sizeof(Query) == sizeof(bfloat16)) return (Pairs)_mm512_castps_si512(load_pairs(row, left));
  else
#endif
    return (void)left, load(row);
}

// out[r][i] = query[r] . key[i] * scale, whose kCount x kAtOnce sums stay in registers.
template <int kCount, int kAtOnce, typename Query, typename T>
static void dots_at_once(const Query* query, const T* key, int64_t key_row, int64_t width, float scale, float* out,
                         Ahead<T> ahead) {
  constexpr int kDepth = kLanes * (int)(sizeof(float) / sizeof(Query));
  V sums[kCount][kAtOnce];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) sums[r][i] = zero();
  for (int64_t j = 0; j < width; j += kDepth) {
    ahead.template fetch<kAtOnce * kDepth>();
    decltype(factor_of<Query>(key, 0)) columns[kAtOnce];
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) columns[i] = factor_of<Query>(key + i * key_row + j, width - j);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      auto x = factor_of<Query>(query + r * width + j, width - j);
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) sums[r][i] = fma(x, columns[i], sums[r][i]);
    }
  }
  for (int r = 0; r < kCount; ++r)
    for (int i = 0; i < kAtOnce; ++i) out[r * kTile + i] = sum_lanes(sums[r][i]) * scale;
}

// 8 sums are enough chains to hide the latency of an addition; fewer keys at once are nearer to the order of memory.
template <int kCount, typename Query, typename T>
static void dots(const Query* query, const Rows<T>& keys, int64_t count, float scale, float* out, const Rows<T>& then) {
  constexpr int kAtOnce = kCount == 3 ? 3 : 8 / kCount;
  int64_t i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce)
    dots_at_once<kCount, kAtOnce>(query, keys.first + i * keys.row, keys.row, keys.columns, scale, out + i,
                                  ahead_of(keys, i, count, then));
  for (; i < count; ++i)
    dots_at_once<kCount, 1>(query, keys.first + i * keys.row, keys.row, keys.columns, scale, out + i,
                            ahead_of(keys, i, count, then));
}

INLINE float weight_at(const float* weight) { return *weight; }

// Columns of one row.
template <typename Weight, int kVectors, typename T>
INLINE void load_columns(const T* row, const T*, V (&columns)[kVectors]) {
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) columns[j] = load(row + j * kLanes);
}

#if defined(SIGHTLINE_DOT)
INLINE Pair weight_at(const bfloat16* weights) {
  Pair both;
  __builtin_memcpy(&both, weights, sizeof both);
  return both;
}

// Columns of two rows, either of which may be missing.
template <typename Weight, int kVectors>
INLINE void load_columns(const bfloat16* low, const bfloat16* high, Pairs (&columns)[kVectors]) {
  constexpr int kTwo = kVectors < 2 ? kVectors : 2;
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; j += kTwo)
    load_zipped(low ? low + j * kLanes : nullptr, high ? high + j * kLanes : nullptr, *(Pairs(*)[kTwo])(columns + j));
}
#endif

// sums[r][column] += sum over i of weights[r][i] * value[i][column], for kVectors vectors of columns. Weights in bf16
// are multiplied in pairs, whose first is of an even key: with `odd`, the first pair lacks it.
template <int kCount, int kVectors, typename Weight, typename T>
static void add_columns(const Weight* weights, bool odd, const T* value, int64_t value_row, int64_t keys, float* sums,
                        int64_t sums_row, Ahead<T>& ahead) {
  constexpr int kDepth = (int)(sizeof(float) / sizeof(Weight));
  V more[kCount][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) more[r][j] = zero();
  for (int64_t i = kDepth == 2 && odd ? -1 : 0; i < keys; i += kDepth) {
    ahead.template fetch<kDepth * kVectors * kLanes>();
    decltype(factor_of<Weight>(value, 0)) columns[kVectors];
    load_columns<Weight>(i < 0 ? nullptr : value + i * value_row, i + 1 < keys ? value + (i + 1) * value_row : nullptr,
                         columns);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      auto x = splat(weight_at(weights + r * kTile + i));
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
template <int kCount, int kVectors = kCount == 1 ? 8 : kCount == 2 ? 4 : 2, typename Weight, typename T>
static void add_values(const Weight* weights, bool odd, const T* value, int64_t value_row, int64_t keys,
                       int64_t columns, float* sums, int64_t sums_row, Ahead<T>& ahead) {
  int64_t j = 0;
  for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes)
    add_columns<kCount, kVectors>(weights, odd, value + j, value_row, keys, sums + j, sums_row, ahead);
  if constexpr (kVectors > 1)
    if (j < columns)
      add_values<kCount, kVectors / 2>(weights, odd, value + j, value_row, keys, columns - j, sums + j, sums_row,
                                       ahead);
}

// work(count) with the count of rows, 1 to kTogether, as a constant.
template <typename Work>
INLINE void by_count(int64_t count, const Work& work) {
  if (count == 1) work(Constant<1>{});
  else if (count == 2) work(Constant<2>{});
  else if (count == 3) work(Constant<3>{});
  else work(Constant<4>{});
}

// Scores of `rows` rows (row, width) against keys [first, last): scores[r][key - first].
template <typename Query, typename T>
static void score_rows(const Call& call, int64_t batch, int64_t group, const Query* query, float scale, int64_t rows,
                       int64_t first, int64_t last, const T* key, float* scores) {
  auto keys = rows_of(key, call.key, call.width, batch, group, first);
  auto then = rows_of((const T*)call.value.data, call.value, call.value_width, batch, group, first);
  for (int64_t r = 0; r < rows; r += kTogether)
    by_count(least(kTogether, rows - r), [&](auto count) {
      dots<decltype(count)::value>(query + r * call.width, keys, last - first, scale, scores + r * kTile, then);
    });
}

// Of queries that are scaled already.
static void score_directly(const Call& call, int64_t batch, int64_t group, const float* query, int64_t rows,
                           int64_t first, int64_t last, float* scores) {
  by_dtype(call.dtype, call.key.data,
           [&](auto* key) { score_rows(call, batch, group, query, 1.0f, rows, first, last, key, scores); });
}

// sums[r] = sums[r] * factor[r] + weights[r] . values of keys [first, last), where weights[r] begin with key `from`.
template <typename Weight, typename T>
static void weigh_rows(const Call& call, int64_t batch, int64_t group, const Weight* weights, int64_t rows,
                       int64_t from, int64_t first, int64_t last, const float* factor, const T* value, float* sums,
                       int64_t sums_row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < call.value_width; j += kLanes) {
      float* to = sums + r * sums_row + j;
      store(to, mul(load(to), splat(factor[r])));
    }
  auto values = rows_of(value, call.value, call.value_width, batch, group, first);
  auto then = rows_of((const T*)call.key.data, call.key, call.width, batch, group, last);
  // Blocks end at multiples of kDirectDepth, so that they do not depend on where a row begins to see.
  for (int64_t begin = first; begin < last;) {
    int64_t end = least(last, (begin / kDirectDepth + 1) * kDirectDepth);
    for (int64_t r = 0; r < rows; r += kTogether)
      by_count(least(kTogether, rows - r), [&](auto count) {
        auto ahead = ahead_of(values, begin - first, last - first, then);
        add_values<decltype(count)::value>(weights + r * kTile + begin - from, begin % 2 == 1,
                                           values.first + (begin - first) * values.row, values.row, end - begin,
                                           call.value_width, sums + r * sums_row, sums_row, ahead);
      });
    begin = end;
  }
}

static void weigh_directly(const Call& call, int64_t batch, int64_t group, const float* weights, int64_t rows,
                           int64_t from, int64_t first, int64_t last, const float* factor, float* sums,
                           int64_t sums_row) {
  by_dtype(call.dtype, call.value.data, [&](auto* value) {
    weigh_rows(call, batch, group, weights, rows, from, first, last, factor, value, sums, sums_row);
  });
}

#if defined(SIGHTLINE_DOT)
// In pairs, of queries that are not scaled.
static void score_directly(const Call& call, int64_t batch, int64_t group, const bfloat16* query, int64_t rows,
                           int64_t first, int64_t last, float* scores) {
  score_rows(call, batch, group, query, call.scale, rows, first, last, (const bfloat16*)call.key.data, scores);
}

static void weigh_directly(const Call& call, int64_t batch, int64_t group, const bfloat16* weights, int64_t rows,
                           int64_t from, int64_t first, int64_t last, const float* factor, float* sums,
                           int64_t sums_row) {
  auto* value = (const bfloat16*)call.value.data;
  weigh_rows(call, batch, group, weights, rows, from, first, last, factor, value, sums, sums_row);
}
#endif

}  // namespace
}  // namespace sightline
