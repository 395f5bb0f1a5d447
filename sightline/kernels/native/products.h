// Products of two matrices, by torch's library.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstring>

#include "instructions.h"
#include "tensors.h"

// As torch's shim_cpu.h declares it, which does not go with the stable interface: x, weight and bias; what follows the
// product ("none"), of which numbers, by which algorithm; the output. A torch without oneDNN has no such symbol: weak,
// its address is null there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, const char*, const double**, int64_t, const char**,
    AtenTensorHandle*);

namespace sightline {
namespace {

// MKL, torch's road in float32, keeps to AVX2 on a CPU that is not Intel's: half of what an AMD with AVX-512 multiplies
// since family 26 (Zen 5).
bool onednn_is_faster() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return false;
  bool amd = b == signature_AMD_ebx && d == signature_AMD_edx && c == signature_AMD_ecx;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  unsigned family = ((a >> 8) & 15) + ((a >> 20) & 255);
  return amd && family >= 26 && __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

bool has_onednn() { return &aoti_torch_cpu__linear_pointwise != nullptr; }

// Whether products in float32 go by oneDNN, from now on and in every thread.
std::atomic<bool> by_onednn{has_onednn() && onednn_is_faster()};

Tensor flipped(const Tensor& matrix) {
  int64_t sizes[] = {matrix.size(1), matrix.size(0)}, strides[] = {matrix.stride(1), matrix.stride(0)};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// The least number from `count` on that is 4 to 7 times a power of two; of thousands 16 to 31 times.
int64_t even(int64_t count) {
  int64_t step = 1, parts = count > 4096 ? 32 : 8;
  while (parts * step <= count) step *= 2;
  return (count + step - 1) / step * step;
}

// With rows of zeros behind.
Tensor padded(const Tensor& matrix, int64_t rows) {
  int64_t there = matrix.size(0), width = matrix.size(1);
  Tensor out = empty({rows, width});
  for (int64_t row = 0; row < there; ++row)
    std::memcpy(floats(out) + row * width, (const float*)matrix.data_ptr() + row * matrix.stride(0),
                sizeof(float) * (size_t)width);
  std::memset(floats(out) + there * width, 0, sizeof(float) * (size_t)((rows - there) * width));
  return out;
}

Tensor first_rows(const Tensor& matrix, int64_t rows) {
  int64_t sizes[] = {rows, matrix.size(1)}, strides[] = {matrix.size(1), 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// oneDNN's product, or none where torch's own road is to be taken. For every shape oneDNN compiles, and keeps half a
// megabyte; the length of a text may be any number. So there are few: rows are filled up to an even number of them, and
// of the product over rows that a weight's gradient is, whose left side is turned round, only even ones are taken.
Maybe onednn_times(const Tensor& left, const Tensor& right, const Maybe& bias) {
  if (left.scalar_type() != ScalarType::Float || !left.numel() || !right.numel() || !by_onednn) return {};
  int64_t rows = left.size(0), depth = left.size(1);
  bool over_rows = left.stride(1) != 1;
  if (over_rows && even(depth) != depth) return {};
  int64_t filled = over_rows ? rows : even(rows);
  Tensor read = filled == rows ? left : padded(left, filled);
  AtenTensorHandle out, given = bias ? bias->get() : nullptr;
  if (aoti_torch_cpu__linear_pointwise(read.get(), flipped(right).get(), bias ? &given : nullptr, "none", nullptr, 0,
                                       nullptr, &out))
    return {};  // it refuses strides that overlap
  return filled == rows ? Tensor(out) : first_rows(Tensor(out), rows);
}

// left right, plus a bias if there is one, in the dtype of all three.
Tensor times(const Tensor& left, const Tensor& right, const Maybe& bias = {}) {
  STD_TORCH_CHECK(left.is_cpu() && right.is_cpu() && left.dim() == 2 && right.dim() == 2 &&
                      left.size(1) == right.size(0) && left.scalar_type() == right.scalar_type(),
                  "sightline: the shapes or dtypes of a product do not belong together");
  if (Maybe out = onednn_times(left, right, bias)) return *out;
  Tensor out = empty({left.size(0), right.size(1)}, left.scalar_type());
  int32_t error = bias ? aoti_torch_cpu_addmm_out(out.get(), bias->get(), left.get(), right.get(), 1, 1)
                       : aoti_torch_cpu_mm_out(out.get(), left.get(), right.get());
  STD_TORCH_CHECK(!error, "sightline: torch could not multiply ", left.size(0), " x ", left.size(1), " by ",
                  right.size(0), " x ", right.size(1),
                  "; if memory is short, fewer or shorter texts at once take less");
  return out;
}

Tensor mapped(const Tensor& x, const Tensor& weight, const Maybe& bias) { return times(x, flipped(weight), bias); }

// For Python: (rows depth) times (depth columns), any strides.
Tensor multiply(const Tensor& left, const Tensor& right, const Maybe& bias) {
  STD_TORCH_CHECK(!bias || (bias->is_cpu() && bias->dim() == 1 && right.dim() == 2 && bias->size(0) == right.size(1) &&
                            bias->is_contiguous() && bias->scalar_type() == right.scalar_type()),
                  "sightline: a bias must have a number for each column, contiguous, of the dtype of the product");
  return times(left, right, bias);
}

}  // namespace
}  // namespace sightline
