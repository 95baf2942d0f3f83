// The kernels of a network's layers: a table for each instruction set (kernels.inl).
#pragma once

#include "network/cpu/norm_arguments.h"

namespace imaml_ext {

// Layers of one task, float and double. Matrices are row-major; activations and their derivatives have `width` columns,
// a multiple of kChannelBlock, and rows over images and pixels. Products are contracted (a·b + c rounds once) where the
// instruction set can, so their last bits depend on it.
template <typename T>
struct NetworkKernels {
  // c[r][j] ← or += Σ_k a[r][k] b[k][j],   j < width, b [depth, width]
  void (*multiply)(const T* const* a, T* const* c, int64_t rows, int64_t depth, const T* b, int64_t width, bool add);
  // w[k][j] ← or += Σ_r a[r][k] g[r][j],   k in [first, last), j < channels, w [depth, channels]
  void (*outer)(const T* const* a, const T* const* g, int64_t rows, int64_t first, int64_t last, int64_t channels, T* w,
                bool add);
  // out[j][i] = in[i][j], in [rows, cols], padded with zeros to `width` columns
  void (*transpose)(const T* in, int64_t rows, int64_t cols, T* out, int64_t width);

  // Columns [first, last) of the norm and activation of a layer, of which these are the fields that each one reads and
  // writes.
  void (*norm)(const NormArguments<T>&, int64_t first, int64_t last);
  void (*norm_backward)(const NormArguments<T>&, int64_t first, int64_t last);
  void (*norm_tangent)(const NormArguments<T>&, int64_t first, int64_t last);
  void (*norm_second)(const NormArguments<T>&, int64_t first, int64_t last);
};

}  // namespace imaml_ext
