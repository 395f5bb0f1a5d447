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

#include "forward.h"

namespace sightline {
namespace {

constexpr int64_t kBackTile = 128;
constexpr int64_t kBackRows = 8 * kRows;
// Weights of a block against a tile, (row, key). The odd line keeps keys of consecutive rows in different cache sets.
constexpr int64_t kBackStride = kBackTile + 16;

// A block of rows as the products want it. "Across": (row group, column, kRowStride), rows interleaved; "along":
// panels (panel, row, column). `span`: the keys that some row may see.
struct RowBlock {
  float *query_across, *grad_across, *query_along, *grad_along;
  Row* row;
  int64_t* span;
};

INLINE int64_t block_first(const Call& call, int64_t i) { return least(call.queries, i * kBackRows); }

static RowBlock carve_rows(Scratch& scratch, const Call& call) {
  RowBlock rows;
  int64_t groups = row_groups_of(kBackRows);
  rows.query_across = scratch.floats(groups * call.width * kRowStride);
  rows.grad_across = scratch.floats(groups * call.value_width * kRowStride);
  rows.query_along = scratch.floats(kBackRows * round_up(call.width, kPanel));
  rows.grad_along = scratch.floats(kBackRows * round_up(call.value_width, kPanel));
  rows.row = (Row*)scratch.indices(kBackRows * (int64_t)(sizeof(Row) / 8));
  rows.span = scratch.indices(2);
  return rows;
}

// Where a block of rows lies, and what the first share gives to a head's queries; the other shares follow.
INLINE float* packed_rows(const Call& call, const BackwardPlan& plan, int64_t batch, int64_t head, int64_t i) {
  return plan.packed + ((batch * call.heads + head - plan.first_head) * plan.blocks + i) * plan.packed_block;
}
INLINE float* partial_of(const Call& call, const BackwardPlan& plan, int64_t batch, int64_t head) {
  return plan.partial + (batch * call.heads + head - plan.first_head) * plan.shares * plan.partial_head;
}

static void plan_backward(const Call& call, BackwardPlan& plan) {
  Scratch count{nullptr};
  carve_rows(count, call);
  plan.packed_block = count.used;
  plan.partial_head = round_up(call.queries * round_up(call.width, kLanes), 16);
}

template <typename T>
static float dot(const T* a, const T* b, int64_t n) {
  V sum = zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  if (i < n) sum = fma(load_some(a + i, (int)(n - i)), load_some(b + i, (int)(n - i)), sum);
  return sum_lanes(sum);
}

static void pack_across(Dtype dtype, const Strided& from, int64_t batch, int64_t head, int64_t first, int64_t rows,
                        int64_t columns, float scale, float* out) {
  int64_t groups = row_groups_of(rows);
  by_dtype(dtype, from.data, [&](auto* data) {
    data += batch * from.batch + head * from.head + first * from.row;
    for (int64_t g = 0; g < groups; ++g) {
      int64_t begin = rows * g / groups, count = rows * (g + 1) / groups - begin;
      pack_transposed([&](int64_t i) { return data + (begin + i) * from.row; }, count, columns, scale,
                      out + g * columns * kRowStride, kRowStride, kRowStride);
    }
  });
}

static void pack_row_block(const Call& call, const BackwardPlan& plan, int64_t unit) {
  int64_t i = unit % plan.blocks, head = unit / plan.blocks % call.heads, batch = unit / plan.blocks / call.heads;
  int64_t first = block_first(call, i), count = block_first(call, i + 1) - first;
  Scratch packed{packed_rows(call, plan, batch, head, i)};
  RowBlock rows = carve_rows(packed, call);
  rows.span[0] = call.keys, rows.span[1] = 0;
  for (int64_t r = 0; r < count; ++r) {
    Row row = row_of(call, batch, head, first + r);
    if (call.logsumexp[(batch * call.heads + head) * call.queries + first + r] == -kInfinity) row.start = row.stop = 0;
    rows.row[r] = row;
    if (row.start >= row.stop) continue;
    rows.span[0] = least(rows.span[0], row.start), rows.span[1] = most(rows.span[1], row.stop);
  }
  const Strided &query = call.query, &grad = call.grad_output, &output = call.output;
  pack_across(call.dtype, query, batch, head, first, count, call.width, call.scale, rows.query_across);
  pack_across(call.dtype, grad, batch, head, first, count, call.value_width, 1.0f, rows.grad_across);
  pack_as_rows(call.dtype, query, batch, head, first, count, call.width, call.scale, rows.query_along,
               kBackRows * kPanel);
  pack_as_rows(call.dtype, grad, batch, head, first, count, call.value_width, 1.0f, rows.grad_along,
               kBackRows * kPanel);
  by_dtype(call.dtype, grad.data, [&](auto* from) {
    from += batch * grad.batch + head * grad.head;
    auto* to = (decltype(from))output.data + batch * output.batch + head * output.head;
    for (int64_t q = first; q < first + count; ++q)
      call.row_sums[(batch * call.heads + head) * call.queries + q] =
          dot(from + q * grad.row, to + q * output.row, call.value_width);
  });
}

struct BackScratch {
  float *keys, *values, *keys_along;  // a tile: panels of keys, of the values' keys, of the keys' columns
  float *grad_keys, *grad_values;     // (key, padded width)
  float *weights, *grad_scores, *cap; // (row, kBackStride)
};

static BackScratch carve_back(Scratch& scratch, const Call& call) {
  BackScratch own;
  own.keys = scratch.floats(kBackTile * call.width);
  own.values = scratch.floats(kBackTile * call.value_width);
  own.keys_along = scratch.floats(kBackTile * round_up(call.width, kPanel));
  own.grad_keys = scratch.floats(kBackTile * round_up(call.width, kLanes));
  own.grad_values = scratch.floats(kBackTile * padded_values(call));
  own.weights = scratch.floats(kBackRows * kBackStride);
  own.grad_scores = scratch.floats(kBackRows * kBackStride);
  own.cap = scratch.floats(call.softcap > 0 ? kBackRows * kBackStride : 0);
  return own;
}

static int64_t backward_scratch(const Call& call) {
  Scratch count{nullptr};
  carve_back(count, call);
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

// One block of rows meets the tile of keys [first, first + count).
static void differentiate_block(const Call& call, const BackwardPlan& plan, int64_t batch, int64_t head, int64_t i,
                                int64_t first, int64_t count, float* partial, float* to_slope, BackScratch& own) {
  int64_t query = block_first(call, i), rows = block_first(call, i + 1) - query;
  int64_t groups = row_groups_of(rows), at = (batch * call.heads + head) * call.queries + query;
  Scratch packed{packed_rows(call, plan, batch, head, i)};
  RowBlock block = carve_rows(packed, call);
  if (block.span[1] <= first || block.span[0] >= first + count) return;
  int64_t wide = round_up(call.width, kLanes), whole = round_up(count, kPanel);
  int64_t begin = kBackTile, end = 0, from = rows, to = 0;  // keys and rows that meet
  for (int64_t g = 0; g < groups; ++g) {
    int64_t top = rows * g / groups, height = rows * (g + 1) / groups - top, left = kBackTile, right = 0;
    for (int64_t r = top; r < top + height; ++r) {
      int64_t start = most(0, block.row[r].start - first), stop = least(count, block.row[r].stop - first);
      if (start >= stop || (hides_keys(call) && !any_seen(call, batch, block.row[r], first, start, stop))) continue;
      left = least(left, start), right = most(right, stop);
    }
    float* weights = own.weights + top * kBackStride;
    float* grads = own.grad_scores + top * kBackStride;
    int64_t begin_here = left, end_here = right;
    if (left < right) {
      begin = least(begin, left), end = most(end, right), from = least(from, top), to = top + height;
      left = left / kPanel * kPanel, right = round_up(right, kPanel);
      multiply_in_chains<1, kRowStride>(height, block.query_across + g * call.width * kRowStride,
                                        own.keys + left * call.width, kPanel * call.width, call.width, weights + left,
                                        kBackStride, right - left);
      multiply_in_chains<1, kRowStride>(height, block.grad_across + g * call.value_width * kRowStride,
                                        own.values + left * call.value_width, kPanel * call.value_width,
                                        call.value_width, grads + left, kBackStride, right - left);
    } else {
      left = right = 0;
    }
    for (int64_t r = 0; r < height; ++r) {
      float *line = weights + r * kBackStride, *grad = grads + r * kBackStride;
      if (left < right)
        differentiate_row(call, batch, block.row[top + r], first, left, right, call.logsumexp[at + top + r],
                          call.row_sums[at + top + r], line, grad, own.cap + (top + r) * kBackStride, to_slope);
      for (int64_t k = 0; k < left; ++k) line[k] = grad[k] = 0;
      for (int64_t k = right; k < whole; ++k) line[k] = grad[k] = 0;
    }
    if (left < right)
      multiply<kBackStride, 1, Into::sum>(height, grads + begin_here, own.keys_along + begin_here * kPanel,
                                          kBackTile * kPanel, end_here - begin_here, partial + (query + top) * wide,
                                          wide, wide);
  }
  if (begin >= end) return;
  int64_t key_groups = row_groups_of(end - begin);
  for (int64_t g = 0; g < key_groups; ++g) {
    int64_t key = begin + (end - begin) * g / key_groups, height = begin + (end - begin) * (g + 1) / key_groups - key;
    auto meets = [&](const Row& row) { return row.start < first + key + height && row.stop > first + key; };
    int64_t top = from, bottom = to;  // the others would add zeros
    while (top < bottom && !meets(block.row[top])) ++top;
    while (top < bottom && !meets(block.row[bottom - 1])) --bottom;
    multiply<1, kBackStride, Into::sum>(height, own.weights + top * kBackStride + key, block.grad_along + top * kPanel,
                                        kBackRows * kPanel, bottom - top, own.grad_values + key * padded_values(call),
                                        padded_values(call), padded_values(call));
    multiply<1, kBackStride, Into::sum>(height, own.grad_scores + top * kBackStride + key,
                                        block.query_along + top * kPanel, kBackRows * kPanel, bottom - top,
                                        own.grad_keys + key * wide, wide, wide);
  }
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

static void backward(const Call& call, const BackwardPlan& plan, int64_t unit, float* at) {
  Scratch scratch{at};
  BackScratch own = carve_back(scratch, call);
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
  for (int64_t first = share * kBackTile; first < call.keys; first += plan.shares * kBackTile) {
    int64_t count = least(kBackTile, call.keys - first), wide = round_up(call.width, kLanes);
    pack_as_columns(call.dtype, call.key, batch, group, first, count, call.width, own.keys);
    pack_as_columns(call.dtype, call.value, batch, group, first, count, call.value_width, own.values);
    pack_as_rows(call.dtype, call.key, batch, group, first, count, call.width, 1.0f, own.keys_along,
                 kBackTile * kPanel);
    clear(own.grad_keys, count * wide);
    clear(own.grad_values, count * padded_values(call));
    for (int64_t head = group * sharing; head < (group + 1) * sharing; ++head)
      for (int64_t i = 0; i < plan.blocks; ++i)
        differentiate_block(call, plan, batch, head, i, first, count, partial(head), to_slope(head), own);
    write_rows(call.dtype, call.grad_key, batch, group, first, count, call.width, own.grad_keys, wide, 1.0f);
    write_rows(call.dtype, call.grad_value, batch, group, first, count, call.value_width, own.grad_values,
               padded_values(call), 1.0f);
  }
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
