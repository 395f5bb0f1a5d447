// What stands between the matrix products of a training step, forward and backward, each in one pass over memory:
// activations and gates, dropout, norms, heads normed and turned.
#pragma once

#include "dropout.h"

namespace sightline {
namespace {

// `load_some` and `store_some` for loops whose last turn alone is not whole: a masked store costs many times a plain one.
template <typename T>
INLINE V load_most(const T* p, int64_t n) { return n >= kLanes ? load(p) : load_some(p, (int)n); }
template <typename T>
INLINE void store_most(T* p, V x, int64_t n) {
  if (n >= kLanes) store(p, x);
  else store_some(p, x, (int)n);
}

// work(a null pointer of the numbers' own type).
template <typename Work>
INLINE void by_type(Numbers numbers, const Work& work) {
  if (numbers.dtype == Dtype::bfloat16) work((bfloat16*)nullptr);
  else work((float*)nullptr);
}

template <typename T>
constexpr bool kRough = sizeof(T) == 2;

// ---- activations: x times a step from 0 to 1; kIsRough: for bfloat16, which keeps 8 bits, to 12 and more ----

template <bool kIsRough>
INLINE V exponential(V x) {
  if constexpr (!kIsRough) return exp(x);
  x = max(splat(kLeastExponent), x);  // as in exp
  V n = nearest_whole(x, 1.44269504f), r = fnma(n, splat(0.693147182f), x);
  V y = fma(fma(fma(splat(0.1656666f), r, splat(0.50496355f)), r, splat(1.00016432f)), r, splat(0.99992807f));
  return scale_by_power(y, n, x);
}

template <bool kIsRough>
INLINE V inverse(V x) {
#if defined(__AVX512F__)
  if constexpr (kIsRough) return _mm512_rcp14_ps(x);
#endif
  return div(splat(1.0f), x);
}

// 1 / (1 + e^-x), and its slope without a difference that would cancel.
template <bool kIsRough>
INLINE V logistic(V x, V* slope) {
  V minus = sub(zero(), x);
  V power = exponential<kIsRough>(where_less(splat(88.0f), minus, splat(88.0f), minus));  // in this order NaN stays
  V s = inverse<kIsRough>(add(splat(1.0f), power));
  *slope = mul(mul(power, s), s);
  return s;
}

struct Silu {
  template <bool kIsRough>
  INLINE V step(V x, V* slope) { return logistic<kIsRough>(x, slope); }
};

// The normal distribution: near 0 its odd series; beyond, e^(-x^2/2) times a polynomial of 1 / (1 + p |x|), which is
// exact relative to the small values that it has. All polynomials are least in their largest relative error.
struct Gelu {
  template <bool kIsRough>
  INLINE V step(V x, V* slope) {
    V square = mul(x, x), size = abs(x);
    V bell = exponential<kIsRough>(mul(square, splat(-0.5f)));
    *slope = mul(bell, splat(0.39894228f));
    if constexpr (kIsRough) {
      V u = inverse<true>(fma(size, splat(0.37f), splat(1.0f)));
      V q = fma(fma(splat(-0.0911581f), u, splat(0.21180126f)), u, splat(0.07462606f));
      q = mul(mul(fma(fma(q, u, splat(0.15787712f)), u, splat(0.14686315f)), u), bell);
      return where_less(x, zero(), q, sub(splat(1.0f), q));
    }
    V y = splat(-6.80959943e-6f);
    y = fma(y, square, splat(1.11041594e-4f));
    y = fma(y, square, splat(-1.18383789e-3f));
    y = fma(y, square, splat(9.97228323e-3f));
    y = fma(y, square, splat(-6.64902081e-2f));
    y = fma(y, square, splat(0.398942277f));
    V near = fma(y, x, splat(0.5f));
    V u = div(splat(1.0f), fma(size, splat(0.34f), splat(1.0f)));
    V q = splat(-7.04834788e-2f);
    q = fma(q, u, splat(0.110640939f));
    q = fma(q, u, splat(6.31488316e-2f));
    q = fma(q, u, splat(0.125333152f));
    q = fma(q, u, splat(0.13507309f));
    q = fma(q, u, splat(0.135663517f));
    q = mul(mul(q, u), bell);
    V far = where_less(x, zero(), q, sub(splat(1.0f), q));
    return where_less(size, splat(1.25f), near, far);
  }
};

// (1 + tanh(z)) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3) is the logistic function of 2 z.
struct GeluTanh {
  template <bool kIsRough>
  INLINE V step(V x, V* slope) {
    V square = mul(x, x);
    V s = logistic<kIsRough>(mul(x, fma(square, splat(0.0713548163f), splat(1.59576912f))), slope);
    *slope = mul(*slope, fma(square, splat(0.214064449f), splat(1.59576912f)));
    return s;
  }
};

// out = x step(x), times `up` if there is one.
template <typename Step, typename T>
void bend_row(const T* x, const T* up, int64_t count, T* out) {
  for (int64_t j = 0; j < count; j += kLanes) {
    V slope, at = load_most(x + j, count - j), bent = mul(at, Step::template step<kRough<T>>(at, &slope));
    store_most(out + j, up ? mul(bent, load_most(up + j, count - j)) : bent, count - j);
  }
}

// Its gradient: to x, and to `up` if there is one.
template <typename Step, typename T>
void bend_row_back(const T* grad, const T* x, const T* up, int64_t count, T* to_x, T* to_up) {
  for (int64_t j = 0; j < count; j += kLanes) {
    V slope, at = load_most(x + j, count - j), step = Step::template step<kRough<T>>(at, &slope);
    V by = load_most(grad + j, count - j);
    if (up) {
      store_most(to_up + j, mul(by, mul(at, step)), count - j);
      by = mul(by, load_most(up + j, count - j));
    }
    store_most(to_x + j, mul(by, fma(at, slope, step)), count - j);
  }
}

static void bend(Curve curve, Numbers from, Numbers beside, int64_t count, Numbers to) {
  by_type(from, [&](auto* type) {
    auto *x = (decltype(type))from.data, *up = (decltype(type))beside.data, *out = (decltype(type))to.data;
    if (curve == Curve::silu) bend_row<Silu>(x, up, count, out);
    else if (curve == Curve::gelu) bend_row<Gelu>(x, up, count, out);
    else bend_row<GeluTanh>(x, up, count, out);
  });
}

static void bend_back(Curve curve, Numbers grads, Numbers from, Numbers beside, int64_t count, Numbers to,
                      Numbers to_beside) {
  by_type(from, [&](auto* type) {
    auto *x = (decltype(type))from.data, *up = (decltype(type))beside.data, *grad = (decltype(type))grads.data;
    auto *to_x = (decltype(type))to.data, *to_up = (decltype(type))to_beside.data;
    if (curve == Curve::silu) bend_row_back<Silu>(grad, x, up, count, to_x, to_up);
    else if (curve == Curve::gelu) bend_row_back<Gelu>(grad, x, up, count, to_x, to_up);
    else bend_row_back<GeluTanh>(grad, x, up, count, to_x, to_up);
  });
}

// ---- dropout, and the residual stream ----

static void drop_rows(const Dropping& by, Numbers from, int64_t first, int64_t last, int64_t width, Numbers to) {
  by_type(from, [&](auto* type) {
    auto *x = (decltype(type))from.data, *out = (decltype(type))to.data;
    for (int64_t row = first; row < last; ++row) {
      Place place = place_of(by.seed, row);
      for (int64_t j = 0; j < width; j += kLanes)
        store_most(out + row * width + j,
                   mul(load_most(x + row * width + j, width - j), kept(by.dropped, by.kept, place, j)), width - j);
    }
  });
}

static void join(const float* x, Numbers added, int64_t count, float* out) {
  by_type(added, [&](auto* type) {
    auto* more = (decltype(type))added.data;
    for (int64_t j = 0; j < count; j += kLanes)
      store_most(out + j, add(load_most(x + j, count - j), load_most(more + j, count - j)), count - j);
  });
}

static void convert(Numbers from, int64_t count, Numbers to) {
  by_type(from, [&](auto* type) {
    auto* x = (decltype(type))from.data;
    by_type(to, [&](auto* other) {
      auto* out = (decltype(other))to.data;
      for (int64_t j = 0; j < count; j += kLanes) store_most(out + j, load_most(x + j, count - j), count - j);
    });
  });
}

// ---- norms: y = x r weight, with r = 1 / sqrt(mean(x^2) + epsilon) ----

template <typename X, typename Y>
INLINE float dot_row(const X* x, const Y* y, int64_t width) {
  V sums[2] = {zero(), zero()};  // two chains hide an addition's latency; rows are too short for more
  int64_t j = 0;
  for (; j + 2 * kLanes <= width; j += 2 * kLanes)
    for (int i = 0; i < 2; ++i) sums[i] = fma(load(x + j + i * kLanes), load(y + j + i * kLanes), sums[i]);
  for (; j < width; j += kLanes)
    sums[0] = fma(load_most(x + j, width - j), load_most(y + j, width - j), sums[0]);
  return sum_lanes(add(sums[0], sums[1]));
}

template <typename X>
INLINE float norm_factor(const X* x, float epsilon, int64_t width) {
  return 1.0f / __builtin_sqrtf(dot_row(x, x, width) / (float)width + epsilon);
}

template <typename T>
INLINE void scaled_row(const float* x, const float* weight, float epsilon, int64_t width, T* out) {
  V factor = splat(norm_factor(x, epsilon, width));
  for (int64_t j = 0; j < width; j += kLanes)
    store_most(out + j, mul(mul(load_most(x + j, width - j), factor), load_most(weight + j, width - j)), width - j);
}

// To x: r (g - y' mean(g y')) with g = grad weight and y' = x r; to the weight, added: grad y'. `out` may be `grad`.
// `beside`, if any, is added to x's.
template <typename G, typename X, typename T>
INLINE void scaled_row_back(const G* grad, const X* x, const float* weight, const float* beside, float epsilon,
                          int64_t width, T* out, float* to_weight) {
  float factor = norm_factor(x, epsilon, width);
  V sum = zero(), r = splat(factor);
  for (int64_t j = 0; j < width; j += kLanes) {
    V by = mul(load_most(grad + j, width - j), load_most(x + j, width - j));
    sum = fma(by, load_most(weight + j, width - j), sum);
    store_most(to_weight + j, fma(by, r, load_most(to_weight + j, width - j)), width - j);
  }
  V along = splat(sum_lanes(sum) * factor * factor / (float)width);
  for (int64_t j = 0; j < width; j += kLanes) {
    V by = mul(load_most(grad + j, width - j), load_most(weight + j, width - j));
    by = mul(r, fnma(along, load_most(x + j, width - j), by));
    store_most(out + j, beside ? add(load_most(beside + j, width - j), by) : by, width - j);
  }
}

// A row's mean, and 1 / sqrt(variance + epsilon): two passes, for the square of a large mean would drown the variance.
struct Centre {
  float mean, factor;
};

INLINE Centre centre_of(const float* x, float epsilon, int64_t width) {
  V sum = zero(), square = zero();
  for (int64_t j = 0; j < width; j += kLanes) sum = add(sum, load_most(x + j, width - j));
  float mean = sum_lanes(sum) / (float)width;
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    V apart = sub(load(x + j), splat(mean));
    square = fma(apart, apart, square);
  }
  float total = sum_lanes(square);
  for (; j < width; ++j) total += (x[j] - mean) * (x[j] - mean);
  return {mean, 1.0f / __builtin_sqrtf(total / (float)width + epsilon)};
}

template <typename T>
INLINE void centred_row(const Norm& norm, const float* x, T* out) {
  Centre at = centre_of(x, norm.epsilon, norm.width);
  for (int64_t j = 0, n = norm.width; j < norm.width; j += kLanes, n -= kLanes) {
    V y = mul(mul(sub(load_most(x + j, n), splat(at.mean)), splat(at.factor)), load_most(norm.weight + j, n));
    store_most(out + j, norm.bias ? add(y, load_most(norm.bias + j, n)) : y, n);
  }
}

// To x: r (g - mean(g) - y' mean(g y')) with y' = (x - mean) r.
template <typename G>
INLINE void centred_row_back(const Norm& norm, const G* grad, const float* x, const float* beside, float* out,
                             float* to_weight, float* to_bias) {
  Centre at = centre_of(x, norm.epsilon, norm.width);
  V mean = splat(at.mean), r = splat(at.factor), sum = zero(), product = zero();
  for (int64_t j = 0, n = norm.width; j < norm.width; j += kLanes, n -= kLanes) {
    V by = load_most(grad + j, n), y = mul(sub(load_most(x + j, n), mean), r);
    V g = mul(by, load_most(norm.weight + j, n));  // 0 beyond the width, whatever y is there
    sum = add(sum, g), product = fma(g, y, product);
    store_most(to_weight + j, fma(by, y, load_most(to_weight + j, n)), n);
    if (norm.bias) store_most(to_bias + j, add(by, load_most(to_bias + j, n)), n);
  }
  V level = splat(sum_lanes(sum) / (float)norm.width), along = splat(sum_lanes(product) / (float)norm.width);
  for (int64_t j = 0, n = norm.width; j < norm.width; j += kLanes, n -= kLanes) {
    V y = mul(sub(load_most(x + j, n), mean), r);
    V g = sub(mul(load_most(grad + j, n), load_most(norm.weight + j, n)), level);
    g = mul(r, fnma(along, y, g));
    store_most(out + j, beside ? add(load_most(beside + j, n), g) : g, n);
  }
}

static void norm_rows(const Norm& norm, const float* x, int64_t rows, Numbers to) {
  by_type(to, [&](auto* type) {
    auto* out = (decltype(type))to.data;
    for (int64_t row = 0; row < rows; ++row, x += norm.width, out += norm.width) {
      if (norm.centered) centred_row(norm, x, out);
      else scaled_row(x, norm.weight, norm.epsilon, norm.width, out);
    }
  });
}

static void norm_rows_back(const Norm& norm, Numbers grads, const float* x, const float* beside, int64_t rows,
                           float* out, float* to_weight, float* to_bias) {
  by_type(grads, [&](auto* type) {
    auto* grad = (decltype(type))grads.data;
    for (int64_t row = 0; row < rows; ++row, grad += norm.width, x += norm.width, out += norm.width) {
      const float* more = beside ? beside + row * norm.width : nullptr;
      if (norm.centered) centred_row_back(norm, grad, x, more, out, to_weight, to_bias);
      else scaled_row_back(grad, x, norm.weight, more, norm.epsilon, norm.width, out, to_weight);
    }
  });
}

// ---- heads ----

// Each pair (x[i], x[i + half]), normed if there is a norm, is turned.
template <typename T>
INLINE void turn_head(const T* x, const float* norm, float factor, const float* cosine, const float* sine,
                      int64_t width, T* out) {
  int64_t half = width / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    int64_t n = half - j;
    V left = load_most(x + j, n), right = load_most(x + half + j, n);
    if (norm) {
      left = mul(mul(left, splat(factor)), load_most(norm + j, n));
      right = mul(mul(right, splat(factor)), load_most(norm + half + j, n));
    }
    V c = load_most(cosine + j, n), s = load_most(sine + half + j, n);
    store_most(out + j, fnma(right, s, mul(left, c)), n);
    store_most(out + half + j, fma(left, s, mul(right, c)), n);
  }
}

