// The backward's blocks of rows: queries and gradients of the output as its products want them, packed once and met by
// every tile of keys.
#pragma once

#include "block.h"

namespace sightline {
namespace {

constexpr int64_t kBackRows = 8 * kRows;

// A block of rows as the products want it. "Across": (row group, depth, kRowStride), rows interleaved; "along": panels
// (panel, depth, column). Pairs are two neighbours along the depth, and queries in pairs are not scaled. `span`: the
// keys that some row may see.
template <typename Number>
struct RowBlock {
  Number *query_across, *grad_across, *query_along, *grad_along;
  Row* row;
  int64_t* span;
};

INLINE int64_t block_first(const Call& call, int64_t i) { return least(call.queries, i * kBackRows); }

// Row groups begin with a pair: the products over rows take their weights two by two.
template <typename Number>
INLINE int64_t group_first(int64_t rows, int64_t g) {
  return least(rows, steps_of<Number>(rows) * g / row_groups_of(rows) * kDeep<Number>);
}

template <typename Number>
static RowBlock<Number> carve_rows(Scratch& scratch, const Call& call) {
  RowBlock<Number> rows;
  int64_t groups = row_groups_of(kBackRows), deep = kBackRows / kDeep<Number>;
  auto numbers = [&](int64_t n) { return (Number*)scratch.floats(n); };
  rows.query_across = numbers(groups * steps_of<Number>(call.width) * kRowStride);
  rows.grad_across = numbers(groups * steps_of<Number>(call.value_width) * kRowStride);
  rows.query_along = numbers(deep * round_up(call.width, kPanel));
  rows.grad_along = numbers(deep * round_up(call.value_width, kPanel));
  rows.row = (Row*)scratch.indices(kBackRows * (int64_t)(sizeof(Row) / 8));
  rows.span = scratch.indices(2);
  return rows;
}

// Where a block of rows lies.
template <typename Number>
static RowBlock<Number> packed_rows(const Call& call, const BackwardPlan& plan, int64_t batch, int64_t head,
                                    int64_t i) {
  int64_t block = (batch * call.heads + head - plan.first_head) * plan.blocks + i;
  Scratch packed{plan.packed + block * plan.packed_block};
  return carve_rows<Number>(packed, call);
}

template <typename T>
static float dot(const T* a, const T* b, int64_t n) {
  V sum = zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  if (i < n) sum = fma(load_some(a + i, (int)(n - i)), load_some(b + i, (int)(n - i)), sum);
  return sum_lanes(sum);
}

template <typename Number>
static void pack_across(const Call& call, const Strided& from, int64_t batch, int64_t head, int64_t first,
                        int64_t rows, int64_t columns, float scale, Number* out) {
  for (int64_t g = 0; g < row_groups_of(rows); ++g) {
    int64_t begin = group_first<Number>(rows, g), count = group_first<Number>(rows, g + 1) - begin;
    pack_as_columns(call.dtype, from, batch, head, first + begin, count, columns, scale,
                    out + g * steps_of<Number>(columns) * kRowStride, kRowStride);
  }
}

template <typename Number>
static void pack_row_block_as(const Call& call, const BackwardPlan& plan, int64_t unit) {
  int64_t i = unit % plan.blocks, head = unit / plan.blocks % call.heads, batch = unit / plan.blocks / call.heads;
  int64_t first = block_first(call, i), count = block_first(call, i + 1) - first;
  int64_t panel = kBackRows / kDeep<Number> * kPanel;
  RowBlock<Number> rows = packed_rows<Number>(call, plan, batch, head, i);
  rows.span[0] = call.keys, rows.span[1] = 0;
  for (int64_t r = 0; r < count; ++r) {
    Row row = row_of(call, batch, head, first + r);
    if (call.logsumexp[(batch * call.heads + head) * call.queries + first + r] == -kInfinity) row.start = row.stop = 0;
    rows.row[r] = row;
    if (row.start >= row.stop) continue;
    rows.span[0] = least(rows.span[0], row.start), rows.span[1] = most(rows.span[1], row.stop);
  }
  const Strided &query = call.query, &grad = call.grad_output, &output = call.output;
  pack_across(call, query, batch, head, first, count, call.width, call.scale, rows.query_across);
  pack_across(call, grad, batch, head, first, count, call.value_width, 1.0f, rows.grad_across);
  pack_as_rows(call.dtype, query, batch, head, first, count, call.width, call.scale, rows.query_along, panel);
  pack_as_rows(call.dtype, grad, batch, head, first, count, call.value_width, 1.0f, rows.grad_along, panel);
  by_dtype(call.dtype, grad.data, [&](auto* from) {
    from += batch * grad.batch + head * grad.head;
    auto* to = (decltype(from))output.data + batch * output.batch + head * output.head;
    for (int64_t q = first; q < first + count; ++q)
      call.row_sums[(batch * call.heads + head) * call.queries + q] =
          dot(from + q * grad.row, to + q * output.row, call.value_width);
  });
}

static void pack_row_block(const Call& call, const BackwardPlan& plan, int64_t unit) {
  by_number(call, [&](auto number) { pack_row_block_as<decltype(number)>(call, plan, unit); });
}

}  // namespace
}  // namespace sightline
