// The forward: a block of rows sweeps over tiles of keys, row group by row group. While a row group (kRows rows)
// meets a tile, its scores stay in L1 and keys and values stream from L2; the tile stays in L2 for the whole block.
#pragma once

#include "microkernel.h"
#include "softmax.h"

namespace sightline {
namespace {

struct Block {
  const Call& call;
  const Plan& plan;
  int64_t batch, head;   // of the first row
  int64_t first, rows;   // rows [first, first + rows) of the folded head
  int64_t row_groups;
  Row* row;
  float* query;  // (row group, width, kRowStride), scaled; in pairs (row group, width / 2, kRowStride), not scaled
  State state;
};

INLINE int64_t row_groups_of(int64_t rows) { return (rows + kRows - 1) / kRows; }
INLINE int64_t first_of(const Block& block, int64_t row_group) { return block.rows * row_group / block.row_groups; }
INLINE int64_t tiles_of(const Call& call) { return (call.keys + kTile - 1) / kTile; }
INLINE int64_t strip_tile(int64_t rows) { return row_groups_of(rows) * kRows * kTile; }  // floats

static Block carve_block(Scratch& scratch, const Call& call, const Plan& plan, int64_t rows) {
  Block block{call, plan, 0, 0, 0, 0, 0, nullptr, nullptr, {}};
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
    for (int64_t g = 0; g < block.row_groups; ++g) {
      int64_t begin = first_of(block, g), count = first_of(block, g + 1) - begin;
      const Row* row = block.row + begin;
      auto row_at = [&](int64_t i) { return data + row[i].head * query.head + row[i].query * query.row; };
      float* out = query_of(block, g);
#if defined(SIGHTLINE_DOT)
      if constexpr (sizeof(*data) == sizeof(bfloat16))
        if (in_pairs(call)) {
          auto bits_at = [&](int64_t i) { return (const bfloat16*)row_at(i); };
          pack_pairs_transposed(bits_at, count, call.width, (Pair*)out, kRowStride, kRowStride);
          continue;
        }
#endif
      pack_transposed(row_at, count, call.width, call.scale, out, kRowStride, kRowStride);
    }
  });
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

// One row group meets one tile. `scores` is (kRows, kTile), and `rounded` for kPairs; `used` gets the largest score
// that the exponentials left there are relative to, or infinity where the tile was skipped.
template <bool kSeeing, bool kPairs>
static void attend_tile(Block& block, int64_t row_group, int64_t tile, const float* keys, const float* values,
                        float* scores, bfloat16* rounded, float* used) {
  const Call& call = block.call;
  const State& state = block.state;
  int64_t begin = first_of(block, row_group), count = first_of(block, row_group + 1) - begin, first = tile * kTile;
  const Row* row = block.row + begin;
  Columns seen = seen_columns(block, row_group, tile);
  bool any = seen.begin < seen.end;
  if (any && call.allowed.data) {
    any = false;
    for (int64_t r = 0; r < count && !any; ++r)
      any = any_allowed(call, block.batch, row[r], first, most(0, row[r].start - first),
                        least(kTile, row[r].stop - first));
  }
  if (!any) {
    for (int64_t r = 0; used && r < count; ++r) used[begin + r] = kInfinity;
    return;
  }
  int64_t left = seen.begin / kPanel * kPanel, right = round_up(seen.end, kPanel);
#if defined(SIGHTLINE_DOT)
  if constexpr (kPairs) {
    int64_t steps = (call.width + 1) / 2;
    multiply<1, kRowStride, Into::times>(count, (const Pair*)query_of(block, row_group),
                                         (const Pair*)keys + left * steps, kPanel * steps, steps, scores + left, kTile,
                                         right - left, &call.scale);
  }
#endif
  if constexpr (!kPairs)
    multiply_in_chains<1, kRowStride>(count, query_of(block, row_group), keys + left * call.width,
                                      kPanel * call.width, call.width, scores + left, kTile, right - left);

  float now[kRowStride], was[kRowStride], factor[kRowStride];
  for (int r = 0; r < kRowStride; ++r) now[r] = was[r] = 0;
  for (int64_t r = 0; r < count; ++r) {
    float* line = scores + r * kTile;
    int64_t start = row[r].start - first, stop = row[r].stop - first;
    start = start < left ? left : start > right ? right : start;
    stop = stop < start ? start : stop > right ? right : stop;
    if (shapes_scores(call)) shape_row(call, block.batch, row[r], first, start, stop, line);
    for (int64_t k = left; k < start; ++k) line[k] = -kInfinity;
    for (int64_t k = stop; k < right; ++k) line[k] = -kInfinity;
    V maxima = lane_maxima(line, left, right);
    float largest = max_lanes(maxima);
    if constexpr (kSeeing) {
      float* best = state.top_scores + (begin + r) * call.top;
      if (call.top && largest > best[call.top - 1]) {
        float floor = best[call.top - 1] == -kInfinity ? floor_of(maxima, call.top) : -kInfinity;
        keep_top(line, left, right, first, floor, best, state.top_keys + (begin + r) * call.top, call.top);
      }
    }
    was[r] = state.largest[begin + r];
    now[r] = was[r] > largest ? was[r] : largest;
  }
  for (int r = 0; r < kRowStride; r += kLanes) {
    V shift = load(now + r);
    shift = where_less(splat(-kInfinity), shift, shift, zero());  // nothing seen yet: -inf - -inf would be NaN
    store(factor + r, exp(sub(load(was + r), shift)));
  }
  for (int64_t r = 0; r < count; ++r) {
    int64_t i = begin + r;
    float shift = now[r] == -kInfinity ? 0 : now[r];
    Sums sums = exponentiate<kSeeing, kPairs>(scores + r * kTile, left, right, shift,
                                              (float)(row[r].position - first), rounded + r * kTile);
    join<kSeeing>(state, i, was[r], now[r], factor[r], sums);
    if constexpr (kSeeing) {
      float sink = 0;
      for (int64_t k = left; k < least(right, call.sink_keys - first); ++k) sink += scores[r * kTile + k];
      state.sink[i] = factor[r] * state.sink[i] + sink;
      if (used) used[i] = shift;
    }
    state.largest[i] = now[r];
  }
  float* sums = state.sums + begin * padded_values(call);
#if defined(SIGHTLINE_DOT)
  if constexpr (kPairs)
    multiply<kTile / 2, 1, Into::scaled>(count, (const Pair*)rounded + left / 2,
                                         (const Pair*)values + left / 2 * kPanel, kTile / 2 * kPanel,
                                         (seen.end - left + 1) / 2, sums, padded_values(call), padded_values(call),
                                         factor);
#endif
  if constexpr (!kPairs)
    multiply<kTile, 1, Into::scaled>(count, scores + seen.begin, values + seen.begin * kPanel, kTile * kPanel,
                                     seen.end - seen.begin, sums, padded_values(call), padded_values(call), factor);
}

// The block against tiles [from, to). Keys and values come packed, or are packed here tile by tile. With a strip
// (tile, row group, kRows, kTile) the exponentials are kept there, else every tile uses the same memory.
static void attend_tiles(Block& block, int64_t from, int64_t to, float* memory, float* strip, float* used) {
  const Call& call = block.call;
  const Plan& plan = block.plan;
  int64_t group = block.head / (call.heads / call.groups);
  float* own_scores = memory;
  bfloat16* rounded = (bfloat16*)(own_scores + kRows * kTile);
  float* own_keys = own_scores + kRows * kTile * 3 / 2;
  float* own_values = own_keys + key_floats(call);
  for (int64_t tile = from; tile < to; ++tile) {
    float* keys = own_keys;
    float* values = own_values;
    bool ready = plan.packed;
    if (ready) {
      keys = plan.packed + (call.groups * block.batch + group) * plan.packed_group +
             tile * (key_floats(call) + value_floats(call));
      values = keys + key_floats(call);
    }
    for (int64_t g = 0; g < block.row_groups; ++g) {
      float* scores = strip ? strip + (tile - from) * strip_tile(block.rows) + g * kRows * kTile : own_scores;
      float* used_here = used ? used + (tile - from) * block.rows : nullptr;
      if (!ready) {
        Columns seen = seen_columns(block, g, tile);
        if (seen.begin < seen.end) {
          pack_tile(call, block.batch, group, tile, keys, values);
          ready = true;
        }
      }
      if (in_pairs(call)) {
        if (plan.seeing) attend_tile<true, kDot>(block, g, tile, keys, values, scores, rounded, used_here);
        else attend_tile<false, kDot>(block, g, tile, keys, values, scores, rounded, used_here);
      } else {
        if (plan.seeing) attend_tile<true, false>(block, g, tile, keys, values, scores, rounded, used_here);
        else attend_tile<false, false>(block, g, tile, keys, values, scores, rounded, used_here);
      }
    }
  }
}

// The sink joins the sum, and every row's output and facts are written. State keeps largest and total for the strip.
static void finish_rows(Block& block) {
  const Call& call = block.call;
  const State& state = block.state;
  const Strided& output = call.output;
  for (int64_t r = 0; r < block.rows; ++r) {
    const Row& row = block.row[r];
    float shrink = 1, total = sum_lanes(load(state.total + r * kLanes)), largest = state.largest[r], seen = total;
    float moment = block.plan.seeing ? sum_lanes(load(state.moment + r * kLanes)) : 0;
    if (call.sinks) {
      float sink = call.sinks[row.head];
      float now = largest > sink ? largest : sink;
      if (now > -kInfinity || now != now) {
        shrink = exp(largest - now);
        if (largest > -kInfinity) moment = shrink * (moment + (largest - now) * total);
        seen = shrink * total;
        total = seen + exp(sink - now);
        largest = now;
      }
    }
    float inverse = total == 0 ? 0 : 1 / total;
    state.largest[r] = largest, state.inverse[r] = inverse;
    int64_t at = (block.batch * call.heads + row.head) * call.queries + row.query;
    float log_total = total == 0 ? 0 : __builtin_logf(total);
    call.logsumexp[at] = total == 0 ? -kInfinity : largest + log_total;
    const float* sums = state.sums + r * padded_values(call);
    by_dtype(call.dtype, output.data, [&](auto* data) {
      auto* out = writable(data);
      out += block.batch * output.batch + row.head * output.head + row.query * output.row;
      for (int64_t j = 0; j < call.value_width; j += kLanes) {
        int wide = (int)least(kLanes, call.value_width - j);
        V x = mul(load(sums + j), splat(shrink * inverse));
        if (wide == kLanes) store(out + j, x);
        else store_some(out + j, x, wide);
      }
    });
    if (!block.plan.seeing) continue;
    float entropy = seen * inverse * log_total - moment * inverse;
    call.entropy[at] = entropy < 0 ? 0 : entropy;
    call.distance[at] = sum_lanes(load(state.distance + r * kLanes)) * shrink * inverse;
    call.sink[at] = state.sink[r] * shrink * inverse;
    for (int64_t i = 0; i < call.top; ++i) {
      int32_t key = state.top_keys[r * call.top + i];
      call.top_keys[at * call.top + i] = key;
      call.top_weights[at * call.top + i] =
          key < 0 ? 0 : exp(state.top_scores[r * call.top + i] - largest) * inverse;
    }
  }
}

// Adds one line of weights, summed and maximised over queries of one row of the map, to its blocks of keys.
static void pool(const Call& call, int64_t at, int64_t first, int64_t begin, int64_t end, const float* sums,
                 const float* largest) {
  for (int64_t k = begin; k < end;) {
    int64_t block = (first + k) / call.map_block, stop = least(end, (block + 1) * call.map_block - first);
    V sum = zero(), most_seen = zero();
    for (; k + kLanes <= stop; k += kLanes) {
      sum = add(sum, load(sums + k));
      most_seen = max(most_seen, load(largest + k));
    }
    if (k < stop) {
      sum = add(sum, load_some(sums + k, (int)(stop - k)));
      most_seen = max(most_seen, load_some(largest + k, (int)(stop - k)));
      k = stop;
    }
    float top = max_lanes(most_seen);
    call.map_sum[at + block] += sum_lanes(sum);
    if (top > call.map_max[at + block]) call.map_max[at + block] = top;
  }
}

// The strip's exponentials become weights, now that each row's sum is known, and are added to what each key received
// and to the map. `received` belongs to the rows' first head; rows of later heads follow `next_head` floats on.
static void distribute(Block& block, int64_t from, int64_t to, const float* strip, const float* used, float* received,
                       int64_t next_head) {
  const Call& call = block.call;
  const State& state = block.state;
  int64_t map_rows = call.map_block ? (call.queries + call.map_block - 1) / call.map_block : 0;
  int64_t map_columns = call.map_block ? (call.keys + call.map_block - 1) / call.map_block : 0;
  float sums[kTile + kLanes], largest[kTile + kLanes];
  for (int64_t tile = from; tile < to; ++tile)
    for (int64_t g = 0; g < block.row_groups; ++g) {
      Columns seen = seen_columns(block, g, tile);
      int64_t begin = first_of(block, g), end = first_of(block, g + 1);
      const float* used_here = used + (tile - from) * block.rows;
      if (seen.begin >= seen.end || used_here[begin] == kInfinity) continue;
      int64_t left = seen.begin / kPanel * kPanel, right = round_up(seen.end, kPanel);
      const float* weights = strip + (tile - from) * strip_tile(block.rows) + g * kRows * kTile;
      for (int64_t r = begin; r < end;) {
        // Rows [r, stop) are of one head, and of one row of the map.
        int64_t head = block.row[r].head, map_row = call.map_block ? block.row[r].query / call.map_block : 0;
        float factor[kRows];
        int64_t count = 0;
        for (; r + count < end; ++count) {
          const Row& row = block.row[r + count];
          if (row.head != head || (call.map_block && row.query / call.map_block != map_row)) break;
          float inverse = state.inverse[r + count];
          factor[count] = inverse == 0 ? 0 : exp(used_here[r + count] - state.largest[r + count]) * inverse;
        }
        const float* line = weights + (r - begin) * kTile;
        float* to_keys = received ? received + (head - block.head) * next_head + tile * kTile : nullptr;
        for (int64_t k = left; k < right; k += kLanes) {
          V sum = zero(), most_seen = zero();
          for (int64_t i = 0; i < count; ++i) {
            V weight = mul(load(line + i * kTile + k), splat(factor[i]));
            sum = add(sum, weight);
            most_seen = max(most_seen, weight);
          }
          store(sums + k, sum);
          store(largest + k, most_seen);
        }
        if (to_keys) {
          int64_t k = left, stop = least(right, call.keys - tile * kTile);
          for (; k + kLanes <= stop; k += kLanes) store(to_keys + k, add(load(to_keys + k), load(sums + k)));
          for (; k < stop; ++k) to_keys[k] += sums[k];
        }
        if (call.map_block) {
          int64_t at = ((block.batch * call.heads + head) * map_rows + map_row) * map_columns;
          pool(call, at, tile * kTile, left, least(right, call.keys - tile * kTile), sums, largest);
        }
        r += count;
      }
    }
}

static void clear_map(const Call& call, int64_t batch, int64_t head, int64_t first_query, int64_t last_query) {
  if (!call.map_block) return;
  int64_t map_rows = (call.queries + call.map_block - 1) / call.map_block;
  int64_t map_columns = (call.keys + call.map_block - 1) / call.map_block;
  int64_t first = first_query / call.map_block, last = (last_query + call.map_block - 1) / call.map_block;
  int64_t at = ((batch * call.heads + head) * map_rows + first) * map_columns;
  clear(call.map_sum + at, (last - first) * map_columns);
  clear(call.map_max + at, (last - first) * map_columns);
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

// ---- the units of work (problem.h, Kernels) ----

static int64_t packed_group(const Call& call) { return tiles_of(call) * (key_floats(call) + value_floats(call)); }

static void pack(const Call& call, const Plan& plan, int64_t unit) {
  int64_t tiles = tiles_of(call), tile = unit % tiles, group = unit / tiles % call.groups;
  int64_t batch = unit / tiles / call.groups;
  float* out = plan.packed + (batch * call.groups + group) * plan.packed_group;
  out += tile * (key_floats(call) + value_floats(call));
  pack_tile(call, batch, group, tile, out, out + key_floats(call));
}

static int64_t partial_state(const Call& call, const Plan& plan) {
  Scratch count{nullptr};
  carve_state(count, call, plan, plan.fold * call.queries);
  return count.used;
}

// Floats of a strip over so many tiles, for a block of plan.block_rows, with the largest scores it is relative to.
static int64_t strip_floats(const Call& call, const Plan& plan, int64_t tiles) {
  (void)call;
  return tiles * (strip_tile(plan.block_rows) + round_up(plan.block_rows, 16));
}

static int64_t scratch_floats(const Call& call, const Plan& plan) {
  Scratch count{nullptr};
  carve_block(count, call, plan, plan.block_rows);
  carve_state(count, call, plan, plan.block_rows);
  count.floats(key_floats(call) + value_floats(call) + kRows * kTile * 3 / 2);
  if (plan.strip_kept && plan.chunks == 1) count.floats(strip_floats(call, plan, tiles_of(call)));
  return count.used;
}

static void attend_bands(Block& block, int64_t batch, int64_t head, int64_t share, float* memory, float* strip) {
  const Call& call = block.call;
  const Plan& plan = block.plan;
  float* used = strip + tiles_of(call) * strip_tile(plan.block_rows);
  float* received = nullptr;
  if (call.received) {
    received = plan.shared_received + ((batch * call.heads + head) * plan.shares + share) * call.keys;
    clear(received, call.keys);
  }
  for (int64_t band = share; band < plan.bands; band += plan.shares) {
    int64_t first = band * plan.band_rows, last = least(first + plan.band_rows, call.queries);
    clear_map(call, batch, head, first, last);
    int64_t blocks = (last - first + plan.block_rows - 1) / plan.block_rows;
    for (int64_t i = 0; i < blocks; ++i) {
      int64_t begin = first + (last - first) * i / blocks, end = first + (last - first) * (i + 1) / blocks, from, to;
      open_block(block, batch, head, begin, end - begin);
      clear_state(block.state, call, plan, block.rows);
      tile_range(block, from, to);
      attend_tiles(block, from, to, memory, strip, used);
      finish_rows(block);
      distribute(block, from, to, strip, used, received, 0);
    }
  }
}

static void attend(const Call& call, const Plan& plan, int64_t unit, float* at) {
  Scratch scratch{at};
  Block block = carve_block(scratch, call, plan, plan.block_rows);
  block.state = carve_state(scratch, call, plan, plan.block_rows);
  float* memory = scratch.floats(key_floats(call) + value_floats(call) + kRows * kTile * 3 / 2);
  int64_t folded = call.heads / plan.fold, rows = plan.fold * call.queries, from, to;
  if (plan.chunks > 1) {
    int64_t chunk = unit % plan.chunks, head = unit / plan.chunks % folded, batch = unit / plan.chunks / folded;
    Scratch partial{plan.partial + unit * plan.partial_state};
    block.state = carve_state(partial, call, plan, rows);
    open_block(block, batch, head * plan.fold, 0, rows);
    clear_state(block.state, call, plan, rows);
    from = chunk * plan.chunk_tiles, to = least(tiles_of(call), from + plan.chunk_tiles);
    float *strip = nullptr, *used = nullptr;
    if (plan.strip_kept) {
      strip = plan.strips + unit / plan.chunks * strip_floats(call, plan, tiles_of(call));
      used = strip + tiles_of(call) * strip_tile(rows) + from * rows;
      strip += from * strip_tile(rows);
    }
    attend_tiles(block, from, to, memory, strip, used);
  } else if (plan.strip_kept) {
    float* strip = scratch.floats(strip_floats(call, plan, tiles_of(call)));
    int64_t share = unit % plan.shares, head = unit / plan.shares % call.heads;
    attend_bands(block, unit / plan.shares / call.heads, head, share, memory, strip);
  } else {
    // The last rows first: under a causal mask they are the longest.
    int64_t i = plan.blocks - 1 - unit % plan.blocks, head = unit / plan.blocks % folded;
    int64_t begin = rows * i / plan.blocks, end = rows * (i + 1) / plan.blocks;
    open_block(block, unit / plan.blocks / folded, head * plan.fold, begin, end - begin);
    clear_state(block.state, call, plan, block.rows);
    tile_range(block, from, to);
    attend_tiles(block, from, to, memory, nullptr, nullptr);
    finish_rows(block);
  }
}

// Chunks of keys become one: the same algebra as between tiles.
static void merge(const Call& call, const Plan& plan, int64_t unit, float* at) {
  Scratch scratch{at};
  Block block = carve_block(scratch, call, plan, plan.block_rows);
  block.state = carve_state(scratch, call, plan, plan.block_rows);
  int64_t folded = call.heads / plan.fold, rows = plan.fold * call.queries, values = padded_values(call);
  open_block(block, unit / folded, unit % folded * plan.fold, 0, rows);
  clear_state(block.state, call, plan, rows);
  State& all = block.state;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    Scratch partial{plan.partial + (unit * plan.chunks + chunk) * plan.partial_state};
    State part = carve_state(partial, call, plan, rows);
    for (int64_t r = 0; r < rows; ++r) {
      float was = all.largest[r], now = was > part.largest[r] ? was : part.largest[r];
      float shift = now == -kInfinity ? 0 : now;
      float keep_all = exp(was - shift), keep_part = exp(part.largest[r] - shift);
      // What a part adds is brought to the new largest score first; a part of NaN stays NaN, since 0 * NaN is NaN.
      Sums more = {zero(), zero(), zero()};
      if (plan.seeing) {
        join<true>(part, r, part.largest[r], now, keep_part, more);
        more = {load(part.total + r * kLanes), load(part.moment + r * kLanes), load(part.distance + r * kLanes)};
        join<true>(all, r, was, now, keep_all, more);
        all.sink[r] = keep_all * all.sink[r] + keep_part * part.sink[r];
        for (int64_t i = r * call.top; i < (r + 1) * call.top; ++i)
          if (part.top_scores[i] > all.top_scores[(r + 1) * call.top - 1])
            keep(all.top_scores + r * call.top, all.top_keys + r * call.top, call.top, part.top_scores[i],
                 part.top_keys[i]);
      } else {
        join<false>(part, r, part.largest[r], now, keep_part, more);
        more.total = load(part.total + r * kLanes);
        join<false>(all, r, was, now, keep_all, more);
      }
      for (int64_t j = r * values; j < (r + 1) * values; j += kLanes)
        store(all.sums + j, fma(load(part.sums + j), splat(keep_part), mul(load(all.sums + j), splat(keep_all))));
      all.largest[r] = now;
    }
  }
  finish_rows(block);
  if (!plan.strip_kept) return;
  float* strip = plan.strips + unit * strip_floats(call, plan, tiles_of(call));
  float* received = nullptr;
  for (int64_t head = block.head; head < block.head + plan.fold; ++head) clear_map(call, block.batch, head, 0, call.queries);
  if (call.received) {
    received = call.received + (block.batch * call.heads + block.head) * call.keys;
    clear(received, plan.fold * call.keys);
  }
  distribute(block, 0, tiles_of(call), strip, strip + tiles_of(call) * strip_tile(rows), received, call.keys);
}

// What each share of the queries gave to a head's keys, added in order.
static void gather(const Call& call, const Plan& plan, int64_t unit) {
  const float* from = plan.shared_received + unit * plan.shares * call.keys;
  float* to = call.received + unit * call.keys;
  for (int64_t k = 0; k < call.keys; ++k) {
    float sum = from[k];
    for (int64_t share = 1; share < plan.shares; ++share) sum += from[share * call.keys + k];
    to[k] = sum;
  }
}

}  // namespace
}  // namespace sightline