// The gradient is turned by as much the other way.
template <typename G, typename T>
INLINE void turn_back(const G* grad, const float* cosine, const float* sine, int64_t width, T* out) {
  int64_t half = width / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    int64_t n = half - j;
    V left = load_most(grad + j, n), right = load_most(grad + half + j, n);
    V c = load_most(cosine + j, n), s = sub(zero(), load_most(sine + half + j, n));
    store_most(out + j, fnma(right, s, mul(left, c)), n);
    store_most(out + half + j, fma(left, s, mul(right, c)), n);
  }
}

// A row of heads, each normed if there is a norm, then turned if there is an angle.
static void place_heads(const HeadRow& heads, Numbers from, const float* cosine, const float* sine, Numbers to) {
  by_type(from, [&](auto* type) {
    auto *x = (decltype(type))from.data, *out = (decltype(type))to.data;
    int64_t width = heads.width;
    for (int64_t head = 0; head < heads.count; ++head, x += width, out += width) {
      float factor = heads.norm ? norm_factor(x, heads.epsilon, width) : 1.0f;
      if (cosine) turn_head(x, heads.norm, factor, cosine, sine, width, out);
      else
        for (int64_t j = 0; j < width; j += kLanes) {
          V y = load_most(x + j, width - j);
          if (heads.norm) y = mul(mul(y, splat(factor)), load_most(heads.norm + j, width - j));
          store_most(out + j, y, width - j);
        }
    }
  });
}

// `scratch` holds a width.
static void place_heads_back(const HeadRow& heads, Numbers grads, Numbers from, const float* cosine, const float* sine,
                             Numbers to, float* to_norm, float* scratch) {
  by_type(from, [&](auto* type) {
    auto *grad = (decltype(type))grads.data, *x = (decltype(type))from.data, *out = (decltype(type))to.data;
    int64_t width = heads.width;
    for (int64_t head = 0; head < heads.count; ++head, grad += width, x += width, out += width) {
      if (!heads.norm) {
        turn_back(grad, cosine, sine, width, out);
      } else if (cosine) {
        turn_back(grad, cosine, sine, width, scratch);
        scaled_row_back(scratch, x, heads.norm, nullptr, heads.epsilon, width, out, to_norm);
      } else {
        scaled_row_back(grad, x, heads.norm, nullptr, heads.epsilon, width, out, to_norm);
      }
    }
  });
}
}  // namespace
}  // namespace sightline
