// Batched least squares over two callbacks: the loop. Usable from C++ as it stands and from Python through bindings.cpp
// (imaml_ext.lsqr).
//
// A problem a row: x_b minimises ‖M_b x − y_b‖² + xᵀ diag(shift) x, with M touched only through `matvec(p) -> M p`,
// [B, N] -> [B, M], and `rmatvec(q) -> Mᵀq`, [B, M] -> [B, N], row b of the result depending on row b of the argument
// alone, which is not to be kept or written to. Between two calls everything is one op on the device of `y`; nothing is
// read back unless check_every asks for it.
#pragma once

#include "common/solver.h"

namespace imaml_ext {

struct LsqrOptions {
  at::Tensor shift;              // [1 or B, 1 or N], float32 (float64 beside float64 vectors); undefined: none
  std::optional<at::Tensor> x0;  // [B, N], dtype and device of y
  int64_t max_iterations = 100;  // calls of matvec and rmatvec each, beside the first of rmatvec
  at::Tensor rtol;               // [1 or B] float64; undefined: 1e-5
  at::Tensor atol;               // [1 or B] float64; undefined: 0
  int64_t check_every = 0;       // k > 0: look every k iterations whether all rows are done; 0: never look
};

struct LsqrResult : SolveResult {  // its residual_norm is ‖y − M x‖
  at::Tensor gradient_norm;        // [B] float64, ‖Mᵀ(y − M x) − shift x‖
};

// x of `unknowns` numbers a row. Throws c10::ValueError / c10::TypeError for arguments that do not fit together (see
// LsqrOptions), and passes on whatever the callbacks throw.
__attribute__((visibility("default"))) LsqrResult lsqr(const RowOperator& matvec, const RowOperator& rmatvec,
                                                       const at::Tensor& y, int64_t unknowns,
                                                       const LsqrOptions& options = {});

}  // namespace imaml_ext
