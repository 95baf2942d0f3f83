// Batched conjugate gradients over a callback: the loop. Usable from C++ as it stands and from Python through
// bindings.cpp (imaml_ext.cg).
//
// One system a row: (H_b + diag(shift)) x_b = b_b, with H touched only through `hvp(p) -> H p`, [B, N] -> [B, N], row b
// of the result depending on row b of p alone; p is not to be kept or written to: without x0 and preconditioner the
// first one is b itself. Between two calls of `hvp` everything is one op on the device of `b`; nothing is read back
// unless check_every asks for it.
//
// With rows_per_block the batch is solved in blocks of rows, one after the other and each to its end, so that the
// vectors of a block stay in the cache: `hvp(p, rows) -> H p` then sees one block. Rows being independent, every one
// has the bits that it has in the whole batch.
#pragma once

#include "common/solver.h"

namespace imaml_ext {

struct CgOptions : SolveOptions {
  at::Tensor inverse_diagonal;  // [1 or B, 1 or N], the type of shift: z = inverse_diagonal ∘ r; undefined: none
  RowOperator preconditioner;   // z = M r; empty: none
  bool lanczos = false;         // keep the coefficients of the first Krylov space
  // [B, J] float64, σ ≥ 0: solves A + σ too, without a product of its own (cg/shift.h). Not with x0 or a
  // preconditioner. With check_every the solve ends when no shifted system follows any more, whether the rows have
  // measured or not.
  at::Tensor shifts;
};

// What the shifted systems were when they ceased to follow. No residual of them has been measured.
struct ShiftedSystems {
  at::Tensor x;           // [B, J, N]
  at::Tensor iterations;  // [B, J] int32
};

struct CgResult : SolveResult {
  std::optional<Tridiagonal> lanczos;  // of M^½ A M^½ with a preconditioner M
  std::optional<ShiftedSystems> shifted;
};

// Throws c10::ValueError / c10::TypeError for arguments that do not fit together (see CgOptions), and passes on
// whatever `hvp` and `preconditioner` throw.
__attribute__((visibility("default"))) CgResult cg(const RowOperator& hvp, const at::Tensor& b,
                                                   const CgOptions& options = {});

}  // namespace imaml_ext
