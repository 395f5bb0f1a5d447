// The softmax-and-see step: scores of a row group against a tile become exponentials, in place, and on the way the
// row facts fall out: they need what is in registers anyway. The output's arithmetic is the same with and without.
#pragma once

#include "moats.h"
#include "packing.h"

namespace sightline {
namespace {

constexpr float kInfinity = __builtin_inff();

// Carves a worker's scratch; without memory it only counts.
struct Scratch {
  float* at;
  int64_t used = 0;
  float* floats(int64_t n) {
    float* start = at ? at + used : nullptr;
    int64_t all = round_up(n, 16) + kMoat;
    used += all;
    if (at) dig_moat(start, n, all);
    return start;
  }
  int64_t* indices(int64_t n) { return (int64_t*)floats(2 * n); }
};

// What is known of each row of a block so far: the online softmax, and the facts in its terms. Sums over keys stay
// spread over kLanes numbers a row, added up once at the end.
struct State {
  float* largest;   // score
  float* inverse;   // of the total, once it is known
  float* total;     // sum of e^(s - largest)
  float* moment;    // sum of e^(s - largest) (s - largest): the entropy's part, without cancellation
  float* distance;  // sum of e^(s - largest) |query - key|
  float* sink;      // sum of e^(s - largest) over the first keys
  float* top_scores;
  int32_t* top_keys;
  float* sums;  // sum of e^(s - largest) value, padded to whole vectors
};

INLINE int64_t padded_values(const Call& call) { return round_up(call.value_width, kLanes); }

static State carve_state(Scratch& scratch, const Call& call, const Plan& plan, int64_t rows) {
  State state = {};
  state.largest = scratch.floats(rows);
  state.inverse = scratch.floats(rows);
  state.total = scratch.floats(rows * kLanes);
  if (plan.seeing) {
    state.moment = scratch.floats(rows * kLanes);
    state.distance = scratch.floats(rows * kLanes);
    state.sink = scratch.floats(rows);
    state.top_scores = scratch.floats(rows * call.top);
    state.top_keys = (int32_t*)scratch.floats(rows * call.top);
  }
  state.sums = scratch.floats(rows * padded_values(call));
  return state;
}

static void clear_state(State& state, const Call& call, const Plan& plan, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) state.largest[r] = -kInfinity;
  for (int64_t i = 0; i < rows * kLanes; i += kLanes) store(state.total + i, zero());
  if (plan.seeing) {
    for (int64_t r = 0; r < rows; ++r) state.sink[r] = 0;
    for (int64_t i = 0; i < rows * kLanes; i += kLanes)
      store(state.moment + i, zero()), store(state.distance + i, zero());
    for (int64_t i = 0; i < rows * call.top; ++i) state.top_scores[i] = -kInfinity, state.top_keys[i] = -1;
  }
  clear(state.sums, rows * padded_values(call));
}

// Where a row stands: its head and query, and the keys [start, stop) that its position and length let it see.
struct Row {
  int64_t head, query, position, start, stop;
};

static Row row_of(const Call& call, int64_t batch, int64_t head, int64_t row) {
  Row r;
  r.head = head + row / call.queries;
  r.query = row % call.queries;
  r.position = r.query + call.position;
  r.start = call.before == kNone ? 0 : most(0, r.position - call.before);
  r.stop = call.after == kNone ? call.keys : least(call.keys, r.position + call.after + 1);
  if (call.lengths) r.stop = least(r.stop, call.lengths[batch]);
  if (r.stop <= r.start) r.start = r.stop = 0;
  return r;
}

INLINE bool shapes_scores(const Call& call) {
  return call.softcap > 0 || call.slopes || call.bias.data || call.allowed.data;
}

// Soft cap, bias, slopes and `allowed` on the scores of one row, for keys first + [begin, end).
static void shape_row(const Call& call, int64_t batch, const Row& row, int64_t first, int64_t begin, int64_t end,
                      float* scores) {
  if (call.softcap > 0)
    for (int64_t k = begin / kLanes * kLanes; k < end; k += kLanes)
      store(scores + k, mul(tanh(div(load(scores + k), splat(call.softcap))), splat(call.softcap)));
  if (call.bias.data) {
    const Strided& bias = call.bias;
    const float* from = (const float*)bias.data + batch * bias.batch + row.head * bias.head + row.query * bias.row;
    from += first * bias.column;
    if (bias.column == 1) for (int64_t k = begin; k < end; ++k) scores[k] += from[k];
    else for (int64_t k = begin; k < end; ++k) scores[k] += from[k * bias.column];
  }
  if (call.slopes) {
    float slope = call.slopes[row.head];
    for (int64_t k = begin; k < end; ++k) {
      int64_t away = row.position - first - k;
      scores[k] -= slope * (float)(away < 0 ? -away : away);
    }
  }
  if (call.allowed.data) {
    const Strided& allowed = call.allowed;
    const uint8_t* from = (const uint8_t*)allowed.data + batch * allowed.batch + row.head * allowed.head;
    from += row.query * allowed.row + first * allowed.column;
    if (allowed.column == 1) for (int64_t k = begin; k < end; ++k) scores[k] = from[k] ? scores[k] : -kInfinity;
    else for (int64_t k = begin; k < end; ++k) scores[k] = from[k * allowed.column] ? scores[k] : -kInfinity;
  }
}

// Whether `allowed` lets any key first + [begin, end) be seen by the row.
static bool any_allowed(const Call& call, int64_t batch, const Row& row, int64_t first, int64_t begin, int64_t end) {
  const Strided& allowed = call.allowed;
  const uint8_t* from = (const uint8_t*)allowed.data + batch * allowed.batch + row.head * allowed.head;
  from += row.query * allowed.row + first * allowed.column;
  if (allowed.column == 0) return begin < end && *from;
  uint8_t any = 0;
  if (allowed.column == 1) for (int64_t k = begin; k < end; ++k) any |= from[k];
  else for (int64_t k = begin; k < end; ++k) any |= from[k * allowed.column];
  return any;
}

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

// The scores [begin, end) of a row, of keys first + [begin, end), against its list. `floor` is a score that at least
// `top` of them reach, or -infinity: it spares an empty list most of its insertions.
static void keep_top(const float* scores, int64_t begin, int64_t end, int64_t first, float floor, float* best,
                     int32_t* keys, int64_t top) {
#if defined(__AVX512F__)
  // The list stays in two registers: what is smaller than the new score moves up by a lane, without a branch.
  if (top <= kLanes) {
    const __m512i from_below = _mm512_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14);
    const __m512i last = _mm512_set1_epi32((int)top - 1);
    const __mmask16 all = (__mmask16)((1u << top) - 1);
    V list = _mm512_mask_loadu_ps(splat(-kInfinity), all, best), bar = _mm512_permutexvar_ps(last, list);
    __m512i list_keys = _mm512_maskz_loadu_epi32(all, keys);
    for (int64_t k = begin; k < end; k += kLanes) {
      V score = load(scores + k);
      unsigned high = _mm512_cmp_ps_mask(score, splat(floor), _CMP_GE_OQ);
      for (unsigned over = greater(score, bar) & high; over;) {
        int lane = __builtin_ctz(over);
        V x = splat(scores[k + lane]);
        __mmask16 less = _mm512_cmp_ps_mask(list, x, _CMP_LT_OQ), place = (__mmask16)(less & -less);
        list = _mm512_mask_permutexvar_ps(list, less, from_below, list);
        list_keys = _mm512_mask_permutexvar_epi32(list_keys, less, from_below, list_keys);
        list = _mm512_mask_mov_ps(list, place, x);
        list_keys = _mm512_mask_set1_epi32(list_keys, place, (int)(first + k + lane));
        bar = _mm512_permutexvar_ps(last, list);
        over = greater(score, bar) & high & (~1u << lane);
      }
    }
    _mm512_mask_storeu_ps(best, all, list);
    _mm512_mask_storeu_epi32(keys, all, list_keys);
    return;
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  // As above, in one register of 8: what is smaller moves up by a lane.
  if (top <= kLanes) {
    const __m256i from_below = _mm256_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6);
    const __m256i not_first = _mm256_setr_epi32(0, -1, -1, -1, -1, -1, -1, -1);
    const __m256i last = _mm256_set1_epi32((int)top - 1), all = first_lanes((int)top);
    V list = _mm256_blendv_ps(splat(-kInfinity), _mm256_maskload_ps(best, all), _mm256_castsi256_ps(all));
    V bar = _mm256_permutevar8x32_ps(list, last);
    __m256i list_keys = _mm256_maskload_epi32(keys, all);
    for (int64_t k = begin; k < end; k += kLanes) {
      V score = load(scores + k);
      unsigned high = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(score, splat(floor), _CMP_GE_OQ));
      for (unsigned over = greater(score, bar) & high; over;) {
        int lane = __builtin_ctz(over);
        V x = splat(scores[k + lane]);
        V less = _mm256_cmp_ps(list, x, _CMP_LT_OQ);
        __m256i smaller = _mm256_castps_si256(less);
        // Its place is the first smaller lane.
        __m256i below = _mm256_and_si256(_mm256_permutevar8x32_epi32(smaller, from_below), not_first);
        __m256i place = _mm256_andnot_si256(below, smaller);
        V moved = _mm256_blendv_ps(_mm256_permutevar8x32_ps(list, from_below), x, _mm256_castsi256_ps(place));
        __m256i key = _mm256_set1_epi32((int)(first + k + lane));
        __m256i moved_keys = _mm256_blendv_epi8(_mm256_permutevar8x32_epi32(list_keys, from_below), key, place);
        list = _mm256_blendv_ps(list, moved, less);
        list_keys = _mm256_blendv_epi8(list_keys, moved_keys, smaller);
        bar = _mm256_permutevar8x32_ps(list, last);
        over = greater(score, bar) & high & (~1u << lane);
      }
    }
    _mm256_maskstore_ps(best, all, list);
    _mm256_maskstore_epi32(keys, all, list_keys);
    return;
  }
