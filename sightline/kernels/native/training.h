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
  // body(index, first, last), where a number costs `cost` multiply-adds.
  template <typename Body>
  void share(int64_t columns, double cost, const Body& body) const {
    share_out(count, cost * (double)(rows * columns), 0, [&](int64_t index, float*) {
      body(index, index * block, std::min(rows, (index + 1) * block));
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

// ---- activations ----

Curve curve_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= (int64_t)Curve::gelu_tanh, "sightline: no such activation");
  return (Curve)number;
}

// Of (rows columns) the activation; `gated`: of the left half, times the right half.
Tensor bend(const Tensor& x, int64_t curve, bool gated) {
  STD_TORCH_CHECK(plain(x, 2) && (!gated || x.size(1) % 2 == 0),
                  "sightline: x must be float32 (rows columns), contiguous, of even columns where it is gated");
  Curve kind = curve_of(curve);
  int64_t rows = x.size(0), all = x.size(1), columns = gated ? all / 2 : all;
  Tensor out = empty({rows, columns});
  const Kernels& kernels = *chosen.load();
  Blocks(rows).share(columns, 12, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* own = floats(x) + row * all;
      kernels.bend(kind, own, gated ? own + columns : nullptr, columns, floats(out) + row * columns);
    }
  });
  return out;
}

Tensor bend_backward(const Tensor& grad, const Tensor& x, int64_t curve, bool gated) {
  Curve kind = curve_of(curve);
  STD_TORCH_CHECK(plain(x, 2) && plain(grad, 2) && grad.size(0) == x.size(0) &&
                      x.size(1) == grad.size(1) * (gated ? 2 : 1),
                  "sightline: grad and x must be float32 (rows columns), contiguous, and belong together");
  int64_t rows = x.size(0), all = x.size(1), columns = grad.size(1);
  Tensor out = empty({rows, all});
  const Kernels& kernels = *chosen.load();
  Blocks(rows).share(columns, 16, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* own = floats(x) + row * all;
      float* to_x = floats(out) + row * all;
      kernels.bend_back(kind, floats(grad) + row * columns, own, gated ? own + columns : nullptr, columns, to_x,
                        gated ? to_x + columns : nullptr);
    }
  });
  return out;
}

// ---- dropout ----

// Which numbers are dropped is a hash of the seed, one int64: the gradient is the same of the output's gradient.
Tensor drop(const Tensor& x, double dropout, const Tensor& seed) {
  STD_TORCH_CHECK(plain(x, 2) && dropout >= 0 && dropout < 1 && seed.scalar_type() == ScalarType::Long &&
                      seed.numel() == 1,
                  "sightline: expected x in float32 (rows width), contiguous, dropout under 1 and one int64 as its seed");
  Dropping by = {(uint64_t) * (const int64_t*)seed.data_ptr(),
                 (uint32_t)std::min(dropout * 4294967296.0, 4294967295.0), (float)(1 / (1 - dropout))};
  Tensor out = empty({x.size(0), x.size(1)});
  const Kernels& kernels = *chosen.load();
  Blocks(x.size(0)).share(x.size(1), 6, [&](int64_t, int64_t first, int64_t last) {
    kernels.drop_rows(by, floats(x), first, last, x.size(1), floats(out));
  });
  return out;
}

// ---- norms ----

void check_norm(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(plain(x, 2) && plain(weight, 1) && weight.size(0) == x.size(1),
                  "sightline: x and the norm's weight must be float32 (rows width) and (width), contiguous");
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  check_norm(x, weight);
  int64_t width = x.size(1);
  Tensor out = empty({x.size(0), width});
  const Kernels& kernels = *chosen.load();
  Blocks(x.size(0)).share(width, 4, [&](int64_t, int64_t first, int64_t last) {
    kernels.norm_rows(floats(x) + first * width, floats(weight), (float)epsilon, last - first, width,
                      floats(out) + first * width);
  });
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             double epsilon) {
  check_norm(x, weight), check_norm(grad, weight);
  STD_TORCH_CHECK(grad.size(0) == x.size(0), "sightline: grad and x must have the same rows");
  int64_t width = x.size(1);
  Tensor out = empty({x.size(0), width});
  Blocks blocks(x.size(0));
  Sums sums(blocks, width);
  const Kernels& kernels = *chosen.load();
  blocks.share(width, 8, [&](int64_t index, int64_t first, int64_t last) {
    kernels.norm_rows_back(floats(grad) + first * width, floats(x) + first * width, floats(weight), (float)epsilon,
                           last - first, width, floats(out) + first * width, sums.of(index));
  });
  return {out, sums.total()};
}

