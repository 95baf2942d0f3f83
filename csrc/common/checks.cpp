#include "common/checks.h"

#include <c10/util/Exception.h>

#include <cctype>
#include <string>

namespace imaml_ext {
namespace {

// As Python writes it.
std::string name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kHalf:
      return "float16";
    case at::kInt:
      return "int32";
    default: {
      std::string name = c10::toString(dtype);
      for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
      return name == "long" ? "int64" : name;
    }
  }
}

}  // namespace

at::ScalarType compute_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

void check_rows(const char* op, const char* name, const at::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, op,
                   ": ", name, " must be float32, float64, bfloat16 or float16, got ", name_of(dtype));
  TORCH_CHECK_VALUE(tensor.dim() == 2, op, ": ", name, " must have shape [B, N] (one row per task), got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", tensor.strides());
}

void check_like(const char* op, const char* name, const at::Tensor& tensor, const char* like_name,
                const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": ", name, " must be on the device of ", like_name, ", ",
                    like.device(), ", got ", tensor.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", like_name,
                   ", ", name_of(like.scalar_type()), ", got ", name_of(tensor.scalar_type()));
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes(), op, ": ", name, " must have the shape of ", like_name, ", ",
                    like.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", tensor.strides());
}

void check_coefficient(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": ", name, " must be on ", like.device(), ", got ",
                    tensor.device());
  const auto dtype = compute_type(like.scalar_type());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, " must be ", name_of(dtype), " beside ",
                   name_of(like.scalar_type()), " vectors, got ", name_of(tensor.scalar_type()));
  const bool fits = tensor.dim() == 2 && (tensor.size(0) == 1 || tensor.size(0) == like.size(0)) &&
                    (tensor.size(1) == 1 || tensor.size(1) == like.size(1));
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must have shape [1 or ", like.size(0), ", 1 or ", like.size(1), "], got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.size(1) == 1 || tensor.stride(1) == 1, op, ": ", name,
                    " must be contiguous along a row, got strides ", tensor.strides());
}

void check_table(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype,
                 at::IntArrayRef sizes, const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": ", name, " must be on ", like.device(), ", got ",
                    tensor.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, " must be ", name_of(dtype), ", got ",
                   name_of(tensor.scalar_type()));
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, op, ": ", name, " must have shape ", sizes, ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", tensor.strides());
}

void check_tolerance(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  const bool one = tensor.dim() == 1 && tensor.size(0) == 1;
  check_table(op, name, tensor, at::kDouble, {one ? 1 : like.size(0)}, like);
}

}  // namespace imaml_ext
