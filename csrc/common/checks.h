// Argument checks shared by every op. Each failure is one sentence: the argument, what was expected, what came.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include "common/coefficient.h"

namespace imaml_ext {

// float32, float64, bfloat16 or float16, [B, N], contiguous.
void check_rows(const char* op, const char* name, const at::Tensor& tensor);

// Shape, dtype and device of `like`, contiguous.
void check_like(const char* op, const char* name, const at::Tensor& tensor, const char* like_name,
                const at::Tensor& like);

// [1 or B, 1 or N] in the compute type of `like` (float64 for float64, else float32), on its device; along a row either
// constant or contiguous.
void check_coefficient(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like);

// `dtype`, contiguous, of the given sizes, on the device of `like`.
void check_table(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype,
                 at::IntArrayRef sizes, const at::Tensor& like);

// [1 or B] float64, for the rows of `like`.
void check_tolerance(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like);

// The type that arithmetic on `dtype` is done in.
at::ScalarType compute_type(at::ScalarType dtype);

template <typename C>
Coefficient<C> as_coefficient(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<C>(), tensor.size(0) == 1 ? 0 : tensor.stride(0),
          tensor.size(1) == 1 ? 0 : tensor.stride(1)};
}

}  // namespace imaml_ext
