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
  float* top_scores;  // the largest, in falling order: (row group, place, kRowStride)
  int32_t* top_keys;
  float* sums;  // sum of e^(s - largest) value, padded to whole vectors
};

INLINE int64_t row_groups_of(int64_t rows) { return (rows + kRows - 1) / kRows; }
INLINE int64_t places_of(const Call& call, int64_t rows) { return row_groups_of(rows) * call.top * kRowStride; }
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
    state.top_scores = scratch.floats(places_of(call, rows));
    state.top_keys = (int32_t*)scratch.floats(places_of(call, rows));
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
    for (int64_t i = 0; i < places_of(call, rows); ++i) state.top_scores[i] = -kInfinity, state.top_keys[i] = -1;
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
  if (call.spans) {
    const int64_t* span = call.spans + 2 * (batch * call.queries + r.query);
    r.start = most(r.start, span[0]), r.stop = least(r.stop, span[1]);
  }
  if (r.stop <= r.start) r.start = r.stop = 0;
  return r;
}

INLINE bool hides_keys(const Call& call) { return call.allowed.data || call.segments; }  // within [start, stop)
INLINE bool shapes_scores(const Call& call) {
  return call.softcap > 0 || call.slopes || call.bias.data || hides_keys(call);
}

// The numbers of a row's keys, from key 0 on, and its own.
struct Segment {
  const int64_t* of;
  int64_t own;
};

INLINE Segment segment_of(const Call& call, int64_t batch, const Row& row) {
  const int64_t* numbers = call.segments + batch * (call.queries + call.keys);
  return {numbers + call.queries, numbers[row.query]};
}

// Soft cap, bias, slopes, `allowed` and segments on the scores of one row, for keys first + [begin, end).
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
  if (call.segments) {
    Segment segment = segment_of(call, batch, row);
    for (int64_t k = begin; k < end; ++k) scores[k] = segment.of[first + k] == segment.own ? scores[k] : -kInfinity;
  }
}

// Whether `allowed` and segments, each for itself, let any key first + [begin, end) be seen by the row.
static bool any_seen(const Call& call, int64_t batch, const Row& row, int64_t first, int64_t begin, int64_t end) {
  if (call.segments) {
    Segment segment = segment_of(call, batch, row);
    bool own = false;
    for (int64_t k = begin; k < end; ++k) own |= segment.of[first + k] == segment.own;
    if (!own || !call.allowed.data) return own;
  }
  const Strided& allowed = call.allowed;
  const uint8_t* from = (const uint8_t*)allowed.data + batch * allowed.batch + row.head * allowed.head;
  from += row.query * allowed.row + first * allowed.column;
  if (allowed.column == 0) return begin < end && *from;
  uint8_t any = 0;
  if (allowed.column == 1) for (int64_t k = begin; k < end; ++k) any |= from[k];
  else for (int64_t k = begin; k < end; ++k) any |= from[k * allowed.column];
  return any;
}

struct Sums {
  V total, moment, distance;
};

// Scores [begin, end) of a row, whole panels, become exponentials: in place with kKept, as bf16 in `rounded` with
// kPairs. `away` is the query's position less the tile's first key; from `stop` on nothing is seen.
//
// Where no key that is seen lies after the query, |query - key| falls by kLanes from vector to vector, and the distance
// needs one addition a vector: the sum of the totals so far counts the u-th of n vectors n - u times. Where all keys lie
// at least kTile after it, the same with the sign turned.
template <bool kSeeing, bool kPairs, bool kKept>
static Sums exponentiate(float* scores, int64_t begin, int64_t end, int64_t stop, float shift, float away,
                         bfloat16* rounded) {
  V total = zero(), moment = zero(), distance = zero();
  auto step = [&](int64_t k, [[maybe_unused]] auto near) {
    V x, p;
    if constexpr (kPairs) {
#if defined(SIGHTLINE_DOT)
      x = exponent_of_two<decltype(near)::value>(load(scores + k), shift);
      if constexpr (kSeeing) x = max(splat(kLeastExponent * kLog2E), x);  // 0 * -infinity would be NaN
      p = exp2(x);
#endif
    } else {
      x = max(splat(kLeastExponent), sub(load(scores + k), splat(shift)));
      p = exp(x);
    }
    if constexpr (kKept) store(scores + k, p);
    total = add(total, p);
    if constexpr (kSeeing) moment = fma(p, x, moment);
    return p;
  };
  auto sweep_so = [&](auto see, auto near) {
    for (int64_t k = begin; k < end; k += kPanel) {
      V p = step(k, near);
      see(p);
      V q = step(k + kLanes, near);
      see(q);
      if constexpr (kPairs) store(rounded + k, p, q);
    }
  };
  auto sweep = [&](auto see) {
    if constexpr (!kPairs) return sweep_so(see, Constant<0>{});
    if (-kNearShift <= shift && shift <= kNearShift) sweep_so(see, Constant<kPairs>{});
    else sweep_so(see, Constant<0>{});
    moment = mul(moment, splat(1 / kLog2E));
  };
  if constexpr (!kSeeing) {
    sweep([](V) {});
    return {total, moment, distance};
  }
  float counted[kLanes];
  bool after = away + kTile <= (float)begin;
  if (after || away >= (float)(least(stop, end) - 1)) {
    V totals = zero();
    sweep([&](V) { totals = add(totals, total); });
    for (int i = 0; i < kLanes; ++i) counted[i] = away - (float)(end + i);  // of a vector behind the last
    distance = fma(splat((float)kLanes), totals, mul(total, load(counted)));
    if (after) distance = sub(zero(), distance);
    return {total, moment, distance};
  }
  for (int i = 0; i < kLanes; ++i) counted[i] = away - (float)(begin + i);
  V lane = load(counted);
  sweep([&](V p) {
    distance = fma(p, abs(lane), distance);
    lane = sub(lane, splat((float)kLanes));
  });
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
