// The proximal ops on the CPU.
#include "prox/arguments.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "common/cpu/kernels.h"

namespace imaml_ext {
namespace {

// Runs pass(row, piece, begin, end) for every piece of every row.
template <typename Pass>
void over_pieces(int64_t rows, int64_t cols, const Pass& pass) {
  const int64_t pieces = pieces_of(cols);
  const int64_t grain = cols == 0 ? 1 : std::max<int64_t>(1, 2 * kPiece / std::min(cols, kPiece));
  at::parallel_for(0, rows * pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t row = k / pieces;
      const int64_t begin = (k % pieces) * kPiece;
      pass(row, k % pieces, begin, std::min(begin + kPiece, cols));
    }
  });
}

// Validates, then applies the rule `choose(kernels)` to every piece.
template <typename Choose>
void apply_rule(const char* op, const ProxTensors& tensors, const Choose& choose) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, tensors.check(op), "imaml_ext", [&] {
    const auto arguments = tensors.arguments<scalar_t>();
    const auto rule = choose(prox_kernels<scalar_t>());
    over_pieces(arguments.rows, arguments.cols,
                [&](int64_t row, int64_t, int64_t begin, int64_t end) { rule(arguments, row, begin, end); });
  });
}

void prox_gradient_(at::Tensor& grad, const at::Tensor& phi, const at::Tensor& theta, const at::Tensor& lam) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam;
  apply_rule("prox_gradient_", t, [](const auto& kernels) { return kernels.gradient; });
}

at::Tensor prox_penalty(const at::Tensor& phi, const at::Tensor& theta, const at::Tensor& lam) {
  ProxTensors t;
  t.phi = phi, t.theta = theta, t.lam = lam;
  const auto dtype = t.check("prox_penalty");
  t.penalty = at::empty({phi.size(0)}, phi.options().dtype(compute_type(dtype)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, "imaml_ext", [&] {
    const auto arguments = t.arguments<scalar_t>();
    const auto& kernels = prox_kernels<scalar_t>();
    const int64_t pieces = pieces_of(arguments.cols);
    std::vector<double> sums(arguments.rows * pieces);
    over_pieces(arguments.rows, arguments.cols, [&](int64_t row, int64_t piece, int64_t begin, int64_t end) {
      sums[row * pieces + piece] = kernels.penalty(arguments, row, begin, end);
    });
    for (int64_t row = 0; row < arguments.rows; ++row) {
      double total = 0.0;
      for (int64_t k = 0; k < pieces; ++k) total += sums[row * pieces + k];
      arguments.penalty[row] = static_cast<at::opmath_type<scalar_t>>(0.5 * total);
    }
  });
  return t.penalty;
}

void prox_sgd_step_(at::Tensor& phi, const at::Tensor& grad, const at::Tensor& theta, const at::Tensor& lam,
                    const at::Tensor& lr) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam, t.lr = lr;
  apply_rule("prox_sgd_step_", t, [](const auto& kernels) { return kernels.sgd; });
}

void prox_momentum_step_(at::Tensor& phi, at::Tensor& velocity, const at::Tensor& grad, const at::Tensor& theta,
                         const at::Tensor& lam, const at::Tensor& lr, double momentum, bool nesterov) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam, t.lr = lr, t.first = velocity;
  t.rule.momentum = momentum;
  t.rule.nesterov = nesterov;
  apply_rule("prox_momentum_step_", t, [](const auto& kernels) { return kernels.momentum; });
}

void prox_adam_step_(at::Tensor& phi, at::Tensor& exp_avg, at::Tensor& exp_avg_sq, const at::Tensor& grad,
                     const at::Tensor& theta, const at::Tensor& lam, const at::Tensor& lr, double beta1, double beta2,
                     double eps, int64_t step) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam, t.lr = lr, t.first = exp_avg, t.second = exp_avg_sq;
  t.first_name = "exp_avg";
  t.rule = adam_rule("prox_adam_step_", beta1, beta2, eps, step);
  apply_rule("prox_adam_step_", t, [](const auto& kernels) { return kernels.adam; });
}

}  // namespace

TORCH_LIBRARY_IMPL(imaml_ext, CPU, m) {
  m.impl("prox_gradient_", &prox_gradient_);
  m.impl("prox_penalty", &prox_penalty);
  m.impl("prox_sgd_step_", &prox_sgd_step_);
  m.impl("prox_momentum_step_", &prox_momentum_step_);
  m.impl("prox_adam_step_", &prox_adam_step_);
}

}  // namespace imaml_ext
