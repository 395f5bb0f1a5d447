// The operators for few rows, as when one token is decoded: what a layer does with them, in one call each. A library's
// operators would take longer to be called than to compute.
#pragma once

#include <cmath>
#include <cstring>

#include "plan.h"

namespace sightline {

namespace {

bool plain(const Tensor& tensor, int64_t axes) {
  return tensor.is_cpu() && tensor.dim() == axes && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous();
}

const float* numbers(const Maybe& tensor) { return tensor ? (const float*)tensor->data_ptr() : nullptr; }

// A linear map as it is given.
struct Map {
  const Tensor& weight;
  const Maybe& bias;
  int64_t columns() const { return weight.size(0); }
};

void check_map(const Map& map, int64_t depth) {
  STD_TORCH_CHECK(plain(map.weight, 2) && map.weight.size(1) == depth,
                  "sightline: weights must be float32 (columns depth), contiguous");
  STD_TORCH_CHECK(!map.bias || (plain(*map.bias, 1) && map.bias->size(0) == map.columns()),
                  "sightline: a bias must be float32 (columns), contiguous");
}

// Each thread has a share of the columns of every map, the same one at every call: its weights are read in the order of
// memory, and what the caches keep of them is near.
struct Share {
  int64_t index, count;
  int64_t begin(int64_t columns) const { return columns * index / count; }
  int64_t end(int64_t columns) const { return columns * (index + 1) / count; }
};

template <typename Body>
void share_evenly(int64_t columns, int64_t depth, const Body& body) {
  // A weight that comes from memory takes as long as eight multiply-adds.
  int64_t workers = workers_for(columns, 8.0 * (double)(columns * depth));
  if (workers == 1) return body(Share{0, 1});
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) body(Share{index, workers});
  });
}

// Up to three maps of the same rows, their outputs side by side: threads wake once.
Tensor project_all(const float* x, int64_t rows, int64_t depth, std::initializer_list<Map> given) {
  Projection maps[3];
  int64_t count = 0, columns = 0, before = 0;
  for (const Map& map : given) check_map(map, depth), columns += map.columns();
  Tensor out = empty({rows, columns});
  for (const Map& map : given) {
    maps[count++] = {x,      rows, depth, floats(map.weight), numbers(map.bias), floats(out) + before, map.columns(),
                     columns};
    before += map.columns();
  }
  const Kernels& kernels = *chosen.load();
  share_evenly(columns, depth, [&](Share own) {
    for (int64_t i = 0; i < count; ++i)
      kernels.project(maps[i], own.begin(maps[i].columns), own.end(maps[i].columns));
  });
  return out;
}

Tensor project(const Tensor& x, const Tensor& first, const Maybe& first_bias, const Maybe& second,
               const Maybe& second_bias, const Maybe& third, const Maybe& third_bias) {
  STD_TORCH_CHECK(plain(x, 2), "sightline: x must be float32 (rows depth), contiguous");
  int64_t rows = x.size(0), depth = x.size(1);
  Map one{first, first_bias};
  if (third) return project_all(floats(x), rows, depth, {one, {*second, second_bias}, {*third, third_bias}});
  if (second) return project_all(floats(x), rows, depth, {one, {*second, second_bias}});
  return project_all(floats(x), rows, depth, {one});
}

Tensor norm(const Tensor& x, const Maybe& weight, double epsilon) {
  STD_TORCH_CHECK(plain(x, 2), "sightline: x must be float32 (rows width), contiguous");
  int64_t rows = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(!weight || (plain(*weight, 1) && weight->size(0) == width),
                  "sightline: the norm's weight must be float32 (width), contiguous");
  Tensor out = empty({rows, width});
  for (int64_t row = 0; row < rows; ++row)
    chosen.load()->norm_row(floats(x) + row * width, numbers(weight), (float)epsilon, width, floats(out) + row * width);
  return out;
}

Norm norm_of(int64_t width, const Tensor& weight, const Maybe& bias, double epsilon, bool centered) {
  STD_TORCH_CHECK(plain(weight, 1) && weight.size(0) == width &&
                      (!bias || (plain(*bias, 1) && bias->size(0) == width && centered)),
                  "sightline: a norm's weight (width) and LayerNorm's bias (width) must be float32, contiguous, and "
                  "RMSNorm has no bias");
  return {floats(weight), numbers(bias), (float)epsilon, centered, width};
}

