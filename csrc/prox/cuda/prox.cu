// The proximal ops on CUDA.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include "common/cuda/row_team.cuh"
#include "prox/arguments.h"
#include "prox/cuda/prox.cuh"

namespace imaml_ext {
namespace {

__device__ __forceinline__ float square_root(float a) { return sqrtf(a); }
__device__ __forceinline__ double square_root(double a) { return sqrt(a); }
#define IMAML_RULE __device__ __forceinline__
#include "prox/rules.inl"

constexpr int kElementThreads = 256;

// One element of one row under a rule: what is read, what the rule makes of it, what is written.
template <typename T>
struct Element {
  using C = typename ProxArguments<T>::C;
  const ProxArguments<T>& a;
  int64_t k;  // in [B, N]
  C lam, lr, phi, g;

  __device__ Element(const ProxArguments<T>& arguments, int64_t row, int64_t col)
      : a(arguments), k(row * a.cols + col), lam(at(a.lam, row, col)), lr(a.lr.data ? at(a.lr, row, col) : C(0)) {
    phi = static_cast<C>(a.phi[k]);
    const C theta = static_cast<C>(a.theta[row * a.theta_row_stride + col]);
    g = proximal_gradient(static_cast<C>(a.grad[k]), lam, phi, theta);
  }
  __device__ void move_along(C direction) { a.phi[k] = static_cast<T>(phi - lr * direction); }
};

// g ← g + λ (φ − θ)
struct GradientRule {
  template <typename T>
  __device__ void operator()(Element<T> e) const {
    e.a.grad[e.k] = static_cast<T>(e.g);
  }
};

// φ ← φ − η g
struct SgdRule {
  template <typename T>
  __device__ void operator()(Element<T> e) const {
    e.move_along(e.g);
  }
};

struct MomentumRule {
  template <typename T>
  __device__ void operator()(Element<T> e) const {
    using C = typename Element<T>::C;
    C velocity = static_cast<C>(e.a.first[e.k]);
    const C direction = momentum_direction(velocity, e.g, static_cast<C>(e.a.rule.momentum), e.a.rule.nesterov);
    e.a.first[e.k] = static_cast<T>(velocity);
    e.move_along(direction);
  }
};

struct AdamRule {
  template <typename T>
  __device__ void operator()(Element<T> e) const {
    using C = typename Element<T>::C;
    const ProxRule& rule = e.a.rule;
    C m = static_cast<C>(e.a.first[e.k]);
    C s = static_cast<C>(e.a.second[e.k]);
    const C direction =
        adam_direction(m, s, e.g, static_cast<C>(rule.beta1), static_cast<C>(rule.beta2),
                       static_cast<C>(1.0 - rule.beta1), static_cast<C>(1.0 - rule.beta2),
                       static_cast<C>(rule.correction1), static_cast<C>(rule.correction2), static_cast<C>(rule.eps));
    e.a.first[e.k] = static_cast<T>(m);
    e.a.second[e.k] = static_cast<T>(s);
    e.move_along(direction);
  }
};

template <typename T, typename Rule>
__global__ void __launch_bounds__(kElementThreads) rule_kernel(ProxArguments<T> a) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kElementThreads;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    for (int64_t col = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x; col < a.cols; col += stride) {
      Rule{}(Element<T>(a, row, col));
    }
  }
}

// ½ Σ λ (φ − θ)²
template <typename T>
__global__ void __launch_bounds__(kThreads) penalty_kernel(ProxArguments<T> a) {
  using C = typename ProxArguments<T>::C;
  __shared__ TeamStorage<1> storage;
  RowTeam<1> team(storage);
  const int64_t row = team.row();
  double sum[1] = {0.0};
  for (int64_t col = team.rank() * kThreads + threadIdx.x; col < a.cols; col += team.size() * kThreads) {
    const double phi = static_cast<double>(static_cast<C>(a.phi[row * a.cols + col]));
    const double theta = static_cast<double>(static_cast<C>(a.theta[row * a.theta_row_stride + col]));
    sum[0] += static_cast<double>(at(a.lam, row, col)) * (phi - theta) * (phi - theta);
  }
  team.sum(0, sum);
  team.sync();  // no block leaves while another may still read its sums
  if (team.leads()) a.penalty[row] = static_cast<C>(0.5 * storage.team_sums[0][0]);
}

// Validates, then applies the rule to every element.
template <typename Rule>
void apply_rule(const char* op, const ProxTensors& tensors) {
  const auto dtype = tensors.check(op);
  const c10::cuda::CUDAGuard guard(tensors.phi.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, "imaml_ext", [&] {
    const auto a = tensors.arguments<scalar_t>();
    if (a.rows == 0 || a.cols == 0) return;
    const int64_t blocks = (a.cols + kElementThreads - 1) / kElementThreads;
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max())),
                    static_cast<unsigned>(std::min<int64_t>(a.rows, 65535)));
    launch(rule_kernel<scalar_t, Rule>, grid, kElementThreads, 0, a);
  });
}

void prox_gradient_(at::Tensor& grad, const at::Tensor& phi, const at::Tensor& theta, const at::Tensor& lam) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam;
  apply_rule<GradientRule>("prox_gradient_", t);
}

at::Tensor prox_penalty(const at::Tensor& phi, const at::Tensor& theta, const at::Tensor& lam) {
  ProxTensors t;
  t.phi = phi, t.theta = theta, t.lam = lam;
  const auto dtype = t.check("prox_penalty");
  const c10::cuda::CUDAGuard guard(phi.device());
  t.penalty = at::empty({phi.size(0)}, phi.options().dtype(compute_type(dtype)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, "imaml_ext", [&] {
    const auto a = t.arguments<scalar_t>();
    launch_row_teams(penalty_kernel<scalar_t>, a.rows, a.cols, 0, a);
  });
  return t.penalty;
}

void prox_momentum_step_(at::Tensor& phi, at::Tensor& velocity, const at::Tensor& grad, const at::Tensor& theta,
                         const at::Tensor& lam, const at::Tensor& lr, double momentum, bool nesterov) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam, t.lr = lr, t.first = velocity;
  t.rule.momentum = momentum;
  t.rule.nesterov = nesterov;
  apply_rule<MomentumRule>("prox_momentum_step_", t);
}

void prox_adam_step_(at::Tensor& phi, at::Tensor& exp_avg, at::Tensor& exp_avg_sq, const at::Tensor& grad,
                     const at::Tensor& theta, const at::Tensor& lam, const at::Tensor& lr, double beta1, double beta2,
                     double eps, int64_t step) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam, t.lr = lr, t.first = exp_avg, t.second = exp_avg_sq;
  t.first_name = "exp_avg";
  t.rule = adam_rule("prox_adam_step_", beta1, beta2, eps, step);
  apply_rule<AdamRule>("prox_adam_step_", t);
}

}  // namespace

void prox_sgd_step_on_cuda(at::Tensor& phi, const at::Tensor& grad, const at::Tensor& theta, const at::Tensor& lam,
                           const at::Tensor& lr) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam, t.lr = lr;
  apply_rule<SgdRule>("prox_sgd_step_", t);
}

TORCH_LIBRARY_IMPL(imaml_ext, CUDA, m) {
  m.impl("prox_gradient_", &prox_gradient_);
  m.impl("prox_penalty", &prox_penalty);
  m.impl("prox_sgd_step_", &prox_sgd_step_on_cuda);
  m.impl("prox_momentum_step_", &prox_momentum_step_);
  m.impl("prox_adam_step_", &prox_adam_step_);
}

}  // namespace imaml_ext
