#include "cg/lanczos.h"

#include <ATen/TensorOperators.h>

#include <algorithm>

namespace imaml_ext {

Tridiagonal lanczos_tables(const at::Tensor& coefficients) {
  const int64_t m = coefficients.size(0);
  const int64_t couplings = std::max<int64_t>(m - 1, 0);
  const at::Tensor alpha = coefficients.select(2, 0).t();                         // [B, m]
  const at::Tensor beta = coefficients.select(2, 1).t().narrow(1, 0, couplings);  // [B, m − 1]
  const at::Tensor taken = alpha.gt(0.0).cumprod(1);                              // [B, m]: 1, …, 1, 0, …, 0
  const at::Tensor inverse = alpha.reciprocal().masked_fill(taken.eq(0), 0.0);    // [B, m]
  const at::Tensor before = inverse.narrow(1, 0, couplings);                      // [B, m − 1]
  const at::Tensor coupled = taken.narrow(1, m - couplings, couplings);           // [B, m − 1]
  Tridiagonal tables{inverse.clone(at::MemoryFormat::Contiguous), beta.sqrt() * before * coupled,
                     taken.sum(1).to(at::kInt)};
  tables.diagonal.narrow(1, m - couplings, couplings).add_(beta * before * coupled);
  return tables;
}

}  // namespace imaml_ext