// A pre-norm sublayer, x + f(norm(x)), where there is a norm; else f(x).
struct Residual {
  const Tensor& x;
  Tensor rows;  // what f reads
  bool there;
  Residual(const Tensor& x, int64_t count, int64_t depth, int64_t columns, const Maybe& weight, const Maybe& bias,
           double epsilon, bool centered)
      : x(x), rows(x), there(weight) {
    if (!there) return;
    STD_TORCH_CHECK(columns == depth, "sightline: what is added to x must be as wide as x");
    Norm norm = norm_of(depth, *weight, bias, epsilon, centered);
    rows = empty({count, depth});
    chosen.load()->norm_rows(norm, floats(x), count, {rows.mutable_data_ptr(), Dtype::float32});
  }
  Tensor add(Tensor made) const {
    if (!there) return made;
    const float* from = floats(x);
    float* to = floats(made);
    for (int64_t i = 0, count = x.numel(); i < count; ++i) to[i] += from[i];
    return made;
  }
};

// Without a gate: that of max(x, 0), which is no `Curve`.
constexpr int64_t kRelu = -1;

// down(silu(gate x) * up x), or without a gate down(f(up x)), f of the number `curve`; with a norm x + that of norm(x).
Tensor feed_forward(const Tensor& input, const Maybe& norm, const Maybe& norm_bias, double epsilon, bool centered,
                    const Maybe& gate, const Maybe& gate_bias, const Tensor& up, const Maybe& up_bias,
                    const Tensor& down, const Maybe& down_bias, int64_t curve) {
  STD_TORCH_CHECK(plain(input, 2), "sightline: x must be float32 (rows depth), contiguous");
  int64_t rows = input.size(0), depth = input.size(1), width = up.size(0);
  Residual residual(input, rows, depth, down.size(0), norm, norm_bias, epsilon, centered);
  const Tensor& x = residual.rows;
  check_map({up, up_bias}, depth);
  if (gate) check_map({*gate, gate_bias}, depth);
  STD_TORCH_CHECK(!gate || gate->size(0) == width, "sightline: gate and up must have the same columns");
  STD_TORCH_CHECK(gate ? curve == (int64_t)Curve::silu : curve >= kRelu && curve <= (int64_t)Curve::gelu_tanh,
                  "sightline: no such activation, or a gate without silu");
  Tensor hidden = empty({2, rows, width});
  float *gates = gate ? floats(hidden) + rows * width : nullptr, *ups = floats(hidden);
  Projection by_gate = {}, by_up = {floats(x), rows, depth, floats(up), numbers(up_bias), ups, width, width};
  if (gate) by_gate = {floats(x), rows, depth, floats(*gate), numbers(gate_bias), gates, width, width};
  const Kernels& kernels = *chosen.load();
  share_evenly(width, gate ? 2 * depth : depth, [&](Share own) {
    int64_t first = own.begin(width), last = own.end(width);
    if (gate) kernels.project(by_gate, first, last);
    kernels.project(by_up, first, last);
    for (int64_t row = 0; row < rows; ++row) {
      float *own = ups + row * width + first, *gated = gate ? gates + row * width + first : nullptr;
      Numbers made = {own, Dtype::float32};
      if (gate || curve == kRelu) kernels.activate(gated, own, last - first);
      else kernels.bend((Curve)curve, made, {nullptr, Dtype::float32}, last - first, made);
    }
  });
  return residual.add(project_all(ups, rows, width, {{down, down_bias}}));
}

// A row of queries or keys: each head's part normed, then turned to its position.
struct Heads {
  const float *norm, *cosine, *sine;
  float epsilon;
  int64_t count, width;
  void place(float* row, int64_t position) const {
    const Kernels& kernels = *chosen.load();
    for (float* x = row; x < row + count * width; x += width) {
      if (norm) kernels.norm_row(x, norm, epsilon, width, x);
      if (cosine) kernels.turn_row(x, cosine + position * width, sine + position * width, width);
    }
  }
};

