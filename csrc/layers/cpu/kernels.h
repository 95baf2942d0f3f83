// The kernels of single layers: a table for each instruction set (kernels.inl).
#pragma once

#include "layers/arguments.h"

namespace imaml_ext {

template <typename T>
struct LayerKernels {
  void (*gather)(const TileArguments<T>&);   // tiles ← L X Lᵀ of every tile X of the image
  void (*scatter)(const TileArguments<T>&);  // the image's pixels ← L Z Lᵀ of every tile Z; tiles do not overlap
  void (*add)(T* to, const T* from, int64_t count);
  void (*norm)(const BatchNormArguments<T>&);
  void (*norm_backward)(const BatchNormArguments<T>&);
  void (*norm_second)(const BatchNormArguments<T>&);
};

}  // namespace imaml_ext
