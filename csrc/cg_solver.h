// Batched conjugate gradients over a callback: the loop. Usable from C++ as it stands and from Python through
// bindings.cpp (imaml_ext.cg).
//
// One system a row: (H_b + diag(shift)) x_b = b_b, with H touched only through `hvp(p) -> H p`, [B, N] -> [B, N], row b
// of the result depending on row b of p alone; p is not to be kept or written to: without x0 and preconditioner the
// first one is b itself. Between two calls of `hvp` everything is one op on the device of `b`; nothing is read back
// unless check_every asks for it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>

namespace imaml_ext {

using RowOperator = std::function<at::Tensor(const at::Tensor&)>;

struct CgOptions {
  at::Tensor shift;              // [1 or B, 1 or N], float32 (float64 beside float64 vectors); undefined: none
  std::optional<at::Tensor> x0;  // [B, N], dtype and device of b
  int64_t max_iterations = 5;    // calls of hvp, beside the one that a warm start needs
  at::Tensor rtol;               // [1 or B] float64; undefined: 1e-5
  at::Tensor atol;               // [1 or B] float64; undefined: 0
  at::Tensor inverse_diagonal;   // [1 or B, 1 or N], the type of shift: z = inverse_diagonal ∘ r; undefined: none
  RowOperator preconditioner;    // z = M r; empty: none
  int64_t check_every = 0;       // k > 0: look every k iterations whether all rows are done; 0: never look
};

struct CgResult {
  at::Tensor x;              // [B, N]
  at::Tensor status;         // [B] int32, the first four of RowStatus
  at::Tensor iterations;     // [B] int32, conjugate-gradient steps taken
  at::Tensor residual_norm;  // [B] float64, ‖b − A x‖; NaN where nothing has measured it
};

// Throws c10::ValueError / c10::TypeError for arguments that do not fit together (see CgOptions), and passes on
// whatever `hvp` and `preconditioner` throw.
CgResult cg(const RowOperator& hvp, const at::Tensor& b, const CgOptions& options = {});

}  // namespace imaml_ext
