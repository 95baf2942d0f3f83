// The proximal steps over a piece [begin, end) of one row: a table for each instruction set (kernels.inl).
#pragma once

#include "prox/arguments.h"

namespace imaml_ext {

template <typename T>
struct ProxKernels {
  using A = ProxArguments<T>;
  void (*gradient)(const A&, int64_t row, int64_t begin, int64_t end);
  double (*penalty)(const A&, int64_t row, int64_t begin, int64_t end);
  void (*sgd)(const A&, int64_t row, int64_t begin, int64_t end);
  void (*momentum)(const A&, int64_t row, int64_t begin, int64_t end);
  void (*adam)(const A&, int64_t row, int64_t begin, int64_t end);
};

}  // namespace imaml_ext
