// Batched MINRES over a callback: the loop, for symmetric systems of any definiteness. What is said of the callback in
// cg/solver.h holds here too, but that no vector handed to it is b itself.
#pragma once

#include "common/solver.h"

namespace imaml_ext {

struct MinresOptions : SolveOptions {
  bool lanczos = false;  // keep the coefficients of the first Krylov space
};

struct MinresResult : SolveResult {
  Tridiagonal lanczos;  // undefined where not asked for
};

// Throws c10::ValueError / c10::TypeError for arguments that do not fit together (see SolveOptions), and passes on
// whatever `hvp` throws.
__attribute__((visibility("default"))) MinresResult minres(const RowOperator& hvp, const at::Tensor& b,
                                                           const MinresOptions& options = {});

}  // namespace imaml_ext
