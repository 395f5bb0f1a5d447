// One call of a kernel, forward, seeing and backward, without torch: inputs from standard input, results to standard
// output, cut into units as the operators cut them. What an emulator of another CPU can run. KERNELS names the table.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "problem.h"

using namespace sightline;

namespace sightline {
extern const Kernels KERNELS;
const bool fetches_near = false;
}

static const Kernels& kernels = KERNELS;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// NaN, that nothing may be read before it is written. Never freed: the process is one call.
template <typename T>
static T* memory(int64_t count) {
  size_t bytes = ((size_t)count * sizeof(T) + 127) / 64 * 64;
  return (T*)memset(aligned_alloc(64, bytes), 0xff, bytes);
}

template <typename T>
static T* read(int64_t count) {
  T* data = memory<T>(count);
  if (fread(data, sizeof(T), (size_t)count, stdin) != (size_t)count) exit(2);
  return data;
}

template <typename T>
static void write(const T* data, int64_t count) {
  if (fwrite(data, sizeof(T), (size_t)count, stdout) != (size_t)count) exit(2);
}

static void forward(const Call& call, bool seeing) {
  Plan plan = {};
  int64_t sharing = call.heads / call.groups, tiles = ceil_div(call.keys, kTile), heads = call.batch * call.heads;
  bool few = call.queries <= kFoldQueries && tiles > 1;
  plan.seeing = seeing, plan.strip_kept = call.received || call.map_block;
  plan.fold = few ? sharing : 1;
  plan.chunks = few ? tiles : 1, plan.chunk_tiles = 1;
  plan.block_rows = few ? plan.fold * call.queries : 2 * kernels.rows;
  if (plan.strip_kept && !few) plan.block_rows = call.map_block;
  plan.blocks = ceil_div(plan.fold * call.queries, plan.block_rows);
  plan.band_rows = plan.block_rows, plan.bands = plan.shares = plan.blocks;
  plan.packed_group = kernels.packed_group(call), plan.partial_state = kernels.partial_state(call, plan);
  int64_t folded = heads / plan.fold, units = folded * plan.blocks * plan.chunks;
  if (!few && !kernels.reads_directly(call)) {
    plan.packed = memory<float>(call.batch * call.groups * plan.packed_group);
    for (int64_t unit = 0; unit < call.batch * call.groups * tiles; ++unit) kernels.pack(call, plan, unit);
  }
  plan.partial = memory<float>(units * plan.partial_state);
  plan.strips = memory<float>(folded * kernels.strip_floats(call, plan, tiles));
  plan.shared_received = memory<float>(heads * plan.shares * call.keys);
  float* scratch = memory<float>(kernels.scratch_floats(call, plan));
  for (int64_t unit = 0; unit < units; ++unit) kernels.attend(call, plan, unit, scratch);
  for (int64_t unit = 0; unit < folded && plan.chunks > 1; ++unit) kernels.merge(call, plan, unit, scratch);
  for (int64_t unit = 0; unit < heads && call.received && plan.chunks == 1; ++unit) kernels.gather(call, plan, unit);
}

static void backward(const Call& call) {
  BackwardPlan plan = {};
  plan.blocks = ceil_div(call.queries, kernels.backward_rows), plan.shares = 2;
  kernels.plan_backward(call, plan);
  int64_t heads = call.batch * call.heads;
  plan.packed = memory<float>(heads * plan.blocks * plan.packed_block);
  plan.partial = memory<float>(heads * plan.shares * plan.partial_head);
  float* scratch = memory<float>(kernels.backward_scratch(call));
  for (int64_t unit = 0; unit < heads * plan.blocks; ++unit) kernels.pack_rows(call, plan, unit);
  for (int64_t unit = 0; unit < call.batch * call.groups * plan.shares; ++unit)
    kernels.backward(call, plan, unit, scratch);
  for (int64_t unit = 0; unit < heads * plan.blocks; ++unit) kernels.gather_queries(call, plan, unit);
}

int main() {
  const int64_t* sizes = read<int64_t>(13);
  Call call = {};
  call.dtype = (Dtype)sizes[0], call.batch = sizes[1], call.heads = sizes[2], call.groups = sizes[3];
  call.queries = sizes[4], call.keys = sizes[5], call.width = sizes[6], call.value_width = sizes[7];
  call.before = sizes[8], call.after = sizes[9], call.top = sizes[10], call.map_block = sizes[11];
  call.sink_keys = sizes[12], call.position = call.keys - call.queries;
  const float* numbers = read<float>(2);
  call.scale = numbers[0], call.softcap = numbers[1];
  int64_t bytes = call.dtype == Dtype::float32 ? 4 : 2, heads = call.batch * call.heads, rows = heads * call.queries;
  auto rows_of = [&](auto get, int64_t number, int64_t length, int64_t width) {
    return Strided{get(call.batch * number * length * width * bytes), number * length * width, length * width, width, 1};
  };
  call.query = rows_of(read<char>, call.heads, call.queries, call.width);
  call.key = rows_of(read<char>, call.groups, call.keys, call.width);
  call.value = rows_of(read<char>, call.groups, call.keys, call.value_width);
  call.grad_output = rows_of(read<char>, call.heads, call.queries, call.value_width);
  call.lengths = read<int64_t>(call.batch);
  Strided scores = {nullptr, call.heads * call.queries * call.keys, call.queries * call.keys, call.keys, 1};
  call.allowed = call.bias = scores;
  call.allowed.data = read<char>(rows * call.keys), call.bias.data = read<float>(rows * call.keys);
  call.slopes = read<float>(call.heads), call.sinks = read<float>(call.heads);

  call.output = rows_of(memory<char>, call.heads, call.queries, call.value_width);
  float** facts[] = {&call.logsumexp, &call.entropy, &call.distance, &call.sink, &call.row_sums};
  for (float** fact : facts) *fact = memory<float>(rows);
  call.top_weights = memory<float>(rows * call.top), call.top_keys = memory<int64_t>(rows * call.top);
  call.received = memory<float>(heads * call.keys);
  int64_t squares = heads * ceil_div(call.queries, call.map_block) * ceil_div(call.keys, call.map_block);
  call.map_sum = memory<float>(squares), call.map_max = memory<float>(squares);
  call.grad_query = rows_of(memory<char>, call.heads, call.queries, call.width);
  call.grad_key = rows_of(memory<char>, call.groups, call.keys, call.width);
  call.grad_value = rows_of(memory<char>, call.groups, call.keys, call.value_width);

  Call plain = call;
  plain.received = nullptr, plain.map_block = 0, plain.top = 0;
  plain.output = rows_of(memory<char>, call.heads, call.queries, call.value_width);
  forward(plain, false);
  forward(call, true);
  backward(call);
  for (const Strided& rows : {plain.output, call.output})
    write((const char*)rows.data, call.batch * rows.batch * bytes);
  for (float** fact : {&call.logsumexp, &call.entropy, &call.distance, &call.sink}) write(*fact, rows);
  write(call.top_weights, rows * call.top), write(call.top_keys, rows * call.top);
  write(call.received, heads * call.keys), write(call.map_sum, squares), write(call.map_max, squares);
  for (const Strided& rows : {call.grad_query, call.grad_key, call.grad_value})
    write((const char*)rows.data, call.batch * rows.batch * bytes);
}
