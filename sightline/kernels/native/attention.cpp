// The operators: arguments in, outputs allocated.
// Torch is reached through its stable ABI alone, so that one library serves torch 2.10 and newer and every Python.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "plan.h"
#include "registry.h"
#include "segments.h"
#include "steps.h"

namespace sightline {

const bool fetches_near = has_roomy_cache();

namespace {

// ---- forward ----

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
      "feed_forward(Tensor x, Tensor? norm, Tensor? norm_bias, float norm_epsilon, bool centered, Tensor? gate, "
      "Tensor? gate_bias, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, int curve) -> Tensor");
  library.def(
      "attend(Tensor x, Tensor? norm, Tensor? norm_bias, float norm_epsilon, bool centered, Tensor query, "
      "Tensor? query_bias, Tensor? key, Tensor? key_bias, Tensor? value, Tensor? value_bias, Tensor output, "
      "Tensor? output_bias, Tensor? query_norm, Tensor? key_norm, float epsilon, Tensor? cosine, Tensor? sine, "
      "Tensor(a!) keys, Tensor(b!) values, int start, Tensor? lengths, Tensor? slopes, int before, int after) -> "
      "Tensor");
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

// Whether products in float32 go by oneDNN, and whether they could.
EXPORT int sightline_by_onednn() { return sightline::by_onednn; }
EXPORT int sightline_has_onednn() { return sightline::has_onednn(); }
EXPORT void sightline_use_onednn(int use) { sightline::by_onednn = use && sightline::has_onednn(); }

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
