// The operators between the matrix products of a training step: activations and gates, dropout, norms, heads put in their place;
// each with its gradient. Rows are shared out; what adds up over rows does so in an order that knows no threads.
#pragma once

#include <cstring>
#include <vector>

#include "instructions.h"
#include "steps.h"
#include "tensors.h"
#include "threads.h"

namespace sightline {
namespace {

// Rows in blocks, as many as their number alone says: each block has sums of its own.
struct Blocks {
  static constexpr int64_t kMost = 64, kRows = 16;
  int64_t rows, block, count;
  explicit Blocks(int64_t all)
      : rows(all), block(std::max(kRows, (all + kMost - 1) / kMost)), count((all + block - 1) / block) {}
  // body(index, first, last, scratch), where a number costs `cost` multiply-adds.
  template <typename Body>
  void share(int64_t columns, double cost, const Body& body, int64_t scratch_floats = 0) const {
    share_out(count, cost * (double)(rows * columns), scratch_floats, [&](int64_t index, float* scratch) {
      body(index, index * block, std::min(rows, (index + 1) * block), scratch);
    });
  }
};

// Sums over rows, `width` wide, of each block apart, so that they can be added in one order.
struct Sums {
  static constexpr int64_t kApart = 32;  // floats between two: threads must not write to one line of the cache
  int64_t blocks, width;
  std::vector<float> numbers;
  Sums(const Blocks& of, int64_t width)
      : blocks(of.count), width(width), numbers((size_t)(of.count * (width + kApart)), 0.0f) {}
  float* of(int64_t block) { return numbers.data() + block * (width + kApart); }
  Tensor total() {
    Tensor out = empty({width});
    for (int64_t j = 0; j < width; ++j) {
      float sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += of(block)[j];
      floats(out)[j] = sum;
    }
    return out;
  }
};

bool halved(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

// Contiguous float32 or bfloat16.
bool numeric(const Tensor& tensor, int64_t axes) {
  return tensor.is_cpu() && tensor.dim() == axes && tensor.is_contiguous() &&
         (tensor.scalar_type() == ScalarType::Float || halved(tensor));
}

bool alike(const Tensor& one, const Tensor& other) { return one.scalar_type() == other.scalar_type(); }

Numbers of(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), halved(tensor) ? Dtype::bfloat16 : Dtype::float32};
}

// Pointers are asked for before the rows are gone through: torch's stable ABI takes as long to tell one as a row takes.
constexpr Numbers kNothing = {nullptr, Dtype::float32};

// ---- activations ----

Curve curve_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= (int64_t)Curve::gelu_tanh, "sightline: no such activation");
  return (Curve)number;
}

// Of (rows columns) the activation; `gated`: of the left half, times the right half.
Tensor bend(const Tensor& x, int64_t curve, bool gated) {
  STD_TORCH_CHECK(numeric(x, 2) && (!gated || x.size(1) % 2 == 0),
                  "sightline: x must be float32 or bfloat16 (rows columns), contiguous, of even columns if it is gated");
  Curve kind = curve_of(curve);
  int64_t rows = x.size(0), all = x.size(1), columns = gated ? all / 2 : all;
  Tensor out = empty({rows, columns}, x.scalar_type());
  const Kernels& kernels = *chosen.load();
  Numbers from = of(x), to = of(out);
  Blocks(rows).share(columns, 12, [&](int64_t, int64_t first, int64_t last, float*) {
    for (int64_t row = first; row < last; ++row) {
      Numbers own = from.at(row * all);
      kernels.bend(kind, own, gated ? own.at(columns) : kNothing, columns, to.at(row * columns));
    }
  });
  return out;
}

Tensor bend_backward(const Tensor& grad, const Tensor& x, int64_t curve, bool gated) {
  Curve kind = curve_of(curve);
  STD_TORCH_CHECK(numeric(x, 2) && numeric(grad, 2) && alike(x, grad) && grad.size(0) == x.size(0) &&
                      x.size(1) == grad.size(1) * (gated ? 2 : 1),
                  "sightline: grad and x must be float32 or bfloat16 (rows columns), contiguous, and belong together");
  int64_t rows = x.size(0), all = x.size(1), columns = grad.size(1);
  Tensor out = empty({rows, all}, x.scalar_type());
  const Kernels& kernels = *chosen.load();
  Numbers from = of(x), grads = of(grad), to = of(out);
  Blocks(rows).share(columns, 16, [&](int64_t, int64_t first, int64_t last, float*) {
    for (int64_t row = first; row < last; ++row) {
      Numbers own = from.at(row * all), to_x = to.at(row * all);
      kernels.bend_back(kind, grads.at(row * columns), own, gated ? own.at(columns) : kNothing, columns, to_x,
                        gated ? to_x.at(columns) : kNothing);
    }
  });
  return out;
}

// ---- dropout, and the residual stream ----

