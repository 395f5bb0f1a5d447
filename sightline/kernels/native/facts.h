// From what a block has gathered to what leaves it: rows are finished, and the exponentials that were kept become
// weights, which are added to what each key received and to the map.
#pragma once

#include "block.h"

namespace sightline {
namespace {

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

// One row group's numbers against one tile, `weights` of (row, key), become weights by a factor a row, and are added to
// what each key received and to the map. `received` belongs to the rows' first head; rows of later heads follow
// `next_head` floats on.
static void add_weights(Block& block, int64_t row_group, int64_t tile, const Columns& seen, const float* weights,
                        const float* factor, float* received, int64_t next_head) {
  const Call& call = block.call;
  int64_t map_rows = call.map_block ? (call.queries + call.map_block - 1) / call.map_block : 0;
  int64_t map_columns = call.map_block ? (call.keys + call.map_block - 1) / call.map_block : 0;
  int64_t begin = first_of(block, row_group), end = first_of(block, row_group + 1);
  int64_t left = seen.begin / kPanel * kPanel, right = round_up(seen.end, kPanel);
  int64_t stop = least(right, call.keys - tile * kTile);
  float sums[kTile + kLanes], largest[kTile + kLanes];
  for (int64_t r = begin, count; r < end; r += count) {
    // Rows [r, r + count) are of one head, and of one row of the map.
    int64_t head = block.row[r].head, map_row = call.map_block ? block.row[r].query / call.map_block : 0;
    for (count = 1; r + count < end; ++count) {
      const Row& row = block.row[r + count];
      if (row.head != head || (call.map_block && row.query / call.map_block != map_row)) break;
    }
    const float *line = weights + (r - begin) * kTile, *times = factor + (r - begin);
    for (int64_t k = left; k < right; k += kLanes) {
      V sum = zero(), most_seen = zero();
      for (int64_t i = 0; i < count; ++i) {
        V weight = mul(load(line + i * kTile + k), splat(times[i]));
        sum = add(sum, weight);
        most_seen = max(most_seen, weight);
      }
      store(sums + k, sum);
      store(largest + k, most_seen);
    }
    if (received) {
      float* to = received + (head - block.head) * next_head + tile * kTile;
      int64_t k = left;
      for (; k + kLanes <= stop; k += kLanes) store(to + k, add(load(to + k), load(sums + k)));
      for (; k < stop; ++k) to[k] += sums[k];
    }
    if (call.map_block) {
      int64_t at = ((block.batch * call.heads + head) * map_rows + map_row) * map_columns;
      pool(call, at, tile * kTile, left, stop, sums, largest);
    }
  }
}

// The strip's exponentials become weights, now that each row's sum is known.
static void distribute(Block& block, int64_t from, int64_t to, const float* strip, const float* used, float* received,
                       int64_t next_head) {
  const State& state = block.state;
  for (int64_t tile = from; tile < to; ++tile)
    for (int64_t g = 0; g < block.row_groups; ++g) {
      Columns seen = seen_columns(block, g, tile);
      int64_t begin = first_of(block, g), end = first_of(block, g + 1);
      const float* used_here = used + (tile - from) * block.rows;
      if (seen.begin >= seen.end || used_here[begin] == kInfinity) continue;
      float factor[kRows];
      for (int64_t r = begin; r < end; ++r)
        factor[r - begin] = state.inverse[r] == 0 ? 0 : exp(used_here[r] - state.largest[r]) * state.inverse[r];
      const float* weights = strip + (tile - from) * strip_tile(block.rows) + g * kRows * kTile;
      add_weights(block, g, tile, seen, weights, factor, received, next_head);
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

}  // namespace
}  // namespace sightline
