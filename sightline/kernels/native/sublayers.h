// The operators of a block's sublayers in a training step, forward and backward: norm, products by torch's library, and
// what stands between them, in one call each. Called one by one from Python, they would take as long to be called as
// half of the products.
#pragma once

#include "products.h"
#include "training.h"

namespace sightline {
namespace {

// ---- from float32 to the dtype of products and back ----

void convert(const Tensor& from, const Tensor& to, int64_t start) {
  int64_t width = from.size(from.dim() - 1), rows = width ? from.numel() / width : 0;
  Numbers source = of(from), target = of(to).at(start);
  const Kernels& kernels = *chosen.load();
  Blocks(rows).share(width, 8, [&](int64_t, int64_t first, int64_t last, float*) {
    kernels.convert(source.at(first * width), (last - first) * width, target.at(first * width));
  });
}

Tensor as_products(const Tensor& x, bool half) {
  STD_TORCH_CHECK(numeric(x, x.dim()), "sightline: a gradient must be float32 or bfloat16, contiguous");
  if (halved(x) == half) return x;
  ScalarType type = product_type(half);
  Tensor out = x.dim() == 1 ? empty({x.size(0)}, type) : empty({x.size(0), x.size(1)}, type);
  convert(x, out, 0);
  return out;
}

// Maps that stand side by side: their weights, and their biases if any has one, as one.
struct Maps {
  std::vector<Map> each;
  int64_t columns = 0;

