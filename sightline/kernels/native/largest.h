// Each row's largest scores, exact, in falling order; of equal ones those of the lower keys. What belongs into the
// lists is found row by row, and put in for all rows of a group at once, a row a lane.
#pragma once

#include "softmax.h"

namespace sightline {
namespace {

constexpr int64_t kChunk = kTile / 4;  // keys, a bit each in a mask

// The largest scores of each chunk of a tile, lane by lane.
struct Maxima {
  V of[4];
};

// Of whole panels.
INLINE V largest_lanes(const float* scores, int64_t count) {
  V even = splat(-kInfinity), odd = even;
  for (int64_t k = 0; k < count; k += kPanel) {
    even = max(even, load(scores + k));
    odd = max(odd, load(scores + k + kLanes));
  }
  return max(even, odd);
}

static Maxima lane_maxima(const float* scores, int64_t begin, int64_t end) {
  Maxima maxima;
  for (V& chunk : maxima.of) chunk = splat(-kInfinity);
  for (int64_t k = begin, stop; k < end; k = stop) {
    int64_t chunk = k / kChunk;
    stop = least(end, (chunk + 1) * kChunk);
    bool whole = stop - k == kChunk;  // a count that the compiler knows
    maxima.of[chunk] = whole ? largest_lanes(scores + k, kChunk) : largest_lanes(scores + k, stop - k);
  }
  return maxima;
}

// What belongs into the lists of a row group: one score and its key a row and turn, as many turns as the row has.
struct Found {
  static constexpr int64_t kMost = kTile + 4;
  float score[kMost * kRowStride], turns[kRowStride];
  int32_t key[kMost * kRowStride];
};

#if defined(__AVX512VBMI2__)
#define EIGHT(n) n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7
alignas(64) constexpr uint8_t kColumns[] = {EIGHT(0),  EIGHT(8),  EIGHT(16), EIGHT(24),
                                            EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56)};
#undef EIGHT
#endif

// Which of a chunk's scores are above `bar`, of the columns [begin, end) of the tile.
INLINE uint64_t above(const float* scores, int64_t chunk, int64_t begin, int64_t end, V bar) {
  uint64_t over = 0;
#pragma GCC unroll 16
  for (int i = 0; i < kChunk / kLanes; ++i)
    over |= (uint64_t)greater(load(scores + chunk + i * kLanes), bar) << i * kLanes;
  if (begin > chunk) over &= ~0ull << (begin - chunk);
  if (end < chunk + kChunk) over &= ~0ull >> (chunk + kChunk - end);
  return over;
}

// Of the scores [begin, end) of a row, of keys first + [begin, end), those above `bar`; how many there are. Mostly
// without branches: one that depends on numbers costs as much as several scores.
INLINE int64_t find_above(const float* scores, int64_t begin, int64_t end, int64_t first, V bar, Found& found,
                          int64_t row) {
  float* score = found.score + row;
  int32_t* key = found.key + row;
  int64_t count = 0;
  auto take = [&](int64_t at) {
    score[count * kRowStride] = scores[at], key[count * kRowStride] = (int32_t)(first + at);
    ++count;
  };
#if defined(__AVX512VBMI2__)
  uint8_t at[kTile + 64];
  int64_t all = 0;
  __m512i columns = _mm512_load_si512(kColumns);
  for (int64_t chunk = begin / kChunk * kChunk; chunk < end; chunk += kChunk) {
    uint64_t over = above(scores, chunk, begin, end, bar);
    __m512i here = _mm512_add_epi8(columns, _mm512_set1_epi8((char)chunk));
    _mm512_storeu_si512(at + all, _mm512_maskz_compress_epi8(over, here));
    all += __builtin_popcountll(over);
  }
  while (count < all) take(at[count]), take(at[count]), take(at[count]), take(at[count]);
  return all;
#else
  for (int64_t chunk = begin / kChunk * kChunk; chunk < end; chunk += kChunk) {
    uint64_t over = above(scores, chunk, begin, end, bar);
    int64_t next = count + __builtin_popcountll(over);
    auto take_lowest = [&] {
      take(chunk + __builtin_ctzll(over | 1ull << 63));
      over &= over - 1;
    };
    take_lowest(), take_lowest();
    while (count < next) take_lowest();
    count = next;
  }
  return count;
#endif
}

// Scores in turns, (turn, kRowStride) with their keys, against the lists of a row group, (place, kRowStride), each in
// falling order. A score takes the place of the first that is smaller, and those behind move on: of equal ones that
// which came first stays ahead. kTop places in registers, or, of any number, in memory.
template <int64_t kTop>
static void put_in(const float* score, const int32_t* key, const float* turns, float* best, int32_t* keys,
                   int64_t top) {
  for (int64_t v = 0; v < kRowStride; v += kLanes) {
    float *lists = best + v, *of_lists = (float*)keys + v;
    V own = load(turns + v), list[kTop + 1], of_list[kTop + 1];
    for (int64_t i = 0; i < kTop; ++i)
      list[i] = load(lists + i * kRowStride), of_list[i] = load(of_lists + i * kRowStride);
    auto put = [](V x, V of_x, V left, V of_left, V& place, V& of_place) {
      of_place = where_less(left, x, of_left, where_less(place, x, of_x, of_place));
      place = where_less(left, x, left, where_less(place, x, x, place));
    };
    for (int64_t turn = 0, last = (int64_t)max_lanes(own); turn < last; ++turn) {
      V x = load(score + turn * kRowStride + v), of_x = load((const float*)key + turn * kRowStride + v);
      x = where_less(splat((float)turn), own, x, splat(-kInfinity));
#pragma GCC unroll 16
      for (int64_t i = kTop - 1; i > 0; --i) put(x, of_x, list[i - 1], of_list[i - 1], list[i], of_list[i]);
      if constexpr (kTop > 0) put(x, of_x, splat(kInfinity), of_x, list[0], of_list[0]);
      for (int64_t i = kTop ? 0 : top; i-- > 0;) {
        float *at = lists + i * kRowStride, *of_at = of_lists + i * kRowStride;
        V place = load(at), of_place = load(of_at);
        if (i) put(x, of_x, load(at - kRowStride), load(of_at - kRowStride), place, of_place);
        else put(x, of_x, splat(kInfinity), of_x, place, of_place);
        store(at, place), store(of_at, of_place);
      }
    }
    for (int64_t i = 0; i < kTop; ++i)
      store(lists + i * kRowStride, list[i]), store(of_lists + i * kRowStride, of_list[i]);
  }
}

static void put_in(const float* score, const int32_t* key, const float* turns, float* best, int32_t* keys,
                   int64_t top) {
  (top == 8 ? put_in<8> : top == 16 ? put_in<16> : put_in<0>)(score, key, turns, best, keys, top);
}

// Of each row a score that at least `top` of its scores reach, or a little less: of the maxima of kSets disjoint sets of
// keys the `top`-th largest. -infinity where there are not so many. `found` is room for it.
static void find_floors(const Maxima* maxima, int64_t count, int64_t top, Found& found, float* floors) {
  constexpr int kSets = 16, kVectors = kSets / kLanes;
  for (int r = 0; r < kRowStride; ++r) floors[r] = -kInfinity, found.turns[r] = 0;
  if (top > kSets) return;
  for (int64_t r = 0; r < count; ++r) {
    V sets[kVectors];
    for (V& set : sets) set = splat(-kInfinity);
    for (int i = 0; i < 4; ++i) sets[i % kVectors] = max(sets[i % kVectors], maxima[r].of[i]);
    float each[kSets];
    for (int i = 0; i < kVectors; ++i) store(each + i * kLanes, sets[i]);
    for (int i = 0; i < kSets; ++i) found.score[i * kRowStride + r] = each[i];
    found.turns[r] = kSets;
  }
  float lists[kSets * kRowStride];
  int32_t keys[kSets * kRowStride];
  for (int64_t i = 0; i < top * kRowStride; ++i) lists[i] = -kInfinity, keys[i] = 0;
  put_in(found.score, found.key, found.turns, lists, keys, top);
  for (int64_t r = 0; r < count; ++r) {
    float floor = lists[(top - 1) * kRowStride + r];
    floors[r] = floor - 1e-6f * (floor < 0 ? -floor : floor) - 1e-30f;
  }
}

// The scores (kRows, kTile) of a row group's keys first + [begin, end) against its lists.
static void keep_largest(const float* scores, int64_t count, int64_t begin, int64_t end, int64_t first,
                         const Maxima* maxima, const float* largest, float* best, int32_t* keys, int64_t top) {
  const float* last = best + (top - 1) * kRowStride;
  float floors[kRowStride];
  Found found;
  bool empty = false;
  for (int64_t r = 0; r < count; ++r) empty = empty || last[r] == -kInfinity;
  if (empty) find_floors(maxima, count, top, found, floors);
  for (int r = 0; r < kRowStride; ++r) found.turns[r] = 0;
  for (int64_t r = 0; r < count; ++r) {
    if (!(largest[r] > last[r])) continue;
    float bar = last[r] == -kInfinity ? floors[r] : last[r];
    found.turns[r] = (float)find_above(scores + r * kTile, begin, end, first, splat(bar), found, r);
  }
  put_in(found.score, found.key, found.turns, best, keys, top);
}

}  // namespace
}  // namespace sightline
