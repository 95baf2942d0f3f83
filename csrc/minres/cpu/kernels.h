// The passes of a solve over a piece [begin, end) of one row: a table for each instruction set (kernels.inl).
#pragma once

#include "minres/arguments.h"

namespace imaml_ext {

enum class NextVector : int {
  kNone,
  kLanczos,   // v₊ = u scale / divisor
  kResidual,  // v = (b − A x) scale / divisor, where v was x
  kSolution,  // x, to be measured
  kZero,      // of a row that is over, for the operator to be given something finite
};

template <typename T>
struct MinresKernels {
  using A = MinresArguments<T>;
  BeginSums (*begin)(const A&, int64_t row, int64_t begin, int64_t end, double b_scale, double r_scale);
  ProductSums (*product)(const A&, int64_t row, int64_t begin, int64_t end);
  double (*residual)(const A&, int64_t row, int64_t begin, int64_t end);
  TurnSums (*turn)(const A&, int64_t row, int64_t begin, int64_t end, const MinresStep& step);
  bool (*step_is_finite)(const A&, int64_t row, int64_t begin, int64_t end, const MinresStep& step);
  void (*update)(const A&, int64_t row, int64_t begin, int64_t end, const MinresStep& step, NextVector next);
};

}  // namespace imaml_ext
