// The Lanczos tridiagonal of every row, from the coefficients of its conjugate gradients.
//
// With α and β of the steps 0, 1, … (Golub and Meurant, Matrices, moments and quadrature, 2010, section 4.1):
//
//     T_kk = 1 / α_k + β_{k−1} / α_{k−1}      T_k,k+1 = √β_k / α_k
#pragma once

#include <ATen/core/Tensor.h>

#include "common/solver.h"

namespace imaml_ext {

// `coefficients` [m, B, 2] float64: α and β of every step, of which `taken` have been made. T ends before the first α
// that is 0, and tables are 0 from there on.
Tridiagonal lanczos_tables(const at::Tensor& coefficients, int64_t taken);

}  // namespace imaml_ext
