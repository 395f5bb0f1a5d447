// Linear maps of few rows, as when one token is decoded: every weight is read once, in the order of memory, and used
// for all rows. A library's matrix product packs, or reads at a third of what memory gives.
#pragma once

#include "vectors.h"

namespace sightline {
namespace {

constexpr int kWeightRows = 4;            // chains of sums that hide an addition's latency
constexpr int64_t kMapChain = 16 * kLanes;  // numbers of depth that go into one chain: a longer one rounds more

// A sum is one chain of chains in the order of depth, whatever stands beside it.
template <int kCount, int kAtOnce>
static void project_tile(const Projection& map, int64_t row, int64_t first) {
  const float* x = map.x + row * map.depth;
  const float* weight = map.weight + first * map.depth;
  V sums[kCount][kAtOnce], totals[kCount][kAtOnce];
  for (int r = 0; r < kCount; ++r)
    for (int i = 0; i < kAtOnce; ++i) totals[r][i] = zero();
  int64_t whole = map.depth / kLanes * kLanes;
  for (int64_t start = 0; start < whole; start += kMapChain) {
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) sums[r][i] = zero();
    int64_t stop = start + kMapChain < whole ? start + kMapChain : whole;
    for (int64_t j = start; j < stop; j += kLanes)
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) {
        V w = load(weight + i * map.depth + j);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) sums[r][i] = fma(load(x + r * map.depth + j), w, sums[r][i]);
      }
    for (int r = 0; r < kCount; ++r)
      for (int i = 0; i < kAtOnce; ++i) totals[r][i] = add(totals[r][i], sums[r][i]);
  }
  int rest = (int)(map.depth - whole);
  for (int i = 0; i < kAtOnce; ++i)
    for (int r = 0; r < kCount; ++r) {
      V sum = totals[r][i];
      if (rest) sum = fma(load_some(x + r * map.depth + whole, rest), load_some(weight + i * map.depth + whole, rest), sum);
      map.out[(row + r) * map.out_row + first + i] = sum_lanes(sum) + (map.bias ? map.bias[first + i] : 0);
    }
}

template <int kAtOnce>
static void project_rows(const Projection& map, int64_t first) {
  int64_t row = 0;
  for (; row + 2 <= map.rows; row += 2) project_tile<2, kAtOnce>(map, row, first);
  if (row < map.rows) project_tile<1, kAtOnce>(map, row, first);
}

// Columns `first` to `last` of the output.
static void project(const Projection& map, int64_t first, int64_t last) {
  for (; first + kWeightRows <= last; first += kWeightRows) project_rows<kWeightRows>(map, first);
  for (; first < last; ++first) project_rows<1>(map, first);
}
}  // namespace
}  // namespace sightline