  Maps(std::initializer_list<Map> maps, int64_t depth) : each(maps) {
    for (const Map& map : each) check_map(map, depth), columns += map.columns();
  }
  Tensor weight(bool half) const {
    const Tensor& first = each.front().weight;
    if (each.size() == 1) return as_products(first, half);
    Tensor out = empty({columns, first.size(1)}, product_type(half));
    int64_t start = 0;
    for (const Map& map : each) convert(map.weight, out, start), start += map.weight.numel();
    return out;
  }
  Maybe bias(bool half) const {
    bool any = false;
    for (const Map& map : each) any = any || map.bias;
    if (!any) return {};
    Tensor out = empty({columns}, product_type(half));
    std::memset(out.mutable_data_ptr(), 0, (size_t)columns * (half ? 2 : 4));
    int64_t start = 0;
    for (const Map& map : each) {
      if (map.bias) convert(*map.bias, out, start);
      start += map.columns();
    }
    return out;
  }
};

// Gradients of maps side by side, in float32; empty where they are not asked for.
Tensor by_weights(const Tensor& grad, const Tensor& x, bool wanted) {
  return wanted ? as_products(times(flipped(grad), x), false) : empty({0});
}

Tensor by_biases(const Tensor& grad, bool wanted) {
  if (!wanted) return empty({0});
  STD_TORCH_CHECK(numeric(grad, 2), "sightline: a gradient must be float32 or bfloat16 (rows columns), contiguous");
  int64_t width = grad.size(1);
  Blocks blocks(grad.size(0));
  Sums sums(blocks, width);
  Numbers from = of(grad);
  const Kernels& kernels = *chosen.load();
  blocks.share(width, 4, [&](int64_t index, int64_t first, int64_t last, float*) {
    float* sum = sums.of(index);
    for (int64_t row = first; row < last; ++row) kernels.join(sum, from.at(row * width), width, sum);
  });
  return sums.total();
}

// ---- what is added to the residual stream, and its gradient ----

Tensor with_added(const Tensor& x, const Tensor& added, double dropout, const Maybe& seed) {
  return join(x, dropout > 0 ? drop(added, dropout, *seed) : added);
}

Tensor by_added(const Tensor& grad, bool half, double dropout, const Maybe& seed) {
  Tensor by = as_products(grad, half);
  return dropout > 0 ? drop(by, dropout, *seed) : by;
}

void check_seed(double dropout, const Maybe& seed) {
  STD_TORCH_CHECK(dropout == 0 || (dropout > 0 && dropout < 1 && seed),
                  "sightline: dropout must be at least 0 and below 1, and needs a seed, one int64 on the CPU");
}

// ---- queries, keys and values: of norm(x) ----

// norm(x), the joined weights and what they make of it: (rows columns).
std::tuple<Tensor, Tensor, Tensor> heads(const Tensor& x, const Tensor& norm, const Maybe& norm_bias, double epsilon,
                                         bool centered, const Tensor& query, const Maybe& query_bias, const Tensor& key,
                                         const Maybe& key_bias, const Tensor& value, const Maybe& value_bias,
                                         bool half) {
  Tensor normed = row_norm(x, norm, norm_bias, epsilon, centered, half);
  Maps maps({{query, query_bias}, {key, key_bias}, {value, value_bias}}, x.size(1));
  Tensor weight = maps.weight(half);
  return {normed, weight, mapped(normed, weight, maps.bias(half))};
}

// From the gradient of the joined map: of x, with `beside` added, of the norm's weight and bias, of the maps' weights and biases.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> heads_backward(const Tensor& grad, const Tensor& x,
                                                                  const Tensor& norm, const Maybe& norm_bias,
                                                                  double epsilon, bool centered, const Tensor& normed,
                                                                  const Tensor& weight, const Tensor& beside,
                                                                  bool to_weights, bool to_biases) {
  auto [by_x, by_norm, by_norm_bias] =
      row_norm_backward(times(grad, weight), x, norm, norm_bias, epsilon, centered, beside);
  return {by_x, by_norm, by_norm_bias, by_weights(grad, normed, to_weights), by_biases(grad, to_biases)};
}

// ---- x + what a map makes of rows ----

std::tuple<Tensor, Tensor> write(const Tensor& x, const Tensor& rows, const Tensor& weight, const Maybe& bias,
                                 double dropout, const Maybe& seed, bool half) {
  check_seed(dropout, seed);
  Maps map({{weight, bias}}, rows.size(1));
  Tensor own = map.weight(half);
  return {with_added(x, mapped(rows, own, map.bias(half)), dropout, seed), own};
}

std::tuple<Tensor, Tensor, Tensor> write_backward(const Tensor& grad, const Tensor& rows, const Tensor& weight,
                                                  double dropout, const Maybe& seed, bool to_weight, bool to_bias) {
  check_seed(dropout, seed);
  Tensor by = by_added(grad, halved(weight), dropout, seed);
  return {times(by, weight), by_weights(by, rows, to_weight), by_biases(by, to_bias)};
}

// ---- x + down(activation(ups(norm(x)))) ----

// The output, norm(x), the joined weights, what they make of it, the activation of that, the weights down.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feed(
    const Tensor& x, const Tensor& norm, const Maybe& norm_bias, double epsilon, bool centered, const Tensor& first,
    const Maybe& first_bias, const Maybe& second, const Maybe& second_bias, const Tensor& down, const Maybe& down_bias,
    int64_t curve, double dropout, const Maybe& seed, bool half) {
  check_seed(dropout, seed);
  STD_TORCH_CHECK(!second || (curve_of(curve) == Curve::silu && plain(*second, 2) && plain(first, 2) &&
                              second->size(0) == first.size(0)),
                  "sightline: a gate goes with silu, and gate and up must have the same columns");
  Tensor normed = row_norm(x, norm, norm_bias, epsilon, centered, half);
  auto up_of = [&](const Maps& maps) { return std::make_pair(maps.weight(half), maps.bias(half)); };
  auto [up, up_bias] = second ? up_of(Maps({{first, first_bias}, {*second, second_bias}}, x.size(1)))
                              : up_of(Maps({{first, first_bias}}, x.size(1)));
  Tensor bent = mapped(normed, up, up_bias), hidden = bend(bent, curve, (bool)second);
  Maps below({{down, down_bias}}, hidden.size(1));
  Tensor own = below.weight(half);
  return {with_added(x, mapped(hidden, own, below.bias(half)), dropout, seed), normed, up, bent, hidden, own};
}

// Gradients of x, of the norm's weight and bias, of the ups' weights and biases, of the map down.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feed_backward(
    const Tensor& grad, const Tensor& x, const Tensor& norm, const Maybe& norm_bias, double epsilon, bool centered,
    const Tensor& normed, const Tensor& up, const Tensor& bent, const Tensor& hidden, const Tensor& down, int64_t curve,
    double dropout, const Maybe& seed, bool to_ups, bool to_up_biases, bool to_down, bool to_down_bias) {
  check_seed(dropout, seed);
  Tensor by = by_added(grad, halved(down), dropout, seed);
  Tensor by_bent = bend_backward(times(by, down), bent, curve, bent.size(1) != hidden.size(1));
  auto [by_x, by_norm, by_norm_bias] =
      row_norm_backward(times(by_bent, up), x, norm, norm_bias, epsilon, centered, grad);
  return {by_x, by_norm, by_norm_bias, by_weights(by_bent, normed, to_ups), by_biases(by_bent, to_up_biases),
          by_weights(by, hidden, to_down), by_biases(by, to_down_bias)};
}

}  // namespace
}  // namespace sightline
