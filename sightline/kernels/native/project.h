// Linear maps of few rows, as when one token is decoded: every weight is read once, in the order of memory, and used
// for all rows. A library's matrix product packs, or reads at a third of what memory gives.
#pragma once

#include "vectors.h"

namespace sightline {
namespace {

constexpr int kChains = 4;                       // of sums: they hide an addition's latency
constexpr int64_t kMapChain = 16 * kLanes;       // numbers of depth that go into one chain: a longer one rounds more
constexpr int64_t kMapBlock = kChains * kMapChain;

// One weight row against kCount rows. The order of a sum depends on the depth alone.
template <int kCount>
INLINE void project_column(const Projection& map, int64_t row, int64_t column) {
  const float* x = map.x + row * map.depth;
  const float* weight = map.weight + column * map.depth;
  V sums[kCount][kChains], totals[kCount][kChains];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) totals[r][i] = zero();
  int64_t whole = map.depth / kLanes * kLanes;
  for (int64_t start = 0; start < whole; start += kMapBlock) {
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kChains; ++i) sums[r][i] = zero();
    int64_t stop = start + kMapBlock < whole ? start + kMapBlock : whole, j = start;
    for (; j + kChains * kLanes <= stop; j += kChains * kLanes)
#pragma GCC unroll 8
      for (int i = 0; i < kChains; ++i) {
        V w = load(weight + j + i * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) sums[r][i] = fma(load(x + r * map.depth + j + i * kLanes), w, sums[r][i]);
      }
    for (; j < stop; j += kLanes)
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) sums[r][0] = fma(load(x + r * map.depth + j), load(weight + j), sums[r][0]);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kChains; ++i) totals[r][i] = add(totals[r][i], sums[r][i]);
  }
  int rest = (int)(map.depth - whole);
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
    V sum = add(add(totals[r][0], totals[r][1]), add(totals[r][2], totals[r][3]));
    if (rest) sum = fma(load_some(x + r * map.depth + whole, rest), load_some(weight + whole, rest), sum);
    map.out[(row + r) * map.out_row + column] = sum_lanes(sum) + (map.bias ? map.bias[column] : 0);
  }
}

// Columns `first` to `last` of the output.
static void project(const Projection& map, int64_t first, int64_t last) {
  for (int64_t column = first; column < last; ++column) {
    int64_t row = 0;
    for (; row + 2 <= map.rows; row += 2) project_column<2>(map, row, column);
    if (row < map.rows) project_column<1>(map, row, column);
  }
}
}  // namespace
}  // namespace sightline
