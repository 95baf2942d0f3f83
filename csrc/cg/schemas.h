// The schemas of the conjugate-gradient ops.
#pragma once

namespace imaml_ext {

// Conjugate gradients. state [B, 6] float64 and status [B] int32 live on the device of the vectors; a row's fields
// are those of RowState and RowStatus in row.h. Coefficients have shape [1 or B, 1 or N].
//
// A solve from x = 0 with no preconditioner begins with r = p = b. cg_begin_ without x, r and p leaves it at that,
// and cg_step_ with `first` makes all three from b. With `last` it leaves r and p as they are: only x, ‖r‖ and the
// status come of it.
inline constexpr const char* kCgSchemas[] = {
    "cg_begin_(Tensor b, Tensor? hx, Tensor shift, Tensor? inverse_diagonal, Tensor rtol, Tensor atol, "
    "Tensor(a!)? x, Tensor(b!)? r, Tensor(c!)? p, Tensor(d!) state, Tensor(e!) status, Tensor(f!) iterations, "
    "bool update_direction=True) -> ()",
    "cg_direction_(Tensor? z, Tensor? inverse_diagonal, Tensor x, Tensor r, Tensor(a!) p, Tensor(b!) state, "
    "Tensor(c!) status) -> ()",
    "cg_step_(Tensor hp, Tensor b, Tensor shift, Tensor? inverse_diagonal, Tensor(a!) x, Tensor(b!) r, "
    "Tensor(c!) p, Tensor(d!) state, Tensor(e!) status, Tensor(f!) iterations, bool update_direction=True, "
    "bool first=False, bool last=False) -> ()",
};

}  // namespace imaml_ext