#endif
  for (int64_t k = begin; k < end; k += kLanes)
    for (unsigned over = greater(load(scores + k), splat(best[top - 1])); over; over &= over - 1) {
      int lane = __builtin_ctz(over);
      float score = scores[k + lane];
      if (score > best[top - 1] && score >= floor) keep(best, keys, top, score, (int32_t)(first + k + lane));
    }
}

// The largest scores of the even vectors and of the odd ones, lane by lane; [begin, end) is whole panels.
struct Maxima {
  V even, odd;
};

static Maxima lane_maxima(const float* scores, int64_t begin, int64_t end) {
  V even = splat(-kInfinity), odd = even;
  for (int64_t k = begin; k < end; k += kPanel) {
    even = max(even, load(scores + k));
    odd = max(odd, load(scores + k + kLanes));
  }
  return {even, odd};
}

// A score that at least `top` scores reach: the least of as many maxima, where there are as many.
static float floor_of(const Maxima& maxima, int64_t top) {
  float each[2 * kLanes], least_of_them = kInfinity;
  store(each, maxima.even), store(each + kLanes, maxima.odd);
  int64_t count = 2 * kLanes;
  if (top > count) return -kInfinity;
  for (; count / 2 >= top; count /= 2)
    for (int64_t i = 0; i < count / 2; ++i) each[i] = each[i] > each[i + count / 2] ? each[i] : each[i + count / 2];
  for (int64_t i = 0; i < count; ++i) least_of_them = each[i] < least_of_them ? each[i] : least_of_them;
  return least_of_them;
}

