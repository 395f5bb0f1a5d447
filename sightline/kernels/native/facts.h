// From what a block has gathered to what leaves it: rows are finished, and the exponentials that were kept become
// weights, which are added to what each key received and to the map.
#pragma once

#include "block.h"

namespace sightline {
namespace {

// The lists of a row group become weights and keys of its rows.
static void finish_lists(const Block& block, int64_t row_group) {
  const Call& call = block.call;
  const State& state = block.state;
  int64_t begin = first_of(block, row_group), count = first_of(block, row_group + 1) - begin;
  float largest[kRowStride] = {}, inverse[kRowStride] = {};
  for (int64_t r = 0; r < count; ++r) largest[r] = state.largest[begin + r], inverse[r] = state.inverse[begin + r];
  float* lists = state.top_scores + row_group * call.top * kRowStride;
  const int32_t* keys = state.top_keys + row_group * call.top * kRowStride;
  for (int64_t i = 0; i < call.top * kRowStride; i += kLanes) {
    V score = load(lists + i), below = sub(score, load(largest + i % kRowStride));
    V weight = mul(exp(below), load(inverse + i % kRowStride));
    store(lists + i, where_less(splat(-kInfinity), score, weight, zero()));
  }
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = block.row[begin + r];
    int64_t at = ((block.batch * call.heads + row.head) * call.queries + row.query) * call.top;
    for (int64_t i = 0; i < call.top; ++i) {
      call.top_weights[at + i] = lists[i * kRowStride + r];
      call.top_keys[at + i] = keys[i * kRowStride + r];
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
  }
  if (block.plan.seeing && call.top)
    for (int64_t g = 0; g < block.row_groups; ++g) finish_lists(block, g);
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

// What rows of one head, and of one row of the map, give to the keys [left, right) of a tile.
struct Given {
  int64_t head, map_row, left, right;
  float sums[kTile + kLanes], largest[kTile + kLanes];
};

// Adds it to what each key received and to the map. `received` belongs to the block's first head; those of later heads
// follow `next_head` floats on.
static void give(const Block& block, int64_t tile, Given& given, float* received, int64_t next_head) {
  const Call& call = block.call;
  int64_t left = given.left, stop = least(given.right, call.keys - tile * kTile);
  given.left = given.right = 0;
  if (left >= stop) return;
  if (received) {
    float* to = received + (given.head - block.head) * next_head + tile * kTile;
    int64_t k = left;
    for (; k + kLanes <= stop; k += kLanes) store(to + k, add(load(to + k), load(given.sums + k)));
    for (; k < stop; ++k) to[k] += given.sums[k];
  }
  if (call.map_block) {
    int64_t map_rows = (call.queries + call.map_block - 1) / call.map_block;
    int64_t map_columns = (call.keys + call.map_block - 1) / call.map_block;
    int64_t at = ((block.batch * call.heads + given.head) * map_rows + given.map_row) * map_columns;
    pool(call, at, tile * kTile, left, stop, given.sums, given.largest);
  }
}

// Makes room for more keys of the tile.
static void make_room(Given& given, int64_t left, int64_t right) {
  if (given.left == given.right) given.left = given.right = left;
  clear(given.sums + left, given.left - left), clear(given.largest + left, given.left - left);
  clear(given.sums + given.right, right - given.right), clear(given.largest + given.right, right - given.right);
  given.left = least(given.left, left), given.right = most(given.right, right);
}

// One row group's numbers against one tile, `weights` of (row, key), become weights by a factor a row, and are added to
// what is given; where head or map row change, that is passed on.
static void add_weights(const Block& block, int64_t row_group, int64_t tile, const Columns& seen, const float* weights,
                        const float* factor, Given& given, float* received, int64_t next_head) {
  const Call& call = block.call;
  int64_t begin = first_of(block, row_group), end = first_of(block, row_group + 1);
  int64_t left = seen.begin / kPanel * kPanel, right = round_up(seen.end, kPanel);
  for (int64_t r = begin, count; r < end; r += count) {
    // Rows [r, r + count) are of one head, and of one row of the map.
    int64_t head = block.row[r].head, map_row = call.map_block ? block.row[r].query / call.map_block : 0;
    for (count = 1; r + count < end; ++count) {
      const Row& row = block.row[r + count];
      if (row.head != head || (call.map_block && row.query / call.map_block != map_row)) break;
    }
    if (head != given.head || map_row != given.map_row) give(block, tile, given, received, next_head);
    given.head = head, given.map_row = map_row;
    make_room(given, left, right);
    const float *line = weights + (r - begin) * kTile, *times = factor + (r - begin);
    for (int64_t k = left; k < right; k += kLanes) {
      V sum = load(given.sums + k), most_seen = load(given.largest + k);
      for (int64_t i = 0; i < count; ++i) {
        V weight = mul(load(line + i * kTile + k), splat(times[i]));
        sum = add(sum, weight);
        most_seen = max(most_seen, weight);
      }
      store(given.sums + k, sum);
      store(given.largest + k, most_seen);
    }
  }
}

// A tile of the strip: exponentials become weights, now that each row's sum is known.
static void distribute(const Block& block, int64_t tile, const Strip& strip, float* received, int64_t next_head) {
  const State& state = block.state;
  const float* used = strip.largest + tile * block.plan.block_rows;
  Given given;
  given.head = given.map_row = given.left = given.right = 0;
  for (int64_t g = 0; g < block.row_groups; ++g) {
    Columns seen = seen_columns(block, g, tile);
    int64_t begin = first_of(block, g), end = first_of(block, g + 1);
    if (seen.begin >= seen.end || used[begin] == kInfinity) continue;
    float factor[kRows];
    for (int64_t r = begin; r < end; ++r)
      factor[r - begin] = state.inverse[r] == 0 ? 0 : exp(used[r] - state.largest[r]) * state.inverse[r];
    const float* weights = strip_of(block, strip, tile) + g * kRows * kTile;
    add_weights(block, g, tile, seen, weights, factor, given, received, next_head);
  }
  give(block, tile, given, received, next_head);
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
