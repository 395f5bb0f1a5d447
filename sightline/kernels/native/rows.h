// What stands between the linear maps of few rows: norms, rotation, activations. A row at a time.
#pragma once

#include "project.h"

namespace sightline {
namespace {

// x / sqrt(mean(x^2) + epsilon) * weight, in place too; no weight is all ones.
static void norm_row(const float* x, const float* weight, float epsilon, int64_t width, float* out) {
  V total = zero();
  for (int64_t start = 0; start < width; start += kMapChain) {
    V sum = zero();
    int64_t stop = start + kMapChain < width ? start + kMapChain : width;
    for (int64_t j = start; j < stop; j += kLanes) {
      V part = stop - j < kLanes ? load_some(x + j, (int)(stop - j)) : load(x + j);
      sum = fma(part, part, sum);
    }
    total = add(total, sum);
  }
  V factor = splat(1.0f / __builtin_sqrtf(sum_lanes(total) / (float)width + epsilon));
  for (int64_t j = 0; j < width; j += kLanes) {
    int count = width - j < kLanes ? (int)(width - j) : kLanes;
    V part = mul(load_some(x + j, count), factor);
    store_some(out + j, weight ? mul(part, load_some(weight + j, count)) : part, count);
  }
}

// Each pair (x[i], x[i + half]) is turned; the table of sines carries the sign, as `Rotary` has it.
static void turn_row(float* x, const float* cosine, const float* sine, int64_t width) {
  int64_t half = width / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    int count = half - j < kLanes ? (int)(half - j) : kLanes;
    V left = load_some(x + j, count), right = load_some(x + half + j, count);
    V turned = mul(left, load_some(cosine + j, count));
    store_some(x + j, fma(right, load_some(sine + j, count), turned), count);
    turned = mul(right, load_some(cosine + half + j, count));
    store_some(x + half + j, fma(left, load_some(sine + half + j, count), turned), count);
  }
}

// up = silu(gate) * up; without a gate max(up, 0). NaN stays.
static void activate(const float* gate, float* up, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes) {
    int some = count - j < kLanes ? (int)(count - j) : kLanes;
    V x = load_some(up + j, some);
    if (gate) {
      V g = load_some(gate + j, some), minus = sub(zero(), g);
      minus = where_less(splat(88.0f), minus, splat(88.0f), minus);  // silu(-88) is as good as 0
      x = mul(div(g, add(splat(1.0f), exp(minus))), x);
    } else {
      x = where_less(x, zero(), zero(), x);
    }
    store_some(up + j, x, some);
  }
}
}  // namespace
}  // namespace sightline
