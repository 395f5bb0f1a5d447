// A row's largest scores, exact, in falling order; of equal ones those of the lower keys. A tile's scores meet the list
// only where a quarter of them holds one that belongs there.
#pragma once

#include "softmax.h"

namespace sightline {
namespace {

// Puts a score above the last into a list of the largest in falling order. Keys come in rising order, so a tie stays
// behind the lower key.
INLINE void keep(float* scores, int32_t* keys, int64_t top, float score, int32_t key) {
  int64_t place = top - 1;
  for (; place > 0 && scores[place - 1] < score; --place) {
    scores[place] = scores[place - 1];
    keys[place] = keys[place - 1];
  }
  scores[place] = score;
  keys[place] = key;
}

constexpr int64_t kChunk = kTile / 4;  // keys that are passed over together, where none is among a row's largest

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

typedef int32_t Counts __attribute__((vector_size(4 * kLanes)));

// A score that at least `top` scores reach: of the maxima of as many sets of keys as two vectors have lanes, the
// `top`-th largest. -infinity where there are not so many.
static float floor_of(const Maxima& maxima, int64_t top) {
  if (top > 2 * kLanes) return -kInfinity;
  V sets[2] = {max(maxima.of[0], maxima.of[2]), max(maxima.of[1], maxima.of[3])}, reached = splat(-kInfinity);
  float each[2 * kLanes];
  store(each, sets[0]), store(each + kLanes, sets[1]);
  Counts above[2] = {};
  for (float x : each)
    for (int i = 0; i < 2; ++i) above[i] -= (Counts)(splat(x) > sets[i]);
  for (int i = 0; i < 2; ++i) {
    Counts among = (Counts)(above[i] < Counts{} + (int32_t)top);
    V or_infinity = (V)(((Counts)sets[i] & among) | ((Counts)splat(kInfinity) & ~among));
    reached = max(reached, sub(zero(), or_infinity));
  }
  return -max_lanes(reached);
}

#if defined(__AVX512F__)
// The scores [begin, end) of a row, of keys first + [begin, end), against its list. `floor` is a score that at least
// `top` of them reach, or -infinity: it spares an empty list most of what would pass through.
//
// The list lies in one register, a score a lane in falling order. What is put in takes the place of the first that is
// smaller: each lane becomes the larger of itself and the smaller of the new one and its left neighbour. Which scores
// are put in is found before, without branches, and in fours, of which -infinity changes nothing: a branch that
// depends on numbers costs as much as several scores.
template <int kMost>
static void keep_top(const float* scores, int64_t begin, int64_t end, int64_t first, const Maxima&, float floor,
                     float* best, int32_t* keys, int64_t top) {
  static_assert(kMost <= kLanes, "a list is one vector");
  const __m512i infinity = _mm512_castps_si512(splat(kInfinity));
  const __mmask16 listed = (__mmask16)((1u << top) - 1);
  V list = _mm512_mask_loadu_ps(splat(-kInfinity), listed, best);
  __m512i of_list = _mm512_maskz_loadu_epi32(listed, keys);
  // A little below the floor, so that what reaches it is above.
  V bar = max(splat(best[top - 1]), splat(floor - 1e-6f * (floor < 0 ? -floor : floor) - 1e-30f));
  float score[kTile + 4];
  int32_t key[kTile + 4];
  int64_t count = 0;
  for (int64_t k = begin, stop; k < end; k = stop) {
    int64_t chunk = k / kChunk * kChunk;
    stop = least(end, chunk + kChunk);
    uint64_t over = 0;
    for (int64_t i = k; i < stop; i += kPanel) {
      uint64_t panel = greater(load(scores + i), bar) | greater(load(scores + i + kLanes), bar) << kLanes;
      over |= panel << (i - chunk);
    }
    int64_t next = count + __builtin_popcountll(over);
    auto take = [&] {
      int64_t at = chunk + (__builtin_ctzll(over | 1ull << 63));
      score[count] = scores[at], key[count++] = (int32_t)(first + at);
      over &= over - 1;
    };
    take(), take(), take(), take();
    while (count < next) take();
    count = next;
  }
  for (int i = 0; i < 4; ++i) score[count + i] = -kInfinity;
  for (int64_t i = 0; i < count; i += 4)
#pragma GCC unroll 4
    for (int64_t j = i; j < i + 4; ++j) {
      V x = splat(score[j]);
      V left = _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(list), infinity, 15));
      __m512i of_left = _mm512_alignr_epi32(of_list, of_list, 15);
      of_left = _mm512_mask_mov_epi32(of_left, _mm512_cmp_ps_mask(left, x, _CMP_GE_OQ), _mm512_set1_epi32(key[j]));
      of_list = _mm512_mask_mov_epi32(of_left, _mm512_cmp_ps_mask(list, x, _CMP_GE_OQ), of_list);
      list = max(list, _mm512_min_ps(left, x));
    }
  _mm512_mask_storeu_ps(best, listed, list);
  _mm512_mask_storeu_epi32(keys, listed, of_list);
}
#else
// A row's list of at most kMost scores in falling order, and behind it scores that wait to be sorted in: one at a time
// they would wait for one another, and for branches that nobody can predict.
template <int kMost>
struct Largest {
  float room[2][2 * kMost], *score = room[0];
  int32_t key_room[2][2 * kMost], *key = key_room[0];
  int64_t count;

