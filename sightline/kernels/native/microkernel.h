// The register tile: up to kRows x 2 vectors of sums stay in registers while the depth runs by.
//
//   C[r][0 .. kPanel) gets, or is joined by, the sum over k of A(r, k) * B[k][0 .. kPanel)
//
// Every step loads one row of the panel B (packed, kPanel floats a row), broadcasts one number of A for each row and
// multiplies. A sum is one chain in the order of k, whatever the number of rows: the bits of a row do not depend on
// its neighbours. It starts at zero and meets C at the end: short chains, added up, are what keeps rounding errors
// where a library's matrix product has them.
#pragma once

#include "vectors.h"

namespace sightline {
namespace {

enum class Into {
  nothing,  // C is written
  sum,      // C is added to
  scaled,   // C * factor[r] is added to: the online softmax's rescaling, free of a pass of its own
  times,    // C is written, times factor[0]
};

constexpr int kAhead = 8;  // steps of depth

// A(r, k) = a[r * kRowStep + k * kDepthStep]: rows that stand one after another, or interleaved.
// Number is float, or Pair: a step of depth is then two numbers deep.
template <typename Number, int kCount, int kVectors, int kRowStep, int kDepthStep, Into kInto>
static void multiply_rows(const Number* a, const Number* b, int64_t depth, float* c, int64_t c_row,
                          const float* factor) {
  V sums[kCount][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[r][j] = zero();
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load(b)) panel[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) panel[j] = load(b + k * kPanel + j * kLanes);
    // The panel comes from L2, whose latency is longer than what waits in the scheduler.
    __builtin_prefetch(b + (k + kAhead) * kPanel);
    __builtin_prefetch(b + (k + kAhead) * kPanel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) {
      auto x = splat(a[r * kRowStep + k * kDepthStep]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[r][j] = fma(x, panel[j], sums[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + r * c_row + j * kLanes;
      if constexpr (kInto == Into::sum) sums[r][j] = add(load(to), sums[r][j]);
      if constexpr (kInto == Into::scaled) sums[r][j] = fma(load(to), splat(factor[r]), sums[r][j]);
      if constexpr (kInto == Into::times) sums[r][j] = mul(sums[r][j], splat(factor[0]));
      store(to, sums[r][j]);
    }
}

// One function a number of rows, 1 to kRows.
template <typename Number, int kVectors, int kRowStep, int kDepthStep, Into kInto>
struct Multiplies {
  void (*of[kRows + 1])(const Number* a, const Number* b, int64_t depth, float* c, int64_t c_row,
                        const float* factor) = {};
  constexpr Multiplies() { fill<1>(); }
  template <int kCount>
  constexpr void fill() {
    of[kCount] = multiply_rows<Number, kCount, kVectors, kRowStep, kDepthStep, kInto>;
    if constexpr (kCount < kRows) fill<kCount + 1>();
  }
};

// C of `rows` rows and `columns` columns (C has room for whole vectors) against panels `panel_size` apart.
template <int kRowStep, int kDepthStep, Into kInto, typename Number>
static void multiply(int64_t rows, const Number* a, const Number* b, int64_t panel_size, int64_t depth, float* c,
                     int64_t c_row, int64_t columns, const float* factor = nullptr) {
  static constexpr Multiplies<Number, 2, kRowStep, kDepthStep, kInto> wide;
  static constexpr Multiplies<Number, 1, kRowStep, kDepthStep, kInto> narrow;
  for (int64_t j = 0; j < columns; j += kPanel, b += panel_size)
    (columns - j > kLanes ? wide.of[rows] : narrow.of[rows])(a, b, depth, c + j, c_row, factor);
}

constexpr int64_t kChain = 64;  // of a product over the width

// As multiply into nothing, in chains of kChain. `ahead`, if any, is of C's shape: memory that is needed next and may lie
// beyond the caches, asked for panel by panel while the multiply ports have work.
template <int kRowStep, int kDepthStep>
static void multiply_in_chains(int64_t rows, const float* a, const float* b, int64_t panel_floats, int64_t depth,
                               float* c, int64_t c_row, int64_t columns, const float* ahead = nullptr) {
  for (int64_t j = 0; j < columns; j += kPanel, b += panel_floats) {
    int64_t first = depth < kChain ? depth : kChain;
    for (int64_t r = 0; ahead && r < rows; ++r)
      for (int64_t k = 0; k < kPanel; k += 16) __builtin_prefetch(ahead + r * c_row + j + k, 1);
    multiply<kRowStep, kDepthStep, Into::nothing>(rows, a, b, 0, first, c + j, c_row, kPanel);
    for (int64_t k = first; k < depth; k += kChain)
      multiply<kRowStep, kDepthStep, Into::sum>(rows, a + k * kDepthStep, b + k * kPanel, 0,
                                                depth - k < kChain ? depth - k : kChain, c + j, c_row, kPanel);
  }
}

}  // namespace
}  // namespace sightline
