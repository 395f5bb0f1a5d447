// The units of work of a forward call (problem.h, Kernels): how blocks, bands and chunks are worked through.
#pragma once

#include "facts.h"

namespace sightline {
namespace {

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

static Strip lay_strip(const Call& call, const Plan& plan, float* memory) {
  return {memory, memory + tiles_of(call) * strip_tile(plan.block_rows)};
}

static void exchange(Block& one, Block& other) {
  auto swap = [](auto& a, auto& b) {
    auto was = a;
    a = b, b = was;
  };
  swap(one.batch, other.batch), swap(one.head, other.head), swap(one.first, other.first), swap(one.rows, other.rows);
  swap(one.row_groups, other.row_groups), swap(one.row, other.row), swap(one.query, other.query);
  swap(one.state, other.state);
}

static int64_t scratch_floats(const Call& call, const Plan& plan) {
  Scratch count{nullptr};
  for (int64_t blocks = plan.strip_kept ? 2 : 1; blocks > 0; --blocks) {
    carve_block(count, call, plan, plan.block_rows);
    carve_state(count, call, plan, plan.block_rows);
  }
  count.floats(key_floats(call) + value_floats(call) + kRows * kTile * 3 / 2);
  if (plan.strip_kept && plan.chunks == 1) count.floats(strip_floats(call, plan, tiles_of(call)));
  return count.used;
}

// A block's tile of the strip is distributed when the next block comes to that tile: a long strip, which no cache holds,
// is then read and written again in one go, and fetched while something is multiplied.
static void attend_bands(Block& block, Block& before, int64_t batch, int64_t head, int64_t share, float* memory,
                         const Strip& strip) {
  const Call& call = block.call;
  const Plan& plan = block.plan;
  float* received = nullptr;
  if (call.received) {
    received = plan.shared_received + ((batch * call.heads + head) * plan.shares + share) * call.keys;
    clear(received, call.keys);
  }
  int64_t from = 0, to = 0, from_before = 0, to_before = 0;  // tiles that the two blocks see
  auto sweep = [&] {
    for (int64_t tile = least(from, from_before); tile < most(to, to_before); ++tile) {
      if (tile >= from_before && tile < to_before) distribute(before, tile, strip, received, 0);
      if (tile >= from && tile < to) attend_all(block, tile, memory, strip);
    }
  };
  for (int64_t band = share; band < plan.bands; band += plan.shares) {
    int64_t first = band * plan.band_rows, last = least(first + plan.band_rows, call.queries);
    clear_map(call, batch, head, first, last);
    int64_t blocks = (last - first + plan.block_rows - 1) / plan.block_rows;
    for (int64_t i = 0; i < blocks; ++i) {
      int64_t begin = first + (last - first) * i / blocks, end = first + (last - first) * (i + 1) / blocks;
      open_block(block, batch, head, begin, end - begin);
      clear_state(block.state, call, plan, block.rows);
      tile_range(block, from, to);
      sweep();
      finish_rows(block);
      exchange(block, before);
      from_before = from, to_before = to;
    }
  }
  from = to = 0;
  sweep();
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
    Strip strip = {};
    if (plan.strip_kept)
      strip = lay_strip(call, plan, plan.strips + unit / plan.chunks * strip_floats(call, plan, tiles_of(call)));
    for (int64_t tile = from; tile < to; ++tile) attend_all(block, tile, memory, strip);
  } else if (plan.strip_kept) {
    Block before = carve_block(scratch, call, plan, plan.block_rows);
    before.state = carve_state(scratch, call, plan, plan.block_rows);
    Strip strip = lay_strip(call, plan, scratch.floats(strip_floats(call, plan, tiles_of(call))));
    int64_t share = unit % plan.shares, head = unit / plan.shares % call.heads;
    attend_bands(block, before, unit / plan.shares / call.heads, head, share, memory, strip);
  } else {
    // The last rows first: under a causal mask they are the longest.
    int64_t i = plan.blocks - 1 - unit % plan.blocks, head = unit / plan.blocks % folded;
    int64_t groups = row_groups_of(rows);  // whole ones a block, but for the last
    int64_t begin = groups * i / plan.blocks * kRows, end = least(rows, groups * (i + 1) / plan.blocks * kRows);
    open_block(block, unit / plan.blocks / folded, head * plan.fold, begin, end - begin);
    clear_state(block.state, call, plan, block.rows);
    tile_range(block, from, to);
    for (int64_t tile = from; tile < to; ++tile) attend_all(block, tile, memory, {});
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
      } else {
        join<false>(part, r, part.largest[r], now, keep_part, more);
        more.total = load(part.total + r * kLanes);
        join<false>(all, r, was, now, keep_all, more);
      }
      for (int64_t j = r * values; j < (r + 1) * values; j += kLanes)
        store(all.sums + j, fma(load(part.sums + j), splat(keep_part), mul(load(all.sums + j), splat(keep_all))));
      all.largest[r] = now;
    }
    float turns[kRowStride];
    for (float& each : turns) each = (float)call.top;
    for (int64_t i = 0; plan.seeing && i < places_of(call, rows); i += call.top * kRowStride)
      put_in(part.top_scores + i, part.top_keys + i, turns, all.top_scores + i, all.top_keys + i, call.top);
  }
  finish_rows(block);
  if (!plan.strip_kept) return;
  Strip strip = lay_strip(call, plan, plan.strips + unit * strip_floats(call, plan, tiles_of(call)));
  float* received = nullptr;
  for (int64_t head = block.head; head < block.head + plan.fold; ++head) clear_map(call, block.batch, head, 0, call.queries);
  if (call.received) {
    received = call.received + (block.batch * call.heads + block.head) * call.keys;
    clear(received, plan.fold * call.keys);
  }
  for (int64_t tile = 0; tile < tiles_of(call); ++tile) distribute(block, tile, strip, received, call.keys);
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
