// The passes of a least-squares solve over a piece [begin, end) of one row: a table for each instruction set
// (kernels.inl).
#pragma once

#include "lsqr/arguments.h"

namespace imaml_ext {

// Sums of squares, of numbers that are multiplied by a scale first.
struct GradientSums {
  double ss;   // ŝ
  double tt;   // t = Mᵀr̂
  double xx;   // x
  double xSx;  // S^½ x
};

struct DirectionSums {
  double pp;
  double pSp;
};

// What a row does in lsqr_direction_ after its decisions; `step` and `gradient` are those of x and p̂.
template <typename C>
struct LsqrUpdate {
  bool take_step;
  C step;             // x ← x + step p̂
  C inverse_unit;     // 1 / ρ
  bool to_solution;   // p̂ ← x
  bool to_direction;  // p̂ ← gradient ŝ + keep p̂
  C gradient;
  C keep;
};

template <typename T>
struct LsqrKernels {
  using A = LsqrArguments<T>;
  using C = typename A::C;
  double (*rhs)(const A&, int64_t row, int64_t begin, int64_t end, double scale);
  void (*normalise)(const A&, int64_t row, int64_t begin, int64_t end, C inverse_unit);
  double (*product)(const A&, int64_t row, int64_t begin, int64_t end, bool from_solution, double scale);
  double (*residual)(const A&, int64_t row, int64_t begin, int64_t end, bool from_solution, C keep, C step);
  GradientSums (*gradient)(const A&, int64_t row, int64_t begin, int64_t end, const LsqrUpdate<C>& update,
                           bool with_solution, double scale, double x_scale);
  DirectionSums (*update)(const A&, int64_t row, int64_t begin, int64_t end, const LsqrUpdate<C>& update);
};

}  // namespace imaml_ext