  // Everything goes to its rank: how many are larger, or equal and of a lower key. Keys come in rising order.
  void sort(int64_t top) {
    constexpr int kVectors = 2 * kMost / kLanes;
    Counts rank[kVectors] = {}, place[kVectors];
    for (int i = 0; i < 2 * kMost; ++i) place[i / kLanes][i % kLanes] = i;
    for (int64_t j = 0; j < count; ++j) {
      V x = splat(score[j]);
      Counts here = Counts{} + (int32_t)j;
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        V own = load(score + i * kLanes);
        rank[i] -= (Counts)(x > own) | ((Counts)(x == own) & (Counts)(here < place[i]));
      }
    }
    int32_t to[2 * kMost];
    __builtin_memcpy(to, rank, sizeof to);
    float* scores = score == room[0] ? room[1] : room[0];
    int32_t* keys = key == key_room[0] ? key_room[1] : key_room[0];
    for (int64_t i = 0; i < count; ++i) scores[to[i]] = score[i], keys[to[i]] = key[i];
    score = scores, key = keys, count = top;
  }
};

// At most kMost numbers; as many need no call.
template <int kMost, typename T>
INLINE void copy_list(T* to, const T* from, int64_t top) {
  if (top == kMost) __builtin_memcpy(to, from, sizeof(T) * kMost);
  else __builtin_memcpy(to, from, sizeof(T) * (size_t)top);
}

// As above, by the ranks.
template <int kMost>
static void keep_top(const float* scores, int64_t begin, int64_t end, int64_t first, const Maxima& maxima, float floor,
                     float* best, int32_t* keys, int64_t top) {
  Largest<kMost> list;
  for (auto& room : list.room)
    for (int i = 0; i < 2 * kMost; i += kLanes) store(room + i, zero());
  copy_list<kMost>(list.score, best, top), copy_list<kMost>(list.key, keys, top);
  list.count = top;
  float bar = best[top - 1];
  for (int64_t k = begin, stop; k < end; k = stop) {
    int64_t chunk = k / kChunk;
    stop = least(end, (chunk + 1) * kChunk);
    if (!greater(maxima.of[chunk], splat(bar))) continue;
    uint64_t over = 0;
    for (int64_t i = k; i < stop; i += kLanes) {
      V x = load(scores + i);
      over |= (uint64_t)(greater(x, splat(bar)) & ~greater(splat(floor), x)) << (i - chunk * kChunk);
    }
    for (; over; over &= over - 1) {
      int64_t at = chunk * kChunk + __builtin_ctzll(over);
      if (!(scores[at] > bar)) continue;
      list.score[list.count] = scores[at], list.key[list.count++] = (int32_t)(first + at);
      if (list.count == 2 * kMost) list.sort(top), bar = list.score[top - 1];
    }
  }
  if (list.count > top) list.sort(top);
  copy_list<kMost>(best, list.score, top), copy_list<kMost>(keys, list.key, top);
}

#endif

// As keep_top, for a list of any length.
static void keep_many(const float* scores, int64_t begin, int64_t end, int64_t first, float* best, int32_t* keys,
                      int64_t top) {
  for (int64_t k = begin; k < end; k += kLanes)
    for (unsigned over = greater(load(scores + k), splat(best[top - 1])); over; over &= over - 1) {
      int lane = __builtin_ctz(over);
      if (scores[k + lane] > best[top - 1]) keep(best, keys, top, scores[k + lane], (int32_t)(first + k + lane));
    }
}

}  // namespace
}  // namespace sightline
