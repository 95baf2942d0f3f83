#include "cg/lanczos.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

namespace imaml_ext {

Tridiagonal lanczos_tables(const at::Tensor& coefficients, int64_t taken) {
  const int64_t m = coefficients.size(0), k = taken;
  const int64_t couplings = std::max<int64_t>(k - 1, 0);
  const at::Tensor alpha = coefficients.select(2, 0).narrow(0, 0, k).t();         // [B, k]
  const at::Tensor beta = coefficients.select(2, 1).narrow(0, 0, couplings).t();  // [B, k − 1]
  const at::Tensor known = alpha.gt(0.0).cumprod(1);                              // [B, k]: 1, …, 1, 0, …, 0
  const at::Tensor inverse = alpha.reciprocal().masked_fill(known.eq(0), 0.0);    // [B, k]
  const at::Tensor before = inverse.narrow(1, 0, couplings);                      // [B, k − 1]
  const at::Tensor coupled = known.narrow(1, k - couplings, couplings);           // [B, k − 1]
  const auto table = [&](int64_t width) { return at::zeros({alpha.size(0), width}, coefficients.options()); };
  Tridiagonal tables{table(m), table(std::max<int64_t>(m - 1, 0)), known.sum(1).to(at::kInt)};
  tables.diagonal.narrow(1, 0, k).copy_(inverse);
  tables.diagonal.narrow(1, k - couplings, couplings).add_(beta * before * coupled);
  tables.off_diagonal.narrow(1, 0, couplings).copy_(beta.sqrt() * before * coupled);
  return tables;
}

}  // namespace imaml_ext
