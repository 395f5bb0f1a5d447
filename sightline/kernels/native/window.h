// The weights of a window of queries and keys, pooled over squares: no softmax is left to do, for the logsumexp of the
// whole rows is known. One sweep, no values.
#pragma once

#include "facts.h"

namespace sightline {
namespace {

// A unit: rows of one head, whole rows of the map, so many that packing the keys does not count.
INLINE int64_t window_rows(const Call& call) { return round_up(16 * kRows, call.map_block); }

static int64_t window_units(const Call& call) {
  return call.batch * call.heads * ((call.queries + window_rows(call) - 1) / window_rows(call));
}

struct WindowScratch {
  Block block;
  float *keys, *scores;
};

static WindowScratch carve_window(Scratch& scratch, const Call& call, const Plan& plan) {
  WindowScratch own{carve_block(scratch, call, plan, window_rows(call)), nullptr, nullptr};
  own.block.from = From::packed;
  own.keys = scratch.floats(key_floats(call));
  own.scores = scratch.floats(kRows * kTile);
  return own;
}

static int64_t window_scratch(const Call& call) {
  Plan plan = {};
  Scratch count{nullptr};
  carve_window(count, call, plan);
  return count.used;
}

// Scores of a row for keys first + [left, right) become weights.
static void weigh_row(const Call& call, int64_t batch, const Row& row, int64_t first, int64_t left, int64_t right,
                      float logsumexp, float* line) {
  int64_t start = row.start - first, stop = row.stop - first;
  start = start < left ? left : start > right ? right : start;
  stop = stop < start ? start : stop > right ? right : stop;
  if (logsumexp == -kInfinity) stop = start;  // a row that sees nothing
  if (shapes_scores(call)) shape_row(call, batch, row, first, start, stop, line);
  for (int64_t k = left; k < start; ++k) line[k] = -kInfinity;
  for (int64_t k = stop; k < right; ++k) line[k] = -kInfinity;
  V shift = splat(stop > start ? logsumexp : 0);
  for (int64_t k = left; k < right; k += kLanes) store(line + k, exp(sub(load(line + k), shift)));
}

static void pool_window(const Call& call, int64_t unit, float* at) {
  Plan plan = {};
  Scratch scratch{at};
  auto [block, keys, scores] = carve_window(scratch, call, plan);
  int64_t bands = (call.queries + window_rows(call) - 1) / window_rows(call), band = unit % bands;
  int64_t head = unit / bands % call.heads, batch = unit / bands / call.heads, from, to;
  int64_t begin = band * window_rows(call), end = least(call.queries, begin + window_rows(call));
  clear_map(call, batch, head, begin, end);
  open_block(block, batch, head, begin, end - begin);
  tile_range(block, from, to);
  float ones[kRows];
  for (float& one : ones) one = 1;
  Given given = {};
  const float* logsumexp = call.logsumexp + (batch * call.heads + head) * call.queries + begin;
  for (int64_t tile = from; tile < to; ++tile) {
    int64_t first = tile * kTile;
    pack_as_columns(call.dtype, call.key, batch, head / (call.heads / call.groups), first,
                    least(kTile, call.keys - first), call.width, 1.0f, keys, kPanel);
    for (int64_t g = 0; g < block.row_groups; ++g) {
      Columns seen = seen_columns(block, g, tile);
      if (seen.begin >= seen.end) continue;
      int64_t left = seen.begin / kPanel * kPanel, right = round_up(seen.end, kPanel), top = first_of(block, g);
      int64_t count = first_of(block, g + 1) - top;
      multiply_in_chains<1, kRowStride>(count, query_of(block, g), keys + left * call.width, kPanel * call.width,
                                        call.width, scores + left, kTile, right - left);
      for (int64_t r = 0; r < count; ++r)
        weigh_row(call, batch, block.row[top + r], first, left, right, logsumexp[top + r], scores + r * kTile);
      add_weights(block, g, tile, seen, scores, ones, given, nullptr, 0);
    }
    give(block, tile, given, nullptr, 0);
  }
}

}  // namespace
}  // namespace sightline
