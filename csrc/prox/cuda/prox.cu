// The proximal ops on CUDA.
#include "common/cuda/row_team.cuh"
#include "prox/arguments.h"

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
  wait_for_launch_ahead();
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
  wait_for_launch_ahead();
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

template <typename Rule, typename T>
void apply_rule(cudaStream_t stream, const ProxArguments<T>& a) {
  const int64_t blocks = (a.cols + kElementThreads - 1) / kElementThreads;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max())),
                  static_cast<unsigned>(std::min<int64_t>(a.rows, 65535)));
  launch<rule_kernel<T, Rule>>(stream, {grid, kElementThreads}, a);
}

}  // namespace

template <typename T>
void prox_update(OnCuda device, ProxUpdate update, const ProxArguments<T>& a) {
  if (a.cols == 0) return;
  switch (update) {
    case ProxUpdate::kGradient:
      return apply_rule<GradientRule>(device.stream, a);
    case ProxUpdate::kSgd:
      return apply_rule<SgdRule>(device.stream, a);
    case ProxUpdate::kMomentum:
      return apply_rule<MomentumRule>(device.stream, a);
    case ProxUpdate::kAdam:
      return apply_rule<AdamRule>(device.stream, a);
  }
}

template <typename T>
void prox_penalty(OnCuda device, const ProxArguments<T>& a) {
  launch_row_teams<penalty_kernel<T>>(device.stream, a.rows, a.cols, 0, a);
}

#define IMAML_INSTANTIATE(T)                                              \
  template void prox_update(OnCuda, ProxUpdate, const ProxArguments<T>&); \
  template void prox_penalty(OnCuda, const ProxArguments<T>&);
IMAML_INSTANTIATE(float)
IMAML_INSTANTIATE(double)
IMAML_INSTANTIATE(c10::BFloat16)
IMAML_INSTANTIATE(c10::Half)
#undef IMAML_INSTANTIATE

}  // namespace imaml_ext
