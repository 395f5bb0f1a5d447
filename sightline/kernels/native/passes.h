// What stands between the matrix products of a training step, forward and backward, each in one pass over memory:
// activations and gates, dropout, norms, heads normed and turned.
#pragma once

#include "dropout.h"

namespace sightline {
namespace {

// `load_some` and `store_some` for loops whose last turn alone is not whole: a masked store costs many times a plain one.
INLINE V load_most(const float* p, int64_t n) { return n >= kLanes ? load(p) : load_some(p, (int)n); }
INLINE void store_most(float* p, V x, int64_t n) {
  if (n >= kLanes) store(p, x);
  else store_some(p, x, (int)n);
}

// ---- activations: x times a step from 0 to 1 ----

// 1 / (1 + e^-x), and its slope without a difference that would cancel.
INLINE V logistic(V x, V* slope) {
  V minus = sub(zero(), x);
  V power = exp(where_less(splat(88.0f), minus, splat(88.0f), minus));  // in this order NaN stays
  V s = div(splat(1.0f), add(splat(1.0f), power));
  *slope = mul(mul(power, s), s);
  return s;
}

struct Silu {
  INLINE V step(V x, V* slope) { return logistic(x, slope); }
};

// The normal distribution: near 0 its odd series; beyond, e^(-x^2/2) times a polynomial of 1 / (1 + p |x|), which is
// exact relative to the small values that it has. Both polynomials are least in their largest relative error.
struct Gelu {
  INLINE V step(V x, V* slope) {
    V square = mul(x, x), size = abs(x);
    V bell = exp(mul(square, splat(-0.5f)));
    *slope = mul(bell, splat(0.39894228f));
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
  INLINE V step(V x, V* slope) {
    V square = mul(x, x);
    V s = logistic(mul(x, fma(square, splat(0.0713548163f), splat(1.59576912f))), slope);
    *slope = mul(*slope, fma(square, splat(0.214064449f), splat(1.59576912f)));
    return s;
  }
};

// out = x step(x), times `up` if there is one.
template <typename Step>
void bend_row(const float* x, const float* up, int64_t count, float* out) {
  for (int64_t j = 0; j < count; j += kLanes) {
    V slope, at = load_most(x + j, count - j), bent = mul(at, Step::step(at, &slope));
    store_most(out + j, up ? mul(bent, load_most(up + j, count - j)) : bent, count - j);
  }
}

// Its gradient: to x, and to `up` if there is one.
template <typename Step>
void bend_row_back(const float* grad, const float* x, const float* up, int64_t count, float* to_x, float* to_up) {
  for (int64_t j = 0; j < count; j += kLanes) {
    V slope, at = load_most(x + j, count - j), step = Step::step(at, &slope), by = load_most(grad + j, count - j);
    if (up) {
      store_most(to_up + j, mul(by, mul(at, step)), count - j);
      by = mul(by, load_most(up + j, count - j));
    }
    store_most(to_x + j, mul(by, fma(at, slope, step)), count - j);
  }
}

static void bend(Curve curve, const float* x, const float* up, int64_t count, float* out) {
  if (curve == Curve::silu) bend_row<Silu>(x, up, count, out);
  else if (curve == Curve::gelu) bend_row<Gelu>(x, up, count, out);
  else bend_row<GeluTanh>(x, up, count, out);
}

static void bend_back(Curve curve, const float* grad, const float* x, const float* up, int64_t count, float* to_x,
                      float* to_up) {
  if (curve == Curve::silu) bend_row_back<Silu>(grad, x, up, count, to_x, to_up);
  else if (curve == Curve::gelu) bend_row_back<Gelu>(grad, x, up, count, to_x, to_up);
  else bend_row_back<GeluTanh>(grad, x, up, count, to_x, to_up);
}

// ---- dropout ----

static void drop_rows(const Dropping& by, const float* x, int64_t first, int64_t last, int64_t width, float* out) {
  for (int64_t row = first; row < last; ++row) {
    Place place = place_of(by.seed, row);
    for (int64_t j = 0; j < width; j += kLanes)
      store_most(out + row * width + j,
                 mul(load_most(x + row * width + j, width - j), kept(by.dropped, by.kept, place, j)), width - j);
  }
}

// ---- norms: y = x r weight, with r = 1 / sqrt(mean(x^2) + epsilon) ----

INLINE float dot_row(const float* x, const float* y, int64_t width) {
  V sums[2] = {zero(), zero()};  // two chains hide an addition's latency; rows are too short for more
  int64_t j = 0;
  for (; j + 2 * kLanes <= width; j += 2 * kLanes)
    for (int i = 0; i < 2; ++i) sums[i] = fma(load(x + j + i * kLanes), load(y + j + i * kLanes), sums[i]);
  for (; j < width; j += kLanes)
    sums[0] = fma(load_most(x + j, width - j), load_most(y + j, width - j), sums[0]);
  return sum_lanes(add(sums[0], sums[1]));
}

INLINE float norm_factor(const float* x, float epsilon, int64_t width) {
  return 1.0f / __builtin_sqrtf(dot_row(x, x, width) / (float)width + epsilon);
}

static void norm_rows(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
    V factor = splat(norm_factor(x, epsilon, width));
    for (int64_t j = 0; j < width; j += kLanes)
      store_most(out + j, mul(mul(load_most(x + j, width - j), factor), load_most(weight + j, width - j)), width - j);
  }
}

// To x: r (g - y' mean(g y')) with g = grad weight and y' = x r; to the weight, added: grad y'. `out` may be `grad`.
INLINE void norm_row_back(const float* grad, const float* x, const float* weight, float epsilon, int64_t width,
                          float* out, float* to_weight) {
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
    store_most(out + j, mul(r, fnma(along, load_most(x + j, width - j), by)), width - j);
  }
}

static void norm_rows_back(const float* grad, const float* x, const float* weight, float epsilon, int64_t rows,
                           int64_t width, float* out, float* to_weight) {
  for (int64_t row = 0; row < rows; ++row, grad += width, x += width, out += width)
    norm_row_back(grad, x, weight, epsilon, width, out, to_weight);
}

// ---- heads ----

// Each pair (x[i], x[i + half]) is turned; `back`: by as much the other way.
INLINE void turn_pairs(const float* x, const float* cosine, const float* sine, bool back, int64_t width, float* out) {
  int64_t half = width / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    int64_t n = half - j;
    V left = load_most(x + j, n), right = load_most(x + half + j, n);
    V c = load_most(cosine + j, n), s = load_most(sine + half + j, n);
    s = back ? sub(zero(), s) : s;
    store_most(out + j, fnma(right, s, mul(left, c)), n);
    store_most(out + half + j, fma(left, s, mul(right, c)), n);
  }
}

// A row of heads, each normed if there is a norm, then turned if there is an angle.
static void place_heads(const HeadRow& heads, const float* x, const float* cosine, const float* sine, float* out) {
  for (int64_t head = 0; head < heads.count; ++head, x += heads.width, out += heads.width) {
    const float* from = x;
    if (heads.norm) norm_rows(x, heads.norm, heads.epsilon, 1, heads.width, out), from = out;
    if (cosine) turn_pairs(from, cosine, sine, false, heads.width, out);
  }
}

static void place_heads_back(const HeadRow& heads, const float* grad, const float* x, const float* cosine,
                             const float* sine, float* out, float* to_norm) {
  for (int64_t head = 0; head < heads.count; ++head, grad += heads.width, x += heads.width, out += heads.width) {
    const float* from = grad;
    if (cosine) turn_pairs(grad, cosine, sine, true, heads.width, out), from = out;
    if (heads.norm) norm_row_back(from, x, heads.norm, heads.epsilon, heads.width, out, to_norm);
  }
}
}  // namespace
}  // namespace sightline
