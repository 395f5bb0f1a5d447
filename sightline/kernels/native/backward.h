// The backward: a tile of keys stays while all blocks of rows that see it pass by. Weights are recomputed from the
// logsumexp; then, with D = grad_output . output a row,
//
//   grad_value += weights' @ grad_output        grad_score = weights * (grad_output @ value' - D)
//   grad_key   += grad_score' @ query * scale   grad_query += grad_score @ key * scale
//
// With dropout the weights of the first line, and the product in the second, are times 0 or 1 / (1 - dropout).
//
// A unit owns a share of a group's tiles, so the gradients of keys and values need nothing of other units; what it
// gives to the queries is kept apart and added in the order of shares: the same bits for any number of threads.
#pragma once

#include "rowblock.h"

namespace sightline {
namespace {

constexpr int64_t kBackTile = 128;
// Tiles that stay together: what rows bring from far comes half as often.
constexpr int kBeside = 4;
// Weights of a block against a tile, (row, key). The odd line keeps keys of consecutive rows in different cache sets.
constexpr int64_t kBackStride = kBackTile + 16;

// What the first share gives to a head's queries; the other shares follow.
INLINE float* partial_of(const Call& call, const BackwardPlan& plan, int64_t batch, int64_t head) {
  return plan.partial + (batch * call.heads + head - plan.first_head) * plan.shares * plan.partial_head;
}

// A tile of keys with their gradients, and what rows make of it: weights and scores' gradients, (row, kBackStride).
// "Across": as the products over rows take them, (step of rows, kBackStride); "along": as that over keys does, (row,
// step of keys). Floats lie where they were made; what becomes pairs is made of one row group at a time.
template <typename Number>
struct BackScratch {
  static constexpr bool kInPlace = kDeep<Number> == 1;
  Number *keys, *values, *keys_along;  // panels of keys, of the values' keys, of the keys' columns
  float *grad_keys, *grad_values;      // (key, padded width)
  float *weights, *grad_scores, *cap;
  Number *weights_across, *grads_across, *grads_along;
};

// Of `kBeside` tiles, which use what rows make of them one after the other.
template <typename Number>
static void carve_back(Scratch& scratch, const Call& call, BackScratch<Number> (&tiles)[kBeside]) {
  BackScratch<Number>& own = tiles[0];
  int64_t lines = own.kInPlace ? kBackRows : kRows;
  auto numbers = [&](int64_t n) { return (Number*)scratch.floats(n); };
  own.weights = scratch.floats(lines * kBackStride);
  own.grad_scores = scratch.floats(lines * kBackStride);
  own.cap = scratch.floats(call.softcap > 0 ? kBackTile : 0);
  own.weights_across = own.kInPlace ? (Number*)own.weights : numbers(kBackRows / 2 * kBackStride);
  own.grads_across = own.kInPlace ? (Number*)own.grad_scores : numbers(kBackRows / 2 * kBackStride);
  own.grads_along = own.kInPlace ? (Number*)own.grad_scores : numbers(kRows * kBackStride / 2);
  for (BackScratch<Number>& tile : tiles) {
    tile = own;
    tile.keys = numbers(kBackTile * steps_of<Number>(call.width));
    tile.values = numbers(kBackTile * steps_of<Number>(call.value_width));
    tile.keys_along = numbers(kBackTile / kDeep<Number> * round_up(call.width, kPanel));
    tile.grad_keys = scratch.floats(kBackTile * round_up(call.width, kLanes));
    tile.grad_values = scratch.floats(kBackTile * padded_values(call));
  }
}

static void plan_backward(const Call& call, BackwardPlan& plan) {
  by_number(call, [&](auto number) {
    Scratch count{nullptr};
    carve_rows<decltype(number)>(count, call);
    plan.packed_block = count.used;
  });
  plan.partial_head = round_up(call.queries * round_up(call.width, kLanes), 16);
}

static int64_t backward_scratch(const Call& call) {
  Scratch count{nullptr};
  by_number(call, [&](auto number) {
    BackScratch<decltype(number)> tiles[kBeside];
    carve_back(count, call, tiles);
  });
  return count.used;
}

// What a row gives to the gradients of the bias and of its head's slope, from its scores' gradients [begin, end) before
// the soft cap's part.
static void give_to_masks(const Call& call, int64_t batch, const Row& row, int64_t first, int64_t begin, int64_t end,
                          const float* grads, float* to_slope) {
  if (call.grad_bias.data) {
    const Strided& bias = call.grad_bias;
    float* to = (float*)bias.data + batch * bias.batch + row.head * bias.head + row.query * bias.row;
    to += first * bias.column;
    for (int64_t k = begin; k < end; ++k) to[k * bias.column] += grads[k];
  }
  if (to_slope) {
    float sum = 0;
    for (int64_t k = begin; k < end; ++k) {
      int64_t away = row.position - first - k;
      sum += (float)(away < 0 ? -away : away) * grads[k];
    }
    *to_slope -= sum;
  }
}

// Scores [left, right) of one row become weights, products with the values become the scores' gradients. Keys that the
// row does not see get zeros, whatever stood there.
static void differentiate_row(const Call& call, int64_t batch, const Row& row, int64_t first, int64_t left,
                              int64_t right, float logsumexp, float row_sum, float* weights, float* grads,
                              float* cap, float* to_slope) {
  int64_t start = row.start - first, stop = row.stop - first;
  start = start < left ? left : start > right ? right : start;
  stop = stop < start ? start : stop > right ? right : stop;
  if (call.softcap > 0)
    for (int64_t k = left; k < right; k += kLanes) {
      V slope = tanh(div(load(weights + k), splat(call.softcap)));
      store(cap + k, fnma(slope, slope, splat(1.0f)));
    }
  if (shapes_scores(call)) shape_row(call, batch, row, first, start, stop, weights);
  Place place = call.dropped ? place_of(call, batch, row) : Place{};
  for (int64_t k = left; k < right; k += kLanes) {
    V p = exp(sub(load(weights + k), splat(logsumexp))), grad = load(grads + k);
    if (call.dropped) {
      V factor = kept(call, place, first + k);
      store(weights + k, mul(p, factor));
      grad = mul(grad, factor);
    } else {
      store(weights + k, p);
    }
    store(grads + k, mul(p, sub(grad, splat(row_sum))));
  }
  for (int64_t k = left; k < start; ++k) weights[k] = grads[k] = 0;
  for (int64_t k = stop; k < right; ++k) weights[k] = grads[k] = 0;
  if (call.grad_bias.data || to_slope) give_to_masks(call, batch, row, first, start, stop, grads, to_slope);
  if (call.softcap > 0)
    for (int64_t k = left; k < right; k += kLanes) store(grads + k, mul(load(grads + k), load(cap + k)));
}

// A block of rows, queries [query, query + rows) of a head, meets the tile of keys [first, first + count).
template <typename Number>
struct Meeting {
  const Call& call;
  BackScratch<Number>& own;
  int64_t batch, head, first, count;
  int64_t query, rows;
  RowBlock<Number> block;
  float *partial, *to_slope;
};

// Keys and rows that meet.
struct Met {
  int64_t begin = kBackTile, end = 0, from = kBackRows, to = 0;
};

// By a row group.
template <typename Number>
static Met met_by(const Meeting<Number>& meeting, int64_t g) {
  const Call& call = meeting.call;
  Met met;
  met.from = group_first<Number>(meeting.rows, g), met.to = group_first<Number>(meeting.rows, g + 1);
  for (int64_t r = met.from; r < met.to; ++r) {
    const Row& row = meeting.block.row[r];
    int64_t start = most(0, row.start - meeting.first), stop = least(meeting.count, row.stop - meeting.first);
    if (start >= stop) continue;
    if (hides_keys(call) && !any_seen(call, meeting.batch, row, meeting.first, start, stop)) continue;
    met.begin = least(met.begin, start), met.end = most(met.end, stop);
  }
  return met;
}

// A row group times a tile's panels, over the width. Floats are scaled already where they have to be.
INLINE void multiply_across(int64_t rows, const float* a, const float* panels, int64_t left, int64_t right,
                            int64_t width, const float*, float* out) {
  multiply_in_chains<1, kRowStride>(rows, a, panels + left * width, kPanel * width, width, out + left, kBackStride,
                                    right - left);
}

// Rows [top, top + height) as the products want them: [left, right) stands there, zeros around it.
static void lay_out(BackScratch<float>& own, int64_t top, int64_t height, int64_t left, int64_t right, int64_t whole) {
  float* both[] = {own.weights, own.grad_scores};
  for (float* lines : both)
    for (int64_t r = top; r < top + height; ++r) {
      clear(lines + r * kBackStride, left);
      clear(lines + r * kBackStride + right, whole - right);
    }
}

#if defined(SIGHTLINE_DOT)
INLINE void multiply_across(int64_t rows, const Pair* a, const Pair* panels, int64_t left, int64_t right, int64_t width,
                            const float* scale, float* out) {
  int64_t steps = steps_of<Pair>(width);
  auto* product = scale ? multiply<1, kRowStride, Into::times, Pair> : multiply<1, kRowStride, Into::nothing, Pair>;
  product(rows, a, panels + left * steps, kPanel * steps, steps, out + left, kBackStride, right - left, scale);
}

// Both are rounded, as SDPA does. A pair whose second row is none has zeros in its place.
static void lay_out(BackScratch<Pair>& own, int64_t top, int64_t height, int64_t left, int64_t right, int64_t whole) {
  for (int64_t r = 0; r < height; r += 2) {
    const float *weights = own.weights + r * kBackStride, *grads = own.grad_scores + r * kBackStride;
    Pair* weights_across = own.weights_across + (top + r) / 2 * kBackStride;
    Pair* grads_across = own.grads_across + (top + r) / 2 * kBackStride;
    bfloat16* along = (bfloat16*)own.grads_along + r * kBackStride;
    bool both = r + 1 < height;
    auto rounded = [&](const float* row) { return round_two(load(row), both ? load(row + kBackStride) : zero()); };
    for (int64_t k = left; k < right; k += kLanes) {
      store_zipped(weights_across + k, rounded(weights + k));
      Pairs rows = rounded(grads + k);
      store_zipped(grads_across + k, rows);
      store_rows(along + k, along + kBackStride + k, rows);
    }
    Pair* lines[] = {weights_across, grads_across};
    for (Pair* line : lines) {
      clear((float*)line, left);
      clear((float*)line + right, whole - right);
    }
  }
}
#endif

template <typename Number>
static Met differentiate_group(const Meeting<Number>& meeting, int64_t g) {
  const Call& call = meeting.call;
  BackScratch<Number>& own = meeting.own;
  const RowBlock<Number>& block = meeting.block;
  Met met = met_by(meeting, g);
  int64_t height = met.to - met.from, wide = round_up(call.width, kLanes), whole = round_up(meeting.count, kPanel);
  if (met.begin >= met.end) {
    lay_out(own, met.from, height, 0, 0, whole);
    return met;
  }
  int64_t left = met.begin / kPanel * kPanel, right = round_up(met.end, kPanel);
  int64_t line = (own.kInPlace ? met.from : 0) * kBackStride;
  float *weights = own.weights + line, *grads = own.grad_scores + line;
  multiply_across(height, block.query_across + g * steps_of<Number>(call.width) * kRowStride, own.keys, left, right,
                  call.width, &call.scale, weights);
  multiply_across(height, block.grad_across + g * steps_of<Number>(call.value_width) * kRowStride, own.values, left,
                  right, call.value_width, nullptr, grads);
  int64_t at = (meeting.batch * call.heads + meeting.head) * call.queries + meeting.query + met.from;
  for (int64_t r = 0; r < height; ++r)
    differentiate_row(call, meeting.batch, block.row[met.from + r], meeting.first, left, right, call.logsumexp[at + r],
                      call.row_sums[at + r], weights + r * kBackStride, grads + r * kBackStride, own.cap,
                      meeting.to_slope);
  lay_out(own, met.from, height, left, right, whole);
  int64_t begin = met.begin / kDeep<Number>;
  multiply<kBackStride / kDeep<Number>, 1, Into::sum>(
      height, own.grads_along + line + begin, own.keys_along + begin * kPanel, kBackTile / kDeep<Number> * kPanel,
      steps_of<Number>(met.end) - begin, meeting.partial + (meeting.query + met.from) * wide, wide, wide);
  return met;
}

// To the gradients of the keys and values that rows of the block met.
template <typename Number>
static void give_to_keys(const Meeting<Number>& meeting, const Met& met) {
  const Call& call = meeting.call;
  const BackScratch<Number>& own = meeting.own;
  const RowBlock<Number>& block = meeting.block;
  constexpr int64_t kBlockPanel = kBackRows / kDeep<Number> * kPanel;
  int64_t keys = met.end - met.begin, groups = row_groups_of(keys);
  int64_t wide = round_up(call.width, kLanes), values = padded_values(call);
  for (int64_t g = 0; g < groups; ++g) {
    int64_t key = met.begin + keys * g / groups, height = met.begin + keys * (g + 1) / groups - key;
    int64_t first = meeting.first + key;
    auto meets = [&](const Row& row) { return row.start < first + height && row.stop > first; };
    int64_t top = met.from, bottom = met.to;  // the others would add zeros
    while (top < bottom && !meets(block.row[top])) ++top;
    while (top < bottom && !meets(block.row[bottom - 1])) --bottom;
    top /= kDeep<Number>;
    int64_t steps = steps_of<Number>(bottom) - top, at = top * kBackStride + key;
    multiply<1, kBackStride, Into::sum>(height, own.weights_across + at, block.grad_along + top * kPanel, kBlockPanel,
                                        steps, own.grad_values + key * values, values, values);
    multiply<1, kBackStride, Into::sum>(height, own.grads_across + at, block.query_along + top * kPanel, kBlockPanel,
                                        steps, own.grad_keys + key * wide, wide, wide);
  }
}

template <typename Number>
static void differentiate_block(const Meeting<Number>& meeting) {
  const int64_t* span = meeting.block.span;
  if (span[1] <= meeting.first || span[0] >= meeting.first + meeting.count) return;
  Met all;
  for (int64_t g = 0; g < row_groups_of(meeting.rows); ++g) {
    Met met = differentiate_group(meeting, g);
    if (met.begin >= met.end) continue;
    all.begin = least(all.begin, met.begin), all.end = most(all.end, met.end);
    all.from = least(all.from, met.from), all.to = met.to;
  }
  if (all.begin < all.end) give_to_keys(meeting, all);
}

// Rows of floats, `wide` apart, times `scale`, to a tensor's rows.
static void write_rows(Dtype dtype, const Strided& out, int64_t batch, int64_t head, int64_t first, int64_t rows,
                       int64_t columns, const float* from, int64_t wide, float scale) {
  by_dtype(dtype, out.data, [&](auto* data) {
    auto* to = writable(data) + batch * out.batch + head * out.head + first * out.row;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += kLanes) {
        V x = mul(load(from + i * wide + j), splat(scale));
        int some = (int)least(kLanes, columns - j);
        if (some == kLanes) store(to + i * out.row + j, x);
        else store_some(to + i * out.row + j, x, some);
      }
  });
}

template <typename Number>
static void differentiate_share(const Call& call, const BackwardPlan& plan, int64_t unit, float* at) {
  Scratch scratch{at};
  BackScratch<Number> tiles[kBeside];
  carve_back(scratch, call, tiles);
  int64_t share = unit % plan.shares, group = unit / plan.shares % call.groups;
  int64_t batch = unit / plan.shares / call.groups, sharing = call.heads / call.groups;
  auto partial = [&](int64_t head) {
    return partial_of(call, plan, batch, head) + share * plan.partial_head;
  };
  auto to_slope = [&](int64_t head) {
    return plan.slopes ? plan.slopes + (batch * call.heads + head) * plan.shares + share : nullptr;
  };
  for (int64_t head = group * sharing; head < (group + 1) * sharing; ++head) {
    clear(partial(head), plan.partial_head);
    if (plan.slopes) *to_slope(head) = 0;
  }
  int64_t wide = round_up(call.width, kLanes), values = padded_values(call);
  int64_t apart = plan.shares * kBackTile;
  for (int64_t begin = share * kBackTile; begin < call.keys; begin += kBeside * apart) {
    auto each_tile = [&](auto work) {
      for (int t = 0; t < kBeside; ++t) {
        int64_t first = begin + t * apart, count = least(kBackTile, call.keys - first);
        if (count > 0) work(tiles[t], first, count);
      }
    };
    each_tile([&](BackScratch<Number>& own, int64_t first, int64_t count) {
      int64_t packed = packed_keys(call, batch, first, kBackTile), panel = kBackTile / kDeep<Number> * kPanel;
      pack_as_columns(call.dtype, call.key, batch, group, first, packed, call.width, 1.0f, own.keys, kPanel);
      pack_as_columns(call.dtype, call.value, batch, group, first, packed, call.value_width, 1.0f, own.values, kPanel);
      pack_as_rows(call.dtype, call.key, batch, group, first, packed, call.width, 1.0f, own.keys_along, panel);
      clear(own.grad_keys, count * wide);
      clear(own.grad_values, count * values);
    });
    for (int64_t head = group * sharing; head < (group + 1) * sharing; ++head)
      for (int64_t i = 0; i < plan.blocks; ++i) {
        int64_t query = block_first(call, i), rows = block_first(call, i + 1) - query;
        RowBlock<Number> block = packed_rows<Number>(call, plan, batch, head, i);
        each_tile([&](BackScratch<Number>& own, int64_t first, int64_t count) {
          differentiate_block(Meeting<Number>{call, own, batch, head, first, count, query, rows, block, partial(head),
                                              to_slope(head)});
        });
      }
    // In pairs the queries were not scaled.
    float scale = in_pairs(call) ? call.scale : 1.0f;
    each_tile([&](BackScratch<Number>& own, int64_t first, int64_t count) {
      write_rows(call.dtype, call.grad_key, batch, group, first, count, call.width, own.grad_keys, wide, scale);
      write_rows(call.dtype, call.grad_value, batch, group, first, count, call.value_width, own.grad_values, values,
                 1.0f);
    });
  }
}

static void backward(const Call& call, const BackwardPlan& plan, int64_t unit, float* at) {
  by_number(call, [&](auto number) { differentiate_share<decltype(number)>(call, plan, unit, at); });
}

// The shares of the queries' gradient, added in order into the first.
static void gather_queries(const Call& call, const BackwardPlan& plan, int64_t unit) {
  int64_t i = unit % plan.blocks, head = unit / plan.blocks % call.heads, batch = unit / plan.blocks / call.heads;
  int64_t first = block_first(call, i), count = block_first(call, i + 1) - first;
  int64_t wide = round_up(call.width, kLanes);
  float* sum = partial_of(call, plan, batch, head) + first * wide;
  for (int64_t share = 1; share < plan.shares; ++share) {
    const float* more = sum + share * plan.partial_head;
    for (int64_t j = 0; j < count * wide; j += kLanes) store(sum + j, add(load(sum + j), load(more + j)));
  }
  write_rows(call.dtype, call.grad_query, batch, head, first, count, call.width, sum, wide, call.scale);
}

}  // namespace
}  // namespace sightline