struct Sums {
  V total, moment, distance;
};

// Scores [begin, end) of a row become exponentials, and with kPairs also their bf16 in `rounded`. `away` is the query's
// position less the tile's first key.
//
// Where no key lies after the query, |query - key| falls by kLanes from vector to vector, and the distance needs one
// addition a vector: the sum of the totals so far counts the u-th of n vectors n - u times.
template <bool kSeeing, bool kPairs>
static Sums exponentiate(float* scores, int64_t begin, int64_t end, float shift, float away, bfloat16* rounded) {
  V total = zero(), moment = zero(), distance = zero();
  auto step = [&](int64_t k) {
    V x = sub(load(scores + k), splat(shift));
    V p = exp(x);
    store(scores + k, p);
    if constexpr (kPairs) store(rounded + k, p);
    total = add(total, p);
    if constexpr (kSeeing) moment = fma(p, max(x, splat(-88.0f)), moment);  // 0 * -infinity would be NaN
    return p;
  };
  if constexpr (!kSeeing) {
    for (int64_t k = begin; k < end; k += kLanes) step(k);
    return {total, moment, distance};
  }
  float counted[kLanes];
  if (away >= (float)(end - 1)) {
    V totals = zero();
    for (int64_t k = begin; k < end; k += kLanes) {
      step(k);
      totals = add(totals, total);
    }
    for (int i = 0; i < kLanes; ++i) counted[i] = away - (float)(end + i);  // of a vector behind the last
    distance = fma(splat((float)kLanes), totals, mul(total, load(counted)));
    return {total, moment, distance};
  }
  for (int i = 0; i < kLanes; ++i) counted[i] = away - (float)(begin + i);
  V lane = load(counted);
  for (int64_t k = begin; k < end; k += kLanes) {
    V p = step(k);
    distance = fma(p, abs(lane), distance);
    lane = sub(lane, splat((float)kLanes));
  }
  return {total, moment, distance};
}

// A row's sums so far, relative to `was`, become relative to `now` by `factor` = e^(was - now) and get more.
template <bool kSeeing>
INLINE void join(const State& state, int64_t row, float was, float now, float factor, const Sums& more) {
  int64_t at = row * kLanes;
  V shrink = splat(factor), total = load(state.total + at);
  if constexpr (kSeeing) {
    V rise = splat(was == -kInfinity ? 0 : was - now);
    store(state.moment + at, fma(shrink, fma(rise, total, load(state.moment + at)), more.moment));
    store(state.distance + at, fma(shrink, load(state.distance + at), more.distance));
  }
  store(state.total + at, fma(shrink, total, more.total));
}

}  // namespace
}  // namespace sightline
