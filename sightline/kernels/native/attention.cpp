// The operators: arguments in, outputs allocated, the work planned and shared out to torch's own thread pool.
// Torch is reached through its stable ABI alone, so that one library serves torch 2.10 and newer and every Python.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "instructions.h"
#include "problem.h"
#include "registry.h"
#include "segments.h"
#include "steps.h"
#include "tensors.h"
#include "threads.h"

namespace sightline {
namespace {

// ---- forward ----

constexpr int64_t kGroupInL2 = 128 << 10;  // floats that one thread keeps near while it works on a group

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

double multiply_adds(const Call& call) {
  double keys = (double)call.keys;
  if (call.after == 0 && call.queries == call.keys) keys /= 2;
  if (call.before != kNone && call.after != kNone) keys = std::min(keys, (double)(call.before + call.after + 1));
  return (double)(call.batch * call.heads * call.queries) * keys * (double)(call.width + call.value_width);
}

Plan plan_of(const Call& call, const Kernels& kernels, bool seeing) {
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
    int64_t most = std::clamp(kStripFloats / std::max<int64_t>(1, tiles * kTile), rows, std::max(7 * rows, 66 / rows * rows));
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
  plan.block_rows = ceil_div(all, plan.blocks);
  return plan;
}

void run_forward(const Call& call, bool seeing) {
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

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& lengths,
                                   const Maybe& segments, const Maybe& allowed, const Maybe& bias,
                                   const Maybe& slopes, const Maybe& sinks, int64_t before, int64_t after,
                                   double scale, double softcap, double dropout, const Maybe& seed) {
  Call call = call_of(
      {query, key, value, lengths, allowed, bias, slopes, sinks, before, after, scale, softcap, dropout, seed});
  std::vector<int64_t> spans = find_segments(call, segments);
  Tensor output = empty_rows(call.batch, call.heads, call.queries, call.value_width, query.scalar_type());
  Tensor logsumexp = empty({call.batch, call.heads, call.queries});
  call.output = strided(output), call.logsumexp = floats(logsumexp);
  run_forward(call, false);
  return {output, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> observe(
    const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& lengths, const Maybe& segments,
    const Maybe& allowed, const Maybe& bias, const Maybe& slopes, const Maybe& sinks, int64_t before, int64_t after,
    double scale, double softcap, int64_t top, bool received, int64_t map_block, int64_t sink_keys) {
  Call call = call_of({query, key, value, lengths, allowed, bias, slopes, sinks, before, after, scale, softcap});
  std::vector<int64_t> spans = find_segments(call, segments);
  STD_TORCH_CHECK(top >= 0 && map_block >= 0 && sink_keys >= 0, "sightline: top, map_block and sink_keys start at 0");
  int64_t batch = call.batch, heads = call.heads, queries = call.queries;
  Tensor output = empty_rows(batch, heads, queries, call.value_width, query.scalar_type());
  auto rows = [&] { return empty({batch, heads, queries}); };
  Tensor logsumexp = rows(), entropy = rows(), distance = rows(), sink = rows();
  Tensor top_weights = empty({batch, heads, queries, top});
  Tensor top_keys = empty({batch, heads, queries, top}, ScalarType::Long);
  Tensor to_keys = received ? empty({batch, heads, call.keys}) : empty({0});
  int64_t map_rows = map_block ? ceil_div(queries, map_block) : 0;
  int64_t map_columns = map_block ? ceil_div(call.keys, map_block) : 0;
  Tensor map_sum = empty({batch, heads, map_rows, map_columns}), map_max = empty({batch, heads, map_rows, map_columns});
  call.output = strided(output), call.logsumexp = floats(logsumexp), call.entropy = floats(entropy);
  call.distance = floats(distance), call.sink = floats(sink), call.top_weights = floats(top_weights);
  call.top_keys = (int64_t*)top_keys.mutable_data_ptr();
  call.received = received && call.keys ? floats(to_keys) : nullptr;
  call.map_sum = floats(map_sum), call.map_max = floats(map_max);
  call.top = top, call.map_block = map_block, call.sink_keys = sink_keys;
  run_forward(call, true);
  return {output, logsumexp, entropy, distance, sink, top_weights, top_keys, to_keys, map_sum, map_max};
}

// ---- windows ----

// `position`: how far the window's first query stands behind its first key.
std::tuple<Tensor, Tensor> pool(const Tensor& query, const Tensor& key, const Tensor& logsumexp, const Maybe& lengths,
                                const Maybe& segments, const Maybe& allowed, const Maybe& bias, const Maybe& slopes,
                                int64_t before, int64_t after, double scale, double softcap, int64_t position, int64_t block) {
  Call call = call_of({query, key, key, lengths, allowed, bias, slopes, {}, before, after, scale, softcap});
  std::vector<int64_t> spans = find_segments(call, segments);
  STD_TORCH_CHECK(block > 0, "sightline: block starts at 1");
  STD_TORCH_CHECK(logsumexp.scalar_type() == ScalarType::Float && logsumexp.is_contiguous() &&
                      logsumexp.numel() == call.batch * call.heads * call.queries,
                  "sightline: logsumexp must be float32 (batch heads queries)");
  int64_t rows = ceil_div(call.queries, block), columns = ceil_div(call.keys, block);
  Tensor sum = empty({call.batch, call.heads, rows, columns}), largest = empty({call.batch, call.heads, rows, columns});
  call.logsumexp = floats(logsumexp), call.map_sum = floats(sum), call.map_max = floats(largest);
  call.map_block = block, call.position = position;
  const Kernels& kernels = *chosen.load();
  share_out(kernels.window_units(call), multiply_adds(call), kernels.window_scratch(call),
            [&](int64_t unit, float* own) { kernels.pool_window(call, unit, own); });
  return {sum, largest};
}

// ---- backward ----

// Everything of one group after the other, in the memory of the thread that does it.
void differentiate_groups(const Call& call, const BackwardPlan& plan, int64_t head_floats, double work) {
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

// Step by step, all heads at once. Units that would add to the same numbers of the bias's gradient are one unit, and
// their turns have an order.
void differentiate_heads(const Call& call, const BackwardPlan& plan, const Maybe& bias, double work) {
  const Kernels& kernels = *chosen.load();
  int64_t blocks = call.batch * call.heads * plan.blocks;
  double rows_work = 4.0 * (double)(blocks * plan.packed_block);
  share_out(blocks, rows_work, 0, [&](int64_t unit, float*) { kernels.pack_rows(call, plan, unit); });
  int64_t counts[] = {call.batch, call.groups, plan.shares}, apart[3];
  for (int64_t axis = 0; axis < 3; ++axis) {
    int64_t of_bias[] = {0, 1, 3};
    bool common = call.grad_bias.data && counts[axis] > 1 && bias->size(of_bias[axis]) == 1;
    apart[axis] = common ? 1 : counts[axis];
  }
  share_out(apart[0] * apart[1] * apart[2], work, kernels.backward_scratch(call), [&](int64_t unit, float* own) {
    int64_t place[] = {unit / apart[2] / apart[1], unit / apart[2] % apart[1], unit % apart[2]};
    for (int64_t batch = place[0]; batch < counts[0]; batch += apart[0])
      for (int64_t group = place[1]; group < counts[1]; group += apart[1])
        for (int64_t share = place[2]; share < counts[2]; share += apart[2])
          kernels.backward(call, plan, (batch * counts[1] + group) * counts[2] + share, own);
  });
  share_out(blocks, rows_work, 0, [&](int64_t unit, float*) { kernels.gather_queries(call, plan, unit); });
}

void run_backward(const Call& call, const Maybe& bias, float* grad_slopes) {
  const Kernels& kernels = *chosen.load();
  constexpr int64_t kShares = 8;
  BackwardPlan plan = {};
  plan.blocks = ceil_div(call.queries, kernels.backward_rows);
  plan.shares = std::clamp<int64_t>(ceil_div(call.keys, kernels.backward_tile), 1, kShares);
  kernels.plan_backward(call, plan);
  int64_t heads = call.batch * call.heads, groups = call.batch * call.groups;
  int64_t head_floats = plan.blocks * plan.packed_block + plan.shares * plan.partial_head;
  // Where groups alone keep all threads busy and fit L2, threads wake once instead of three times.
  bool by_group = !call.grad_bias.data && groups >= 2 * torch::stable::get_num_threads() &&
                  call.heads / call.groups * head_floats <= kGroupInL2;
  int64_t common = by_group ? 0 : heads * head_floats;
  Lease lease(shared_arena);
  plan.packed = lease.floats(common + (grad_slopes ? heads * plan.shares : 0) + 16);
  plan.partial = plan.packed + heads * plan.blocks * plan.packed_block;
  plan.slopes = grad_slopes ? plan.packed + common : nullptr;
  double work = 2.5 * multiply_adds(call) + 1;
  if (by_group) differentiate_groups(call, plan, head_floats, work);
  else differentiate_heads(call, plan, bias, work);
  for (int64_t head = 0; grad_slopes && head < call.heads; ++head) {
    grad_slopes[head] = 0;
    for (int64_t batch = 0; batch < call.batch; ++batch)
      for (int64_t share = 0; share < plan.shares; ++share)
        grad_slopes[head] += plan.slopes[(batch * call.heads + head) * plan.shares + share];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& logsumexp, const Tensor& query, const Tensor& key,
    const Tensor& value, const Maybe& lengths, const Maybe& segments, const Maybe& allowed, const Maybe& bias,
    const Maybe& slopes, const Maybe& sinks, int64_t before, int64_t after, double scale, double softcap, bool to_bias,
    bool to_slopes, double dropout, const Maybe& seed) {
  Call call = call_of(
      {query, key, value, lengths, allowed, bias, slopes, sinks, before, after, scale, softcap, dropout, seed});
  std::vector<int64_t> spans = find_segments(call, segments);
  for (const Tensor* rows : {&grad_output, &output})
    STD_TORCH_CHECK(rows->is_cpu() && rows->dim() == 4 && rows->scalar_type() == query.scalar_type() &&
                        rows->size(0) == call.batch && rows->size(1) == call.heads && rows->size(2) == call.queries &&
                        rows->size(3) == call.value_width && (rows->size(3) <= 1 || rows->stride(3) == 1),
                    "sightline: grad_output and output must be (batch heads queries value_width), last stride 1");
  STD_TORCH_CHECK(logsumexp.scalar_type() == ScalarType::Float && logsumexp.is_contiguous() &&
                      logsumexp.numel() == call.batch * call.heads * call.queries,
                  "sightline: logsumexp must be float32 (batch heads queries)");
  ScalarType dtype = query.scalar_type();
  Tensor grad_query = empty_rows(call.batch, call.heads, call.queries, call.width, dtype);
  Tensor grad_key = empty_rows(call.batch, call.groups, call.keys, call.width, dtype);
  Tensor grad_value = empty_rows(call.batch, call.groups, call.keys, call.value_width, dtype);
  Tensor row_sums = empty({call.batch, call.heads, call.queries});
  call.grad_output = strided(grad_output), call.output = strided(output);
  call.logsumexp = floats(logsumexp), call.row_sums = floats(row_sums);
  call.grad_query = strided(grad_query), call.grad_key = strided(grad_key), call.grad_value = strided(grad_value);

  STD_TORCH_CHECK((!to_bias || bias) && (!to_slopes || slopes), "sightline: no gradient of what is not there");
  Tensor grad_bias = to_bias ? empty({bias->size(0), bias->size(1), bias->size(2), bias->size(3)}) : empty({0});
  Tensor grad_slopes = empty({to_slopes ? call.heads : 0});
  if (to_bias) {
    if (grad_bias.numel())  // no memory at all may be cleared of no floats
      std::memset(grad_bias.mutable_data_ptr(), 0, sizeof(float) * (size_t)grad_bias.numel());
    call.grad_bias = broadcast(grad_bias);
  }
  run_backward(call, bias, to_slopes ? floats(grad_slopes) : nullptr);
  return {grad_query, grad_key, grad_value, row_sums, grad_bias, grad_slopes};
}

}  // namespace
}  // namespace sightline

STABLE_TORCH_LIBRARY(sightline, library) {
  library.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? segments, Tensor? allowed, "
      "Tensor? bias, Tensor? slopes, Tensor? sinks, int before, int after, float scale, float softcap, "
      "float dropout=0.0, Tensor? seed=None) -> (Tensor, Tensor)");
  library.def(
      "observe(Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? segments, Tensor? allowed, "
      "Tensor? bias, Tensor? slopes, Tensor? sinks, int before, int after, float scale, float softcap, int top, "
      "bool received, int map_block, int sink_keys) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "pool(Tensor query, Tensor key, Tensor logsumexp, Tensor? lengths, Tensor? segments, Tensor? allowed, "
      "Tensor? bias, Tensor? slopes, int before, int after, float scale, float softcap, int position, int block) -> "
      "(Tensor, Tensor)");
  library.def(
      "backward(Tensor grad_output, Tensor output, Tensor logsumexp, Tensor query, Tensor key, Tensor value, "
      "Tensor? lengths, Tensor? segments, Tensor? allowed, Tensor? bias, Tensor? slopes, Tensor? sinks, int before, "
      "int after, float scale, float softcap, bool to_bias, bool to_slopes, float dropout=0.0, Tensor? seed=None) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "project(Tensor x, Tensor first, Tensor? first_bias, Tensor? second, Tensor? second_bias, Tensor? third, "
      "Tensor? third_bias) -> Tensor");
  library.def("norm(Tensor x, Tensor? weight, float epsilon) -> Tensor");
  library.def(
      "feed_forward(Tensor x, Tensor? gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, Tensor down, "
      "Tensor? down_bias) -> Tensor");
  library.def(
      "attend(Tensor x, Tensor query, Tensor? query_bias, Tensor? key, Tensor? key_bias, Tensor? value, "
      "Tensor? value_bias, Tensor output, Tensor? output_bias, Tensor? query_norm, Tensor? key_norm, float epsilon, "
      "Tensor? cosine, Tensor? sine, Tensor(a!) keys, Tensor(b!) values, int start, Tensor? lengths, Tensor? slopes, "
      "int before, int after) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sightline, CPU, library) {
  library.impl("forward", TORCH_BOX(&sightline::forward));
  library.impl("observe", TORCH_BOX(&sightline::observe));
  library.impl("pool", TORCH_BOX(&sightline::pool));
  library.impl("backward", TORCH_BOX(&sightline::backward));
  library.impl("project", TORCH_BOX(&sightline::project));
  library.impl("norm", TORCH_BOX(&sightline::norm));
  library.impl("feed_forward", TORCH_BOX(&sightline::feed_forward));
  library.impl("attend", TORCH_BOX(&sightline::attend));
}

// For tests, the doctor and the benchmark, through ctypes.
extern "C" {
#define EXPORT __attribute__((visibility("default")))

// The name in use.
EXPORT const char* sightline_instructions() { return sightline::chosen.load()->name; }

// The i-th name that this CPU can run, best first; null after the last.
EXPORT const char* sightline_available(int64_t i) {
  for (const sightline::Kernels* kernels : sightline::all_kernels)
    if (sightline::runs_here(*kernels) && i-- == 0) return kernels->name;
  return nullptr;
}

// 1 if this CPU can run them; then all calls from now on do.
EXPORT int sightline_use_instructions(const char* name) {
  for (const sightline::Kernels* kernels : sightline::all_kernels)
    if (!std::strcmp(kernels->name, name) && sightline::runs_here(*kernels)) {
      sightline::chosen = kernels;
      return 1;
    }
  return 0;
}

// Nothing but multiply-adds in registers, on every thread; how many. 0 where there is no bf16 dot product.
EXPORT int64_t sightline_probe(int64_t rounds, int64_t threads, int dot) {
  const sightline::Kernels& kernels = *sightline::chosen.load();
  std::atomic<int64_t> all{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float out[12];
    all += kernels.probe(rounds, dot, out);
    __asm__ volatile("" : : "r"(out) : "memory");
  });
  return all;
}
}
