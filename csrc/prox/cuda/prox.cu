// The proximal ops on CUDA.
#include "common/cuda/row_team.cuh"
#include "prox/arguments.h"

namespace imaml_ext {
namespace {

__device__ __forceinline__ float square_root(float a) { return sqrtf(a); }
__device__ __forceinline__ double square_root(double a) { return sqrt(a); }
#define IMAML_RULE __device__ __forceinline__
#include "prox/rules.inl"

template <typename T>
bool are_packed(const ProxRows<T>& a) {
  return can_pack<T>(a.cols, a.phi, a.grad, a.theta, a.first, a.second) && can_pack<T>(a.cols, a.lam) &&
         can_pack<T>(a.cols, a.lr);
}

// This lane's numbers of a tile under a rule: φ, and its step g.
template <typename T>
struct RuleTile {
  static constexpr int V = kPackSize<T>;
  using C = compute_t<T>;
  using Numbers = Pack<C, V>;
  using Part = RowPart<V, false>;
  const ProxRows<T>& a;
  const Part& part;
  const Tile<V>& tile;
  Numbers phi, g;

  __device__ RuleTile(const ProxRows<T>& arguments, const Part& p, const Tile<V>& t) : a(arguments), part(p), tile(t) {
    phi = load(a.phi);
    const Numbers grad = load(a.grad);
    const Numbers theta = widened(tile.load(a.theta + part.row * a.theta_row_stride + part.begin));
    const Numbers lam = part.load(tile, a.lam);
#pragma unroll
    for (int k = 0; k < V; ++k) g.v[k] = proximal_gradient(grad.v[k], lam.v[k], phi.v[k], theta.v[k]);
  }
  __device__ Numbers load(const T* rows) const { return widened(tile.load(rows + part.start())); }
  __device__ void store(T* rows, const Numbers& numbers) const {
    Pack<T, V> narrow;
#pragma unroll
    for (int k = 0; k < V; ++k) narrow.v[k] = static_cast<T>(numbers.v[k]);
    tile.store(rows + part.start(), narrow);
  }
  // φ ← φ − η direction
  __device__ void move_along(const Numbers& direction) {
    const Numbers lr = part.load(tile, a.lr);
#pragma unroll
    for (int k = 0; k < V; ++k) phi.v[k] -= lr.v[k] * direction.v[k];
    store(a.phi, phi);
  }
};

template <typename T>
__global__ void __launch_bounds__(kShortThreads)
    rule_kernel(const __grid_constant__ ProxRows<T> a, const __grid_constant__ RowPlan plan, ProxUpdate update) {
  wait_for_launch_ahead();
  using Rows = RuleTile<T>;
  using C = compute_t<T>;
  const typename Rows::Part part(plan);
  if (part.row >= plan.rows) return;
  part.for_each_tile([&](const auto& tile) {
    Rows t(a, part, tile);
    if (update == ProxUpdate::kGradient) return t.store(a.grad, t.g);
    if (update == ProxUpdate::kMomentum) {
      auto velocity = t.load(a.first);
#pragma unroll
      for (int k = 0; k < Rows::V; ++k) {
        const C momentum = static_cast<C>(a.rule.momentum);
        t.g.v[k] = momentum_direction(velocity.v[k], t.g.v[k], momentum, a.rule.nesterov);
      }
      t.store(a.first, velocity);
    } else if (update == ProxUpdate::kAdam) {
      auto m = t.load(a.first);
      auto s = t.load(a.second);
#pragma unroll
      for (int k = 0; k < Rows::V; ++k) {
        t.g.v[k] = adam_direction(m.v[k], s.v[k], t.g.v[k], static_cast<C>(a.rule.beta1), static_cast<C>(a.rule.beta2),
                                  static_cast<C>(1.0 - a.rule.beta1), static_cast<C>(1.0 - a.rule.beta2),
                                  static_cast<C>(a.rule.correction1), static_cast<C>(a.rule.correction2),
                                  static_cast<C>(a.rule.eps));
      }
      t.store(a.first, m);
      t.store(a.second, s);
    }
    t.move_along(t.g);
  });
}

// ½ Σ λ (φ − θ)²
template <typename T>
struct Penalty {
  using Number = T;
  using C = compute_t<T>;
  struct Decision {
    double total;
  };
  static constexpr int V = kPackSize<T>;
  static constexpr int kPhases = 2;
  static constexpr int kSums = 1;
  static constexpr bool kKeeps = false;
  ProxRows<T> a;

  __device__ void begin(int64_t, Decision& d) const { d = {}; }
  __device__ bool is_over(const Decision&) const { return false; }

  template <typename Part>
  __device__ void pass(int, const Part& part, const Decision&, double (&sums)[kSums]) const {
    part.for_each_tile([&](const Tile<V>& tile) {
      C* const place = part.template place<C>(tile);
      const auto phi = tile.settled(place, widened(tile.load(a.phi + part.start())));
      const T* const theta_row = a.theta + part.row * a.theta_row_stride + part.begin;
      const auto theta = tile.settled(place, widened(tile.load(theta_row)));
      const auto lam = tile.settled(place, part.load(tile, a.lam));
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const double apart = static_cast<double>(phi.v[k]) - static_cast<double>(theta.v[k]);
        sums[0] = fma(static_cast<double>(lam.v[k]) * apart, apart, sums[0]);
      }
    });
  }
  __device__ void decide(int, int64_t, Decision& d, const double (&sums)[kSums]) const { d.total = sums[0]; }
  template <typename Part>
  __device__ void last_pass(const Part&, const Decision&) const {}
  __device__ void end(int64_t row, const Decision& d) const { a.penalty[row] = static_cast<C>(0.5 * d.total); }
};

}  // namespace

template <typename T>
void prox_update(OnCuda device, ProxUpdate update, const ProxArguments<T>& a) {
  if (a.cols == 0) return;
  const ProxRows<T>& rows = a;
  const RowPlan plan = elementwise_plan<T>(a.rows, a.cols, are_packed(a));
  launch<rule_kernel<T>>(device.stream, shape_of(plan, 0), rows, plan, update);
}

template <typename T>
void prox_penalty(OnCuda device, const ProxArguments<T>& a) {
  launch_rows(device, Penalty<T>{}, a, are_packed(a));
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_PROX, OnCuda)

}  // namespace imaml_ext
