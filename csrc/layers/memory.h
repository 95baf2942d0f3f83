// Memory of what the ops of layers return.
#pragma once

#include <ATen/core/Tensor.h>

namespace imaml_ext {

// An empty tensor. Large ones come from memory that tensors before them have given back: a new page costs a fault,
// which takes longer than a layer takes to fill it. At most 1 GiB is kept for tensors to come.
at::Tensor empty_kept(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace imaml_ext
