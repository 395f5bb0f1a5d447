// A block of rows sweeps over tiles of keys, row group by row group. While a row group (kRows rows) meets a tile, its
// scores stay in L1 and keys and values stream from L2; the tile stays in L2 for the whole block.
#pragma once

#include "direct.h"
#include "dropout.h"
#include "largest.h"
#include "microkernel.h"

namespace sightline {
namespace {

// How a block meets keys and values.
enum class From {
  packed,  // panels of floats
  pairs,   // panels of pairs of bf16
  rows,    // the tensors' own rows
  rows_in_pairs,  // the same, of bf16, two numbers at a time
};

struct Block {
  const Call& call;
  const Plan& plan;
  int64_t batch, head;   // of the first row
  int64_t first, rows;   // rows [first, first + rows) of the folded head
  int64_t row_groups;
  Row* row;
  From from;
  float* query;  // (row group, width, kRowStride), scaled; in pairs (row group, width / 2, kRowStride), not scaled;
                 // for rows (row, width), scaled; for rows in pairs the same of bf16, not scaled
  State state;
};

INLINE int64_t first_of(const Block& block, int64_t row_group) { return block.rows * row_group / block.row_groups; }
INLINE int64_t tiles_of(const Call& call) { return (call.keys + kTile - 1) / kTile; }
INLINE int64_t strip_tile(int64_t rows) { return row_groups_of(rows) * kRows * kTile; }  // floats

static Block carve_block(Scratch& scratch, const Call& call, const Plan& plan, int64_t rows) {
  From from = reads_directly(call) ? in_pairs(call) ? From::rows_in_pairs : From::rows
              : in_pairs(call)     ? From::pairs
                                   : From::packed;
  Block block{call, plan, 0, 0, 0, 0, 0, nullptr, from, nullptr, {}};
  block.row = (Row*)scratch.indices(rows * (int64_t)(sizeof(Row) / 8));
  block.query = scratch.floats(row_groups_of(rows) * round_up(call.width, 2) * kRowStride);
  return block;
}

INLINE float* query_of(const Block& block, int64_t row_group) {
  return block.query + row_group * round_up(block.call.width, 2) * kRowStride;
}

static void open_block(Block& block, int64_t batch, int64_t head, int64_t first, int64_t rows) {
  const Call& call = block.call;
  block.batch = batch, block.head = head, block.first = first, block.rows = rows;
  block.row_groups = row_groups_of(rows);
  for (int64_t r = 0; r < rows; ++r) block.row[r] = row_of(call, batch, head, first + r);
  const Strided& query = call.query;
  by_dtype(call.dtype, query.data, [&](auto* data) {
    data += batch * query.batch;
    if (block.from == From::rows_in_pairs) {
      for (int64_t r = 0; r < rows; ++r)
        __builtin_memcpy((bfloat16*)block.query + r * call.width,
                         data + block.row[r].head * query.head + block.row[r].query * query.row,
                         sizeof(bfloat16) * (size_t)call.width);
      return;
    }
    if (block.from == From::rows) {
      for (int64_t r = 0; r < rows; ++r) {
        const auto* from = data + block.row[r].head * query.head + block.row[r].query * query.row;
        for (int64_t j = 0; j < call.width; j += kLanes)
          store(block.query + r * call.width + j, mul(load(from + j), splat(call.scale)));
      }
      return;
    }
    for (int64_t g = 0; g < block.row_groups; ++g) {
      int64_t begin = first_of(block, g), count = first_of(block, g + 1) - begin;
      const Row* row = block.row + begin;
      auto row_at = [&](int64_t i) { return data + row[i].head * query.head + row[i].query * query.row; };
      float* out = query_of(block, g);
#if defined(SIGHTLINE_DOT)
      if constexpr (sizeof(*data) == sizeof(bfloat16))
        if (block.from == From::pairs) {
          auto bits_at = [&](int64_t i) { return (const bfloat16*)row_at(i); };
          pack_pairs_transposed(bits_at, count, call.width, (Pair*)out, kRowStride, kRowStride);
          continue;
        }
#endif
      pack_transposed(row_at, count, call.width, call.scale, out, kRowStride, kRowStride);
    }
  });
}

// Tiles that some row of the block may see.
static void tile_range(const Block& block, int64_t& from, int64_t& to) {
  int64_t start = block.call.keys, stop = 0;
  for (int64_t r = 0; r < block.rows; ++r)
    if (block.row[r].start < block.row[r].stop)
      start = least(start, block.row[r].start), stop = most(stop, block.row[r].stop);
  from = start / kTile, to = (stop + kTile - 1) / kTile;
  if (from > to) from = to;
}

// The columns of a tile that some row of the group may see by position.
struct Columns {
  int64_t begin, end;
};

static Columns seen_columns(const Block& block, int64_t row_group, int64_t tile) {
  int64_t begin = kTile, end = 0;
  for (int64_t r = first_of(block, row_group); r < first_of(block, row_group + 1); ++r) {
    int64_t start = most(0, block.row[r].start - tile * kTile), stop = least(kTile, block.row[r].stop - tile * kTile);
    if (start < stop) begin = least(begin, start), end = most(end, stop);
  }
  return {begin, end};
}

// One row group meets one tile. `scores` is (kRows, kTile), and `rounded` for pairs; `used` gets the largest score
// that the exponentials left there are relative to, or infinity where the tile was skipped. `ahead`: the scores of the
// next tile.
template <bool kSeeing, From kFrom>
static void attend_tile(Block& block, int64_t row_group, int64_t tile, const float* keys, const float* values,
                        float* scores, bfloat16* rounded, float* used, const float* ahead) {
  const Call& call = block.call;
  const State& state = block.state;
  int64_t begin = first_of(block, row_group), count = first_of(block, row_group + 1) - begin, first = tile * kTile;
  const Row* row = block.row + begin;
  Columns seen = seen_columns(block, row_group, tile);
  bool any = seen.begin < seen.end;
  if (any && hides_keys(call)) {
    any = false;
    for (int64_t r = 0; r < count && !any; ++r)
      any = any_seen(call, block.batch, row[r], first, most(0, row[r].start - first),
                     least(kTile, row[r].stop - first));
  }
  if (!any) {
    for (int64_t r = 0; used && r < count; ++r) used[begin + r] = kInfinity;
    return;
  }
  int64_t left = seen.begin / kPanel * kPanel, right = round_up(seen.end, kPanel);
  int64_t group = block.head / (call.heads / call.groups);
#if defined(SIGHTLINE_DOT)
  if constexpr (kFrom == From::rows_in_pairs)
    score_directly(call, block.batch, group, (const bfloat16*)block.query + begin * call.width, count,
                   first + seen.begin, first + seen.end, scores + seen.begin);
#endif
  if constexpr (kFrom == From::rows)
    score_directly(call, block.batch, group, block.query + begin * call.width, count, first + seen.begin,
                   first + seen.end, scores + seen.begin);
#if defined(SIGHTLINE_DOT)
  if constexpr (kFrom == From::pairs) {
    int64_t steps = steps_of<Pair>(call.width);
    multiply<1, kRowStride, Into::times>(count, (const Pair*)query_of(block, row_group),
                                         (const Pair*)keys + left * steps, kPanel * steps, steps, scores + left, kTile,
                                         right - left, &call.scale);
  }
#endif
  if constexpr (kFrom == From::packed)
    multiply_in_chains<1, kRowStride>(count, query_of(block, row_group), keys + left * call.width,
                                      kPanel * call.width, call.width, scores + left, kTile, right - left,
                                      ahead ? ahead + left : nullptr);

  float largest[kRowStride], now[kRowStride], was[kRowStride], factor[kRowStride];
  Maxima maxima[kRows];
  for (int r = 0; r < kRowStride; ++r) now[r] = was[r] = 0;
  for (int64_t r = 0; r < count; ++r) {
    float* line = scores + r * kTile;
    int64_t start = row[r].start - first, stop = row[r].stop - first;
    start = start < left ? left : start > right ? right : start;
    stop = stop < start ? start : stop > right ? right : stop;
    if (shapes_scores(call)) shape_row(call, block.batch, row[r], first, start, stop, line);
    for (int64_t k = left; k < start; ++k) line[k] = -kInfinity;
    for (int64_t k = stop; k < right; ++k) line[k] = -kInfinity;
    maxima[r] = lane_maxima(line, left, right);
    const V* of = maxima[r].of;
    largest[r] = max_lanes(max(max(of[0], of[1]), max(of[2], of[3])));
    was[r] = state.largest[begin + r];
    now[r] = was[r] > largest[r] ? was[r] : largest[r];
  }
  if constexpr (kSeeing) {
    int64_t lists = row_group * call.top * kRowStride;
    if (call.top)
      keep_largest(scores, count, left, right, first, maxima, largest, state.top_scores + lists,
                   state.top_keys + lists, call.top);
  }
  for (int r = 0; r < kRowStride; r += kLanes) {
    V shift = load(now + r);
    shift = where_less(splat(-kInfinity), shift, shift, zero());  // nothing seen yet: -inf - -inf would be NaN
    store(factor + r, exp(sub(load(was + r), shift)));
  }
  constexpr bool kPairs = kFrom == From::pairs || kFrom == From::rows_in_pairs;
  bool kept = kSeeing ? used || first < call.sink_keys : call.dropped;  // exponentials are needed as floats too
  for (int64_t r = 0; r < count; ++r) {
    int64_t i = begin + r;
    float shift = now[r] == -kInfinity ? 0 : now[r];
    float away = (float)(row[r].position - first);
    float* line = scores + r * kTile;
    bfloat16* pairs = rounded + r * kTile;
    int64_t stop = row[r].stop - first;
    Sums sums = kept ? exponentiate<kSeeing, kPairs, true>(line, left, right, stop, shift, away, pairs)
                     : exponentiate<kSeeing, kPairs, !kPairs>(line, left, right, stop, shift, away, pairs);
    join<kSeeing>(state, i, was[r], now[r], factor[r], sums);
    if (!kSeeing && call.dropped)
      drop<kPairs>(call, block.batch, row[r], first, left, right, line, pairs);
    if constexpr (kSeeing) {
      float sink = 0;
      for (int64_t k = left; k < least(right, call.sink_keys - first); ++k) sink += scores[r * kTile + k];
      state.sink[i] = factor[r] * state.sink[i] + sink;
      if (used) used[i] = shift;
    }
    state.largest[i] = now[r];
  }
  float* sums = state.sums + begin * padded_values(call);
  if constexpr (kFrom == From::rows)
    weigh_directly(call, block.batch, group, scores, count, first, first + seen.begin, first + seen.end, factor, sums,
                   padded_values(call));
#if defined(SIGHTLINE_DOT)
  if constexpr (kFrom == From::rows_in_pairs)
    weigh_directly(call, block.batch, group, rounded, count, first, first + seen.begin, first + seen.end, factor, sums,
                   padded_values(call));
  if constexpr (kFrom == From::pairs)
    multiply<kTile / 2, 1, Into::scaled>(count, (const Pair*)rounded + left / 2,
                                         (const Pair*)values + left / 2 * kPanel, kTile / 2 * kPanel,
                                         (seen.end - left + 1) / 2, sums, padded_values(call), padded_values(call),
                                         factor);
#endif
  if constexpr (kFrom == From::packed)
    multiply<kTile, 1, Into::scaled>(count, scores + seen.begin, values + seen.begin * kPanel, kTile * kPanel,
                                     seen.end - seen.begin, sums, padded_values(call), padded_values(call), factor);
}

template <bool kSeeing>
static auto* tile_function(From from) {
  if (from == From::rows) return attend_tile<kSeeing, From::rows>;
#if defined(SIGHTLINE_DOT)
  if (from == From::rows_in_pairs) return attend_tile<kSeeing, From::rows_in_pairs>;
  if (from == From::pairs) return attend_tile<kSeeing, From::pairs>;
#endif
  return attend_tile<kSeeing, From::packed>;
}

// The exponentials of a block, kept until their sums are known: of each tile (row group, kRows, kTile), and of each row
// the largest score that they are relative to. No data: nothing is kept.
struct Strip {
  float *data, *largest;
};

INLINE float* strip_of(const Block& block, const Strip& strip, int64_t tile) {
  return strip.data + tile * strip_tile(block.plan.block_rows);
}

// The block against one tile. Keys and values come packed, or are packed here. Without a strip every tile uses the same
// memory.
static void attend_all(Block& block, int64_t tile, float* memory, const Strip& strip) {
  const Call& call = block.call;
  const Plan& plan = block.plan;
  auto* attend = plan.seeing ? tile_function<true>(block.from) : tile_function<false>(block.from);
  int64_t group = block.head / (call.heads / call.groups);
  bfloat16* rounded = (bfloat16*)(memory + kRows * kTile);
  float* keys = memory + kRows * kTile * 3 / 2;
  float* values = keys + key_floats(call);
  bool ready = plan.packed || reads_directly(call);
  if (plan.packed) {
    keys = plan.packed + (call.groups * block.batch + group) * plan.packed_group +
           tile * (key_floats(call) + value_floats(call));
    values = keys + key_floats(call);
  }
  float* used = strip.data ? strip.largest + tile * plan.block_rows : nullptr;
  bool last = tile + 1 == tiles_of(call);
  for (int64_t g = 0; g < block.row_groups; ++g) {
    if (!ready) {
      Columns seen = seen_columns(block, g, tile);
      if (seen.begin < seen.end) {
        pack_tile(call, block.batch, group, tile, keys, values);
        ready = true;
      }
    }
    float* scores = strip.data ? strip_of(block, strip, tile) + g * kRows * kTile : memory;
    const float* ahead = strip.data && !last ? strip_of(block, strip, tile + 1) + g * kRows * kTile : nullptr;
    attend(block, g, tile, keys, values, scores, rounded, used, ahead);
  }
}

}  // namespace
}  // namespace sightline
