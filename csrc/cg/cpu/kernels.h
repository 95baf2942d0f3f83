// The passes of a solve over a piece [begin, end) of one row: a table for each instruction set (kernels.inl).
#pragma once

#include "cg/arguments.h"

namespace imaml_ext {

enum class ResidualFrom : int {
  kRecurrence,  // r ← r − α A p
  kSolution,    // r ← b − A x, where p is x
};

enum class UpdateTo : int {
  kNothing,
  kDirection,  // p ← z + β p
  kSolution,   // p ← x
  kZero,       // p ← 0
};

struct ResidualSums {
  double rr;  // rᵀr
  double rz;  // rᵀ M r, M the diagonal preconditioner or the identity
};

template <typename T>
struct CgKernels {
  using A = CgArguments<T>;
  using C = typename A::C;
  BeginSums (*begin)(const A&, int64_t row, int64_t begin, int64_t end, double b_scale, double r_scale);
  Curvature (*curvature)(const A&, int64_t row, int64_t begin, int64_t end);
  bool (*step_is_finite)(const A&, int64_t row, int64_t begin, int64_t end, C alpha);
  ResidualSums (*residual)(const A&, int64_t row, int64_t begin, int64_t end, ResidualFrom from, C alpha);
  void (*update)(const A&, int64_t row, int64_t begin, int64_t end, bool take_step, C alpha, UpdateTo to, C beta);
  void (*scaled_rhs)(const A&, int64_t row, int64_t begin, int64_t end);
  double (*dot_rz)(const A&, int64_t row, int64_t begin, int64_t end);
  void (*follow)(const CgShifts<T>&, int64_t row, int64_t shift, int64_t begin, int64_t end);
};

}  // namespace imaml_ext