// ---- heads ----

// Queries, keys and values as one linear map makes them: (batch tokens columns), heads side by side.
struct Joined {
  int64_t batch, tokens, columns, of_queries, of_keys;
  HeadRow queries, keys;
  const float *cosine, *sine;

  Joined(const Tensor& joined, int64_t heads, int64_t groups, int64_t width, const Maybe& query_norm,
         const Maybe& key_norm, double epsilon, const Maybe& cosines, const Maybe& sines)
      : batch(joined.size(0)), tokens(joined.size(1)), columns(joined.size(2)), of_queries(heads * width),
        of_keys(groups * width), queries{heads, width, numbers(query_norm), (float)epsilon},
        keys{groups, width, numbers(key_norm), (float)epsilon}, cosine(numbers(cosines)), sine(numbers(sines)) {
    STD_TORCH_CHECK(plain(joined, 3) && heads > 0 && groups > 0 && width > 0 && columns >= of_queries + of_keys,
                    "sightline: expected float32 (batch tokens columns), contiguous, with room for all heads");
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
  STD_TORCH_CHECK(cosine || (query_norm && key_norm), "sightline: there is nothing to do to queries and keys");
  Tensor out = empty({all.batch, all.tokens, heads + groups, width});
  const Kernels& kernels = *chosen.load();
  Blocks(all.batch * all.tokens).share(all.of_queries + all.of_keys, 8, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float *x = floats(joined) + row * all.columns, *cosines = all.angle(all.cosine, row);
      const float* sines = all.angle(all.sine, row);
      float* to = floats(out) + row * (all.of_queries + all.of_keys);
      kernels.place_heads(all.queries, x, cosines, sines, to);
      kernels.place_heads(all.keys, x + all.of_queries, cosines, sines, to + all.of_queries);
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
  STD_TORCH_CHECK(plain(by_queries, 4) && plain(by_keys, 4) && plain(by_values, 4) &&
                      by_queries.numel() == rows * all.of_queries && by_keys.numel() == rows * all.of_keys &&
                      by_values.numel() == rows * of_values,
                  "sightline: gradients must be float32 (batch tokens heads width), contiguous, of the joined map");
  Tensor out = empty({all.batch, all.tokens, all.columns});
  Blocks blocks(rows);
  Sums query_sums(blocks, query_norm ? width : 0), key_sums(blocks, key_norm ? width : 0);
  const Kernels& kernels = *chosen.load();
  auto put = [&](const HeadRow& of, const float* grad, const float* x, int64_t row, float* to, float* to_norm) {
    if (!of.norm && !all.cosine) std::memcpy(to, grad, sizeof(float) * (size_t)(of.count * of.width));
    else kernels.place_heads_back(of, grad, x, all.angle(all.cosine, row), all.angle(all.sine, row), to, to_norm);
  };
  blocks.share(all.columns, 12, [&](int64_t index, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* x = floats(joined) + row * all.columns;
      float* to = floats(out) + row * all.columns;
      put(all.queries, floats(by_queries) + row * all.of_queries, x, row, to, query_sums.of(index));
      put(all.keys, floats(by_keys) + row * all.of_keys, x + all.of_queries, row, to + all.of_queries,
          key_sums.of(index));
      std::memcpy(to + all.of_queries + all.of_keys, floats(by_values) + row * of_values,
                  sizeof(float) * (size_t)of_values);
    }
  });
  return {out, query_sums.total(), key_sums.total()};
}

}  // namespace
}  // namespace sightline