// Attention of the newest tokens (batch tokens depth), the first of which stands at `start`, with its maps. Their keys
// and values are put into the room for all tokens, (batch groups capacity width); without maps to them they are there.
// With a norm x + that of norm(x).
Tensor attend(const Tensor& x, const Maybe& norm, const Maybe& norm_bias, double norm_epsilon, bool centered,
              const Tensor& query, const Maybe& query_bias, const Maybe& key, const Maybe& key_bias,
              const Maybe& value, const Maybe& value_bias, const Tensor& output, const Maybe& output_bias,
              const Maybe& query_norm, const Maybe& key_norm, double epsilon, const Maybe& cosine, const Maybe& sine,
              const Tensor& keys, const Tensor& values, int64_t start, const Maybe& lengths, const Maybe& slopes,
              int64_t before, int64_t after) {
  STD_TORCH_CHECK(plain(x, 3), "sightline: x must be float32 (batch tokens depth), contiguous");
  STD_TORCH_CHECK(plain(keys, 4) && plain(values, 4), "sightline: keys and values must be float32 of 4 axes, contiguous");
  int64_t batch = x.size(0), tokens = x.size(1), depth = x.size(2), rows = batch * tokens, groups = keys.size(1);
  int64_t width = keys.size(3), value_width = values.size(3), capacity = keys.size(2), of_queries = query.size(0);
  int64_t heads = width ? of_queries / width : 0, stop = key ? start + tokens : start;
  STD_TORCH_CHECK(of_queries == heads * width && heads > 0 && groups > 0 && heads % groups == 0 && start >= 0 &&
                      stop <= capacity && keys.size(0) == batch && values.size(0) == batch &&
                      values.size(1) == groups && values.size(2) == capacity && !key == !value &&
                      (!key || (key->size(0) == groups * width && value->size(0) == groups * value_width)),
                  "sightline: the maps and the room for keys and values do not belong together");
  for (const Maybe* weight : {&query_norm, &key_norm})
    STD_TORCH_CHECK(!*weight || (plain(**weight, 1) && (*weight)->size(0) == width),
                    "sightline: a norm's weight must be float32 (width), contiguous");
  STD_TORCH_CHECK(!cosine == !sine, "sightline: cosine and sine come together");
  for (const Maybe* table : {&cosine, &sine})
    STD_TORCH_CHECK(!*table || (plain(**table, 2) && (*table)->size(0) >= stop && (*table)->size(1) == width && key),
                    "sightline: the tables must be float32 (positions width), contiguous, for all positions");
  STD_TORCH_CHECK(!lengths || (lengths->scalar_type() == ScalarType::Long && lengths->is_contiguous() &&
                               lengths->numel() == batch),
                  "sightline: lengths must be int64 (batch)");
  STD_TORCH_CHECK(!slopes || (plain(*slopes, 1) && slopes->size(0) == heads), "sightline: slopes must be float32 (heads)");
  Map by_query{query, query_bias};
  Residual residual(x, rows, depth, output.size(0), norm, norm_bias, norm_epsilon, centered);
  const float* read = floats(residual.rows);
  Tensor joined = key ? project_all(read, rows, depth, {by_query, {*key, key_bias}, {*value, value_bias}})
                      : project_all(read, rows, depth, {by_query});
  int64_t columns = joined.size(1);
  Heads queries{numbers(query_norm), numbers(cosine), numbers(sine), (float)epsilon, heads, width};
  Heads new_keys{numbers(key_norm), numbers(cosine), numbers(sine), (float)epsilon, groups, width};
  for (int64_t row = 0; row < rows; ++row) {
    float *own = floats(joined) + row * columns, *own_keys = own + of_queries, *own_values = own_keys + groups * width;
    int64_t position = start + row % tokens;
    queries.place(own, position);
    if (!key) continue;
    new_keys.place(own_keys, position);
    for (int64_t group = 0; group < groups; ++group) {
      int64_t place = (row / tokens * groups + group) * capacity + position;
      std::memcpy(floats(keys) + place * width, own_keys + group * width, sizeof(float) * (size_t)width);
      std::memcpy(floats(values) + place * value_width, own_values + group * value_width,
                  sizeof(float) * (size_t)value_width);
    }
  }
  Tensor seen = empty_rows(batch, heads, tokens, value_width, ScalarType::Float);
  Tensor logsumexp = empty({batch, heads, tokens});
  Call call = {};
  call.dtype = Dtype::float32;
  call.batch = batch, call.heads = heads, call.groups = groups, call.queries = tokens, call.keys = stop;
  call.width = width, call.value_width = value_width;
  call.query = {floats(joined), tokens * columns, width, columns, 1};
  call.key = strided(keys), call.value = strided(values);
  call.scale = (float)(1 / std::sqrt((double)width));
  call.before = before, call.after = after, call.position = stop - tokens;
  if (lengths) call.lengths = (const int64_t*)lengths->data_ptr();
  call.slopes = numbers(slopes);
  call.output = strided(seen), call.logsumexp = floats(logsumexp);
  run_forward(call, false);
  return residual.add(project_all(floats(seen), rows, heads * value_width, {{output, output_bias}}));
}

}  // namespace
}  // namespace sightline
