// Torch's tensors at the border: checked, told as plain pointers and strides, and allocated.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "problem.h"

namespace sightline {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline Strided strided(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// With stride 0 along axes of size 1.
inline Strided broadcast(const Maybe& tensor) {
  if (!tensor) return {};
  auto stride = [&](int64_t axis) { return tensor->size(axis) == 1 ? int64_t{0} : tensor->stride(axis); };
  return {tensor->data_ptr(), stride(0), stride(1), stride(2), stride(3)};
}

// Contiguous, unless strides are given.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype = ScalarType::Float,
                    std::initializer_list<int64_t> strides = {}) {
  int64_t dense[8], numbers = 1;
  for (size_t i = sizes.size(); i-- > 0;) dense[i] = numbers, numbers *= sizes.begin()[i];
  AtenTensorHandle handle;
  int32_t error = aoti_torch_empty_strided(
      (int64_t)sizes.size(), sizes.begin(), strides.size() ? strides.begin() : dense,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &handle);
  int64_t size = dtype == ScalarType::Long ? 8 : dtype == ScalarType::Float ? 4 : 2;
  STD_TORCH_CHECK(!error, "sightline: no memory for a tensor of ", numbers * size,
                  " bytes; fewer or shorter texts at once take less");
  return Tensor(handle);
}

// (batch heads queries width), in memory (batch queries heads width): heads are joined without a copy.
inline Tensor empty_rows(int64_t batch, int64_t heads, int64_t queries, int64_t width, ScalarType dtype) {
  return empty({batch, heads, queries, width}, dtype, {queries * heads * width, width, heads * width, 1});
}

inline float* floats(const Tensor& tensor) { return (float*)tensor.mutable_data_ptr(); }

struct Inputs {
  const Tensor &query, &key, &value;
  const Maybe &lengths, &allowed, &bias, &slopes, &sinks;
  int64_t before, after;
  double scale, softcap, dropout = 0;
  const Maybe& seed = none;
  static inline const Maybe none;
};

inline Call call_of(const Inputs& in) {
  Call call = {};
  for (const Tensor* tensor : {&in.query, &in.key, &in.value}) {
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->dim() == 4 && tensor->scalar_type() == in.query.scalar_type(),
                    "sightline: query, key and value must be CPU tensors of 4 axes and one dtype");
    STD_TORCH_CHECK(tensor->size(3) <= 1 || tensor->stride(3) == 1,
                    "sightline: the last axis of query, key and value must have stride 1; use .contiguous()");
  }
  ScalarType dtype = in.query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "sightline: expected float32, bfloat16 or float16");
  call.dtype = dtype == ScalarType::Float      ? Dtype::float32
               : dtype == ScalarType::BFloat16 ? Dtype::bfloat16
                                               : Dtype::float16;
  call.batch = in.query.size(0), call.heads = in.query.size(1), call.queries = in.query.size(2);
  call.width = in.query.size(3), call.groups = in.key.size(1), call.keys = in.key.size(2);
  call.value_width = in.value.size(3);
  STD_TORCH_CHECK(in.key.size(0) == call.batch && in.value.size(0) == call.batch && in.key.size(3) == call.width &&
                      in.value.size(1) == call.groups && in.value.size(2) == call.keys && call.groups > 0 &&
                      call.heads % call.groups == 0,
                  "sightline: the shapes of query, key and value do not belong together");
  call.query = strided(in.query), call.key = strided(in.key), call.value = strided(in.value);
  call.scale = (float)in.scale, call.softcap = (float)in.softcap;
  call.before = in.before, call.after = in.after, call.position = call.keys - call.queries;
  for (const Maybe* mask : {&in.allowed, &in.bias}) {
    if (!*mask) continue;
    int64_t full[] = {call.batch, call.heads, call.queries, call.keys};
    STD_TORCH_CHECK((*mask)->dim() == 4, "sightline: allowed and bias must have 4 axes");
    for (int64_t axis = 0; axis < 4; ++axis)
      STD_TORCH_CHECK((*mask)->size(axis) == 1 || (*mask)->size(axis) == full[axis],
                      "sightline: allowed or bias does not broadcast to (batch heads queries keys)");
  }
  STD_TORCH_CHECK(!in.allowed || in.allowed->scalar_type() == ScalarType::Bool, "sightline: allowed must be bool");
  STD_TORCH_CHECK(!in.bias || in.bias->scalar_type() == ScalarType::Float, "sightline: bias must be float32");
  STD_TORCH_CHECK(!in.lengths || (in.lengths->scalar_type() == ScalarType::Long && in.lengths->is_contiguous() &&
                                  in.lengths->numel() == call.batch),
                  "sightline: lengths must be int64 (batch)");
  for (const Maybe* per_head : {&in.slopes, &in.sinks})
    STD_TORCH_CHECK(!*per_head || ((*per_head)->scalar_type() == ScalarType::Float && (*per_head)->is_contiguous() &&
                                   (*per_head)->numel() == call.heads),
                    "sightline: slopes and sinks must be float32 (heads)");
  call.allowed = broadcast(in.allowed), call.bias = broadcast(in.bias);
  if (in.lengths) call.lengths = (const int64_t*)in.lengths->data_ptr();
  if (in.slopes) call.slopes = floats(*in.slopes);
  if (in.sinks) call.sinks = floats(*in.sinks);
  STD_TORCH_CHECK(in.dropout >= 0 && in.dropout < 1, "sightline: dropout must be at least 0 and below 1");
  if (in.dropout > 0) {
    STD_TORCH_CHECK(in.seed && in.seed->is_cpu() && in.seed->scalar_type() == ScalarType::Long && in.seed->numel() == 1,
                    "sightline: dropout needs a seed, one int64 on the CPU");
    call.seed = (uint64_t) * (const int64_t*)in.seed->data_ptr();
    call.dropped = (uint32_t)std::min(in.dropout * 4294967296.0, 4294967295.0);
    call.kept = (float)(1 / (1 - in.dropout));
  }
  return call;
}

}  // namespace sightline
