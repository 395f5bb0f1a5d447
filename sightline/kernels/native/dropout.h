// Dropout without a mask in memory: whether a number stays is a hash of the seed and of its place, so the backward, every
// block and every thread find the same.
#pragma once

#include "softmax.h"

namespace sightline {
namespace {

typedef uint32_t U __attribute__((vector_size(4 * kLanes)));

INLINE U splat_bits(uint32_t x) { return U{} + x; }

// A row's place in 64 bits. Two words, one before and one between the rounds of a weight's hash: with a single one, rows
// would draw from shifted copies of one sequence.
struct Place {
  uint32_t first, second;
};

static Place place_of(uint64_t seed, int64_t row) {
  uint64_t x = seed + 0x9e3779b97f4a7c15u * ((uint64_t)row + 1);  // splitmix64 (Steele et al. 2014)
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return {(uint32_t)x, (uint32_t)(x >> 32)};
}

static Place place_of(const Call& call, int64_t batch, const Row& row) {
  return place_of(call.seed, (batch * call.heads + row.head) * call.queries + row.query);
}

// For columns [column, column + kLanes): 0 where dropped, 1 / (1 - dropout) elsewhere. The rounds are those of
// a 32-bit hash without visible bias (lowbias32, Wellons 2018).
INLINE V kept(uint32_t dropped, float factor, const Place& place, int64_t column) {
  U x;
  for (int i = 0; i < kLanes; ++i) x[i] = (uint32_t)i;
  x = (x + splat_bits((uint32_t)column)) * splat_bits(0x9e3779b1u) ^ splat_bits(place.first);
  x = (x ^ x >> 16) * splat_bits(0x7feb352du) + splat_bits(place.second);
  x = (x ^ x >> 15) * splat_bits(0x846ca68bu);
  x ^= x >> 16;
  U stays = (U)(x >= splat_bits(dropped));
  return (V)(stays & splat_bits(float_to_bits(factor)));
}

INLINE V kept(const Call& call, const Place& place, int64_t key) {
  return kept(call.dropped, call.kept, place, key);
}

// Weights [begin, end) of a row, of keys first + [begin, end), and with kPairs also their bf16 in `rounded`.
template <bool kPairs>
static void drop(const Call& call, int64_t batch, const Row& row, int64_t first, int64_t begin, int64_t end,
                 float* weights, bfloat16* rounded) {
  Place place = place_of(call, batch, row);
  for (int64_t k = begin; k < end; k += kLanes) {
    V p = mul(load(weights + k), kept(call, place, first + k));
    store(weights + k, p);
    if constexpr (kPairs) store(rounded + k, p);
  }
}

}  // namespace
}  // namespace sightline
