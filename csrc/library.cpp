// The operator registry: every op's schema, once. Implementations stand beside their kernels, in cpu/ and cuda/.
#include <torch/library.h>

TORCH_LIBRARY(imaml_ext, m) {
  // Conjugate gradients. state [B, 6] float64 and status [B] int32 live on the device of the vectors; a row's fields
  // are those of RowState and RowStatus in cg_row.h. Coefficients have shape [1 or B, 1 or N].
  //
  // A solve from x = 0 with no preconditioner begins with r = p = b. cg_begin_ without x, r and p leaves it at that,
  // and cg_step_ with `first` makes all three from b. With `last` it leaves r and p as they are: only x, ‖r‖ and the
  // status come of it.
  m.def(
      "cg_begin_(Tensor b, Tensor? hx, Tensor shift, Tensor? inverse_diagonal, Tensor rtol, Tensor atol, "
      "Tensor(a!)? x, Tensor(b!)? r, Tensor(c!)? p, Tensor(d!) state, Tensor(e!) status, Tensor(f!) iterations, "
      "bool update_direction=True) -> ()");
  m.def(
      "cg_direction_(Tensor? z, Tensor? inverse_diagonal, Tensor x, Tensor r, Tensor(a!) p, Tensor(b!) state, "
      "Tensor(c!) status) -> ()");
  m.def(
      "cg_step_(Tensor hp, Tensor b, Tensor shift, Tensor? inverse_diagonal, Tensor(a!) x, Tensor(b!) r, "
      "Tensor(c!) p, Tensor(d!) state, Tensor(e!) status, Tensor(f!) iterations, bool update_direction=True, "
      "bool first=False, bool last=False) -> ()");

  // The proximal objective L(φ) + ½ Σ λ (φ − θ)². theta is [1 or B, N].
  m.def("prox_gradient_(Tensor(a!) grad, Tensor phi, Tensor theta, Tensor lam) -> ()");
  m.def("prox_penalty(Tensor phi, Tensor theta, Tensor lam) -> Tensor");
  m.def("prox_sgd_step_(Tensor(a!) phi, Tensor grad, Tensor theta, Tensor lam, Tensor lr) -> ()");
  m.def(
      "prox_momentum_step_(Tensor(a!) phi, Tensor(b!) velocity, Tensor grad, Tensor theta, Tensor lam, Tensor lr, "
      "float momentum, bool nesterov=False) -> ()");
  m.def(
      "prox_adam_step_(Tensor(a!) phi, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor theta, "
      "Tensor lam, Tensor lr, float beta1, float beta2, float eps, int step) -> ()");

  // The reference networks, every task with parameters of its own: params [B, N], x [B, S, *], y [B, S] labels or
  // [B, S, *] targets; `network` as in network.h.
  m.def("network_outputs(Tensor params, Tensor x, int[] network) -> Tensor");
  m.def(
      "network_gradient(Tensor params, Tensor x, Tensor y, int[] network) -> "
      "(Tensor losses, Tensor outputs, Tensor gradient)");
  // `steps` times φ ← φ − η (∇L + λ (φ − θ)), as prox_sgd_step_; losses [steps, B] before each.
  m.def(
      "network_descend_(Tensor(a!) phi, Tensor theta, Tensor lam, Tensor lr, Tensor x, Tensor y, int[] network, "
      "int steps) -> Tensor");
  m.def(
      "network_linearise(Tensor params, Tensor x, Tensor y, int[] network) -> "
      "(Tensor losses, Tensor outputs, Tensor gradient, Tensor tape)");
  m.def("network_product(Tensor params, Tensor tape, Tensor y, Tensor p, int[] network, bool gauss_newton) -> Tensor");
  // pᵀ Jᵀ C J p of every task, [B] float64: the way forward of the product with the Gauss-Newton matrix alone.
  m.def("network_curvature(Tensor params, Tensor tape, Tensor y, Tensor p, int[] network) -> Tensor");
}
