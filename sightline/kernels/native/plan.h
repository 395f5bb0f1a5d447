// How the work of a call is cut into units and shared out.
#pragma once

#include <algorithm>
#include <cstring>

#include "instructions.h"
#include "tensors.h"
#include "threads.h"

namespace sightline {

// ---- forward ----

constexpr int64_t kGroupInL2 = 128 << 10;  // floats that one thread keeps near while it works on a group

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline double multiply_adds(const Call& call) {
  double keys = (double)call.keys;
  if (call.after == 0 && call.queries == call.keys) keys /= 2;
  if (call.before != kNone && call.after != kNone) keys = std::min(keys, (double)(call.before + call.after + 1));
  return (double)(call.batch * call.heads * call.queries) * keys * (double)(call.width + call.value_width);
}

inline Plan plan_of(const Call& call, const Kernels& kernels, bool seeing) {
  Plan plan = {};
  int64_t tiles = ceil_div(call.keys, kTile), sharing = call.heads / call.groups, rows = kernels.rows;
  plan.seeing = seeing;
  plan.strip_kept = call.received || call.map_block;
  plan.fold = call.queries <= kFoldQueries ? sharing : 1;
  plan.chunks = 1;
  // Chunks change the order of sums: they depend on nothing but the lengths.
  constexpr int64_t kChunkTiles = 4;
  if (call.queries <= kFoldQueries && tiles > kChunkTiles) {
    plan.chunk_tiles = kChunkTiles;
    plan.chunks = ceil_div(tiles, kChunkTiles);
    plan.blocks = 1, plan.block_rows = plan.fold * call.queries;
    return plan;
  }
  if (plan.strip_kept) {
    // A strip of 32 MB at most. Beyond L2 it costs less to write and read it than to read keys and values more often.
    constexpr int64_t kStripFloats = int64_t{1} << 23;
    plan.fold = 1;
    int64_t most = std::clamp(kStripFloats / std::max<int64_t>(1, tiles * kTile), rows,
                              std::max(7 * rows, 66 / rows * rows));
    plan.band_rows = most;
    if (call.map_block) plan.band_rows = std::max<int64_t>(1, most / call.map_block) * call.map_block;
    plan.band_rows = std::min(plan.band_rows, std::max<int64_t>(1, call.queries));
    plan.block_rows = ceil_div(plan.band_rows, ceil_div(plan.band_rows, most));
    plan.bands = ceil_div(call.queries, plan.band_rows);
    plan.shares = std::clamp<int64_t>(plan.bands, 1, 16);
    plan.blocks = plan.bands;
    return plan;
  }
  int64_t all = plan.fold * call.queries;
  // Queries, sums and a tile of keys and values share L2.
  int64_t most = call.width + call.value_width > 320 ? 7 * rows : 14 * rows;
  int64_t heads = std::max<int64_t>(1, call.batch * call.heads / plan.fold);
  int64_t wanted = ceil_div(4 * (int64_t)torch::stable::get_num_threads(), heads);
  plan.blocks = std::max(ceil_div(all, most), std::min(wanted, ceil_div(all, 2 * rows)));
  plan.blocks = std::max<int64_t>(1, plan.blocks);
  plan.block_rows = ceil_div(ceil_div(all, rows), plan.blocks) * rows;
  return plan;
}

inline void run_forward(const Call& call, bool seeing) {
  const Kernels& kernels = *chosen.load();
  Plan plan = plan_of(call, kernels, seeing);
  int64_t tiles = ceil_div(call.keys, kTile), groups = call.batch * call.groups;
  int64_t folded = call.batch * call.heads / plan.fold;
  double work = multiply_adds(call);
  // Packing a tile costs about as much as ten queries against it: more blocks than two share what is packed.
  bool packs = plan.chunks == 1 && plan.blocks * (call.heads / call.groups) > 2 && !kernels.reads_directly(call);
  plan.packed_group = kernels.packed_group(call);
  plan.partial_state = plan.chunks > 1 ? kernels.partial_state(call, plan) : 0;
  int64_t strip = plan.chunks > 1 && plan.strip_kept ? kernels.strip_floats(call, plan, tiles) : 0;
  bool shares = call.received && plan.chunks == 1 && plan.shares > 1;
  int64_t sizes[] = {packs ? groups * plan.packed_group : 0, folded * plan.chunks * plan.partial_state,
                     folded * strip, shares ? call.batch * call.heads * plan.shares * call.keys : 0};
  Lease lease(shared_arena);
  float* memory = lease.floats(sizes[0] + sizes[1] + sizes[2] + sizes[3] + 16);
  plan.packed = packs ? memory : nullptr;
  plan.partial = memory + sizes[0];
  plan.strips = plan.partial + sizes[1];
  plan.shared_received = shares ? plan.strips + sizes[2] : call.received;
  int64_t scratch = kernels.scratch_floats(call, plan);

  int64_t units = folded * (plan.chunks > 1 ? plan.chunks : plan.strip_kept ? plan.shares : plan.blocks);
  if (call.queries == 0) units = 0;
  // Where groups alone keep all threads busy and fit L2, the one who packs a group attends to it: waking threads once
  // instead of twice.
  if (packs && groups >= 2 * torch::stable::get_num_threads() && plan.packed_group <= kGroupInL2) {
    share_out(groups, work, scratch, [&](int64_t group, float* own) {
      for (int64_t tile = 0; tile < tiles; ++tile) kernels.pack(call, plan, group * tiles + tile);
      for (int64_t unit = units / groups * group; unit < units / groups * (group + 1); ++unit)
        kernels.attend(call, plan, unit, own);
    });
  } else {
    if (packs)
      share_out(groups * tiles, 4.0 * (double)(groups * plan.packed_group), 0,
                [&](int64_t unit, float*) { kernels.pack(call, plan, unit); });
    share_out(units, work, scratch, [&](int64_t unit, float* own) { kernels.attend(call, plan, unit, own); });
  }
  if (plan.chunks > 1 && call.queries)
    share_out(folded, work / 100, scratch, [&](int64_t unit, float* own) { kernels.merge(call, plan, unit, own); });
  if (call.received && !call.queries)
    std::memset(call.received, 0, sizeof(float) * (size_t)(call.batch * call.heads * call.keys));
  else if (shares)
    share_out(call.batch * call.heads, (double)sizes[3], 0,
              [&](int64_t unit, float*) { kernels.gather(call, plan, unit); });
}

// ---- backward ----

constexpr int64_t kHeadsInL3 = 2 << 20;  // floats of the heads that are worked on at once

// Everything of one group after the other, in the memory of the thread that does it.
inline void differentiate_groups(const Call& call, const BackwardPlan& plan, int64_t head_floats, double work) {
  const Kernels& kernels = *chosen.load();
  int64_t sharing = call.heads / call.groups, near = sharing * head_floats;
  share_out(call.batch * call.groups, work, near + kernels.backward_scratch(call), [&](int64_t group, float* own) {
    BackwardPlan mine = plan;
    mine.first_head = group * sharing, mine.packed = own;
    mine.partial = own + sharing * plan.blocks * plan.packed_block;
    int64_t first = mine.first_head * plan.blocks, last = first + sharing * plan.blocks;
    for (int64_t unit = first; unit < last; ++unit) kernels.pack_rows(call, mine, unit);
    for (int64_t share = 0; share < plan.shares; ++share)
      kernels.backward(call, mine, group * plan.shares + share, own + near);
    for (int64_t unit = first; unit < last; ++unit) kernels.gather_queries(call, mine, unit);
  });
}

// The backward's units of all groups. Those that would add to the same numbers of the bias's gradient are one unit, and
// their turns have an order.
inline void differentiate_in_turns(const Call& call, const BackwardPlan& plan, const Maybe& bias, double work) {
  const Kernels& kernels = *chosen.load();
  int64_t counts[] = {call.batch, call.groups, plan.shares}, apart[3];
  for (int64_t axis = 0; axis < 3; ++axis) {
    int64_t of_bias[] = {0, 1, 3};
    apart[axis] = counts[axis] > 1 && bias->size(of_bias[axis]) == 1 ? 1 : counts[axis];
  }
  share_out(apart[0] * apart[1] * apart[2], work, kernels.backward_scratch(call), [&](int64_t unit, float* own) {
    int64_t place[] = {unit / apart[2] / apart[1], unit / apart[2] % apart[1], unit % apart[2]};
    for (int64_t batch = place[0]; batch < counts[0]; batch += apart[0])
      for (int64_t group = place[1]; group < counts[1]; group += apart[1])
        for (int64_t share = place[2]; share < counts[2]; share += apart[2])
          kernels.backward(call, plan, (batch * counts[1] + group) * counts[2] + share, own);
  });
}

// Step by step, the heads of `together` groups at once.
inline void differentiate_heads(const Call& call, const BackwardPlan& plan, int64_t together, const Maybe& bias,
                                double work) {
  const Kernels& kernels = *chosen.load();
  int64_t groups = call.batch * call.groups, sharing = call.heads / call.groups;
  for (int64_t group = 0; group < groups; group += together) {
    int64_t count = std::min(together, groups - group), first = group * sharing * plan.blocks;
    int64_t blocks = count * sharing * plan.blocks;
    double rows_work = 4.0 * (double)(blocks * plan.packed_block), own_work = work * (double)count / (double)groups;
    BackwardPlan near = plan;
    near.first_head = group * sharing;
    share_out(blocks, rows_work, 0, [&](int64_t unit, float*) { kernels.pack_rows(call, near, first + unit); });
    if (call.grad_bias.data)
      differentiate_in_turns(call, near, bias, own_work);
    else
      share_out(count * plan.shares, own_work, kernels.backward_scratch(call), [&](int64_t unit, float* own) {
        kernels.backward(call, near, group * plan.shares + unit, own);
      });
    share_out(blocks, rows_work, 0, [&](int64_t unit, float*) { kernels.gather_queries(call, near, first + unit); });
  }
}

inline void run_backward(const Call& call, const Maybe& bias, float* grad_slopes) {
  const Kernels& kernels = *chosen.load();
  constexpr int64_t kShares = 8;
  BackwardPlan plan = {};
  plan.blocks = ceil_div(call.queries, kernels.backward_rows);
  plan.shares = std::clamp<int64_t>(ceil_div(call.keys, kernels.backward_tile), 1, kShares);
  kernels.plan_backward(call, plan);
  int64_t heads = call.batch * call.heads, groups = call.batch * call.groups;
  int64_t threads = torch::stable::get_num_threads();
  int64_t head_floats = plan.blocks * plan.packed_block + plan.shares * plan.partial_head;
  int64_t group_floats = call.heads / call.groups * head_floats;
  // Where groups alone keep all threads busy and fit L2, threads wake once instead of three times.
  bool by_group = !call.grad_bias.data && groups >= 2 * threads && group_floats <= kGroupInL2;
  int64_t near = std::max(threads, kHeadsInL3 / std::max<int64_t>(1, group_floats));
  int64_t together = call.grad_bias.data ? groups : std::min(groups, near);
  int64_t common = by_group ? 0 : together * group_floats;
  Lease lease(shared_arena);
  plan.packed = lease.floats(common + (grad_slopes ? heads * plan.shares : 0) + 16);
  plan.partial = plan.packed + together * (call.heads / call.groups) * plan.blocks * plan.packed_block;
  plan.slopes = grad_slopes ? plan.packed + common : nullptr;
  double work = 2.5 * multiply_adds(call) + 1;
  if (by_group) differentiate_groups(call, plan, head_floats, work);
  else differentiate_heads(call, plan, together, bias, work);
  for (int64_t head = 0; grad_slopes && head < call.heads; ++head) {
    grad_slopes[head] = 0;
    for (int64_t batch = 0; batch < call.batch; ++batch)
      for (int64_t share = 0; share < plan.shares; ++share)
        grad_slopes[head] += plan.slopes[(batch * call.heads + head) * plan.shares + share];
  }
}

}  // namespace sightline