// Which numbers are dropped is a hash of the seed, one int64: the gradient is the same of the output's gradient.
Tensor drop(const Tensor& x, double dropout, const Tensor& seed) {
  STD_TORCH_CHECK(numeric(x, 2) && dropout >= 0 && dropout < 1 && seed.is_cpu() && seed.numel() == 1 &&
                      seed.scalar_type() == ScalarType::Long,
                  "sightline: expected x in float32 or bfloat16 (rows width), contiguous, dropout of at least 0 and "
                  "below 1, and one int64 on the CPU as its seed");
  Dropping by = {(uint64_t) * (const int64_t*)seed.data_ptr(),
                 (uint32_t)std::min(dropout * 4294967296.0, 4294967295.0), (float)(1 / (1 - dropout))};
  Tensor out = empty({x.size(0), x.size(1)}, x.scalar_type());
  const Kernels& kernels = *chosen.load();
  Blocks(x.size(0)).share(x.size(1), 6, [&](int64_t, int64_t first, int64_t last, float*) {
    kernels.drop_rows(by, of(x), first, last, x.size(1), of(out));
  });
  return out;
}

// x + added, in float32.
Tensor join(const Tensor& x, const Tensor& added) {
  STD_TORCH_CHECK(plain(x, 2) && numeric(added, 2) && x.size(0) == added.size(0) && x.size(1) == added.size(1),
                  "sightline: x must be float32 (rows width), contiguous, and what is added of its shape");
  int64_t width = x.size(1);
  Tensor out = empty({x.size(0), width});
  const Kernels& kernels = *chosen.load();
  Blocks(x.size(0)).share(width, 6, [&](int64_t, int64_t first, int64_t last, float*) {
    kernels.join(floats(x) + first * width, of(added).at(first * width), (last - first) * width,
                 floats(out) + first * width);
  });
  return out;
}

// ---- norms ----

Norm norm_of(const Tensor& x, const Tensor& weight, const Maybe& bias, double epsilon, bool centered) {
  STD_TORCH_CHECK(plain(x, 2), "sightline: x must be float32 (rows width), contiguous");
  return norm_of(x.size(1), weight, bias, epsilon, centered);
}

ScalarType product_type(bool half) { return half ? ScalarType::BFloat16 : ScalarType::Float; }

// RMSNorm; `centered`: LayerNorm. `half`: in bfloat16.
Tensor row_norm(const Tensor& x, const Tensor& weight, const Maybe& bias, double epsilon, bool centered, bool half) {
  Norm norm = norm_of(x, weight, bias, epsilon, centered);
  Tensor out = empty({x.size(0), norm.width}, product_type(half));
  const Kernels& kernels = *chosen.load();
  Blocks(x.size(0)).share(norm.width, 8, [&](int64_t, int64_t first, int64_t last, float*) {
    kernels.norm_rows(norm, floats(x) + first * norm.width, last - first, of(out).at(first * norm.width));
  });
  return out;
}

// Gradients of x, of the weight and of the bias (empty without one); x's with `beside` added, if there is any.
std::tuple<Tensor, Tensor, Tensor> row_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                     const Maybe& bias, double epsilon, bool centered,
                                                     const Maybe& beside) {
  Norm norm = norm_of(x, weight, bias, epsilon, centered);
  STD_TORCH_CHECK(numeric(grad, 2) && grad.size(0) == x.size(0) && grad.size(1) == norm.width &&
                      (!beside || (plain(*beside, 2) && beside->size(0) == x.size(0) && beside->size(1) == norm.width)),
                  "sightline: the gradient, and what is added to x's, must have the shape of x, contiguous");
  Tensor out = empty({x.size(0), norm.width});
  Blocks blocks(x.size(0));
  Sums sums(blocks, norm.width), bias_sums(blocks, bias ? norm.width : 0);
  const Kernels& kernels = *chosen.load();
  blocks.share(norm.width, 8, [&](int64_t index, int64_t first, int64_t last, float*) {
    int64_t at = first * norm.width;
    kernels.norm_rows_back(norm, of(grad).at(at), floats(x) + at, beside ? floats(*beside) + at : nullptr,
                           last - first, floats(out) + at, sums.of(index), bias_sums.of(index));
  });
  return {out, sums.total(), bias_sums.total()};
}

// ---- heads ----

// Queries, keys and values as one linear map makes them: (batch tokens columns), heads side by side.
struct Joined {
  int64_t batch, tokens, columns, of_queries, of_keys;
  HeadRow queries, keys;
  const float *cosine, *sine;

  Joined(const Tensor& joined, int64_t heads, int64_t groups, int64_t width, const Maybe& query_norm,
         const Maybe& key_norm, double epsilon, const Maybe& cosines, const Maybe& sines)
      : batch(joined.size(0)), tokens(joined.size(1)), columns(joined.size(2)),
        queries{heads, width, numbers(query_norm), (float)epsilon},
        keys{groups, width, numbers(key_norm), (float)epsilon}, cosine(numbers(cosines)), sine(numbers(sines)) {
    STD_TORCH_CHECK(numeric(joined, 3) && heads > 0 && groups > 0 && width > 0 && columns / width >= heads &&
                        columns / width - heads >= groups,
                    "sightline: expected float32 or bfloat16 (batch tokens columns), contiguous, with room for all heads");
    of_queries = heads * width, of_keys = groups * width;
    for (const Maybe* weight : {&query_norm, &key_norm})
      STD_TORCH_CHECK(!*weight || (plain(**weight, 1) && (*weight)->size(0) == width),
                      "sightline: a norm's weight must be float32 (width), contiguous");
    STD_TORCH_CHECK(!cosine == !sine && (!cosine || width % 2 == 0), "sightline: tables come together, of even width");
    for (const Maybe* table : {&cosines, &sines})
      STD_TORCH_CHECK(!*table || (plain(**table, 2) && (*table)->size(0) >= tokens && (*table)->size(1) == width),
                      "sightline: the tables must be float32 (positions width), contiguous, for all tokens");
  }
  const float* angle(const float* table, int64_t row) const {
    return table ? table + row % tokens * queries.width : nullptr;
  }
};

// Queries, then keys, (batch tokens heads + groups width): normed and turned.
Tensor place(const Tensor& joined, int64_t heads, int64_t groups, int64_t width, const Maybe& query_norm,
             const Maybe& key_norm, double epsilon, const Maybe& cosine, const Maybe& sine) {
  Joined all(joined, heads, groups, width, query_norm, key_norm, epsilon, cosine, sine);
  Tensor out = empty({all.batch, all.tokens, heads + groups, width}, joined.scalar_type());
  Numbers from = of(joined), into = of(out);
  const Kernels& kernels = *chosen.load();
  int64_t placed = all.of_queries + all.of_keys;
  Blocks(all.batch * all.tokens).share(placed, 8, [&](int64_t, int64_t first, int64_t last, float*) {
    for (int64_t row = first; row < last; ++row) {
      Numbers x = from.at(row * all.columns), to = into.at(row * placed);
      const float *cosines = all.angle(all.cosine, row), *sines = all.angle(all.sine, row);
      kernels.place_heads(all.queries, x, cosines, sines, to);
      kernels.place_heads(all.keys, x.at(all.of_queries), cosines, sines, to.at(all.of_queries));
    }
  });
  return out;
}

// Gradients of placed queries and keys and of values, each (batch tokens heads width), become those of `joined` and of
// the norms (empty without them).
std::tuple<Tensor, Tensor, Tensor> place_backward(const Tensor& by_queries, const Tensor& by_keys,
                                                  const Tensor& by_values, const Tensor& joined, int64_t heads,
                                                  int64_t groups, int64_t width, const Maybe& query_norm,
                                                  const Maybe& key_norm, double epsilon, const Maybe& cosine,
                                                  const Maybe& sine) {
  Joined all(joined, heads, groups, width, query_norm, key_norm, epsilon, cosine, sine);
  int64_t rows = all.batch * all.tokens, of_values = all.columns - all.of_queries - all.of_keys;
  STD_TORCH_CHECK(numeric(by_queries, 4) && numeric(by_keys, 4) && numeric(by_values, 4) &&
                      alike(by_queries, joined) && alike(by_keys, joined) && alike(by_values, joined) &&
                      by_queries.numel() == rows * all.of_queries && by_keys.numel() == rows * all.of_keys &&
                      by_values.numel() == rows * of_values,
                  "sightline: gradients must be (batch tokens heads width), contiguous, of the map and its dtype");
  Tensor out = empty({all.batch, all.tokens, all.columns}, joined.scalar_type());
  Blocks blocks(rows);
  Sums query_sums(blocks, query_norm ? width : 0), key_sums(blocks, key_norm ? width : 0);
  const Kernels& kernels = *chosen.load();
  Numbers from = of(joined), to_joined = of(out);
  Numbers queries = of(by_queries), keys = of(by_keys), values = of(by_values);
  size_t size = halved(joined) ? 2 : 4;
  auto put = [&](const HeadRow& row_of, Numbers grad, Numbers x, int64_t row, Numbers to, float* to_norm,
                 float* scratch) {
    const float *cosines = all.angle(all.cosine, row), *sines = all.angle(all.sine, row);
    if (row_of.norm || cosines) kernels.place_heads_back(row_of, grad, x, cosines, sines, to, to_norm, scratch);
    else std::memcpy(to.data, grad.data, size * (size_t)(row_of.count * row_of.width));
  };
  auto share = [&](int64_t index, int64_t first, int64_t last, float* scratch) {
    for (int64_t row = first; row < last; ++row) {
      Numbers x = from.at(row * all.columns), to = to_joined.at(row * all.columns);
      put(all.queries, queries.at(row * all.of_queries), x, row, to, query_sums.of(index), scratch);
      put(all.keys, keys.at(row * all.of_keys), x.at(all.of_queries), row, to.at(all.of_queries),
          key_sums.of(index), scratch);
      std::memcpy(to.at(all.of_queries + all.of_keys).data, values.at(row * of_values).data,
                  size * (size_t)of_values);
    }
  };
  blocks.share(all.columns, 12, share, width);
  return {out, query_sums.total(), key_sums.total()};
}

}  // namespace
}  // namespace sightline
