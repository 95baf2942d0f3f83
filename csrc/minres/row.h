// What one row of a batched MINRES solve decides: its Lanczos coefficients, its rotation, its step, when it stops and
// why. Written once, for host and device: the CPU and the CUDA kernels call the same functions.
//
// Row b solves A x = b with A = H + diag(shift), symmetric and of any definiteness: Paige and Saunders (1975).
//
//     α = vᵀ A v      u = A v − α v − β v₋      β₊ = ‖u‖      v₊ = u / β₊
//     δ, γ̄ of the column (β, α) by the rotation before      γ = ‖(γ̄, β₊)‖      c = γ̄ / γ      s = β₊ / γ
//     q = v − (δ / γ₁) q₁ − (ε / γ₂) q₂      x ← x + (c ‖r‖ / γ) q      ‖r‖ ← s ‖r‖
//
// The directions are q = γ w, w being those of the paper: q is about as long as v, so that no half type overflows.
//
// The residual carried by recurrence drifts away from b − A x, more so than in conjugate gradients (Sleijpen, van der
// Vorst, Modersitzki 2000). A row is therefore CONVERGED or SINGULAR only when b − A x has been measured: the next
// vector that it hands to the operator is x itself. Where that does not confirm it, a new Krylov space begins at x.
#pragma once

#include "common/row.h"

namespace imaml_ext {

// One row of the float64 tensor `state` [B, kMinresStateWidth]. The numbers of the Lanczos process, from operator_norm
// to gamma_before, are in units of `operator_unit`, so that their squares are numbers too.
struct MinresState {
  double residual;             // ‖r‖ at the iterate the row holds
  double threshold;            // max(rtol ‖b‖, atol)
  double unit;                 // of b − A x in sums: a power of two
  double operator_unit;        // 2⁻⁶⁰⁰, 1 or 2⁶⁰⁰; 1 for types narrower than float64
  double operator_norm;        // largest ‖A v‖ met so far, a lower estimate of ‖A‖
  double beta;                 // β, between v₋ and v; 0: the Krylov space begins with v
  double cosine, sine;         // of the last rotation
  double delta, epsilon;       // what the rotations before have made of the next column
  double gamma, gamma_before;  // of q₁ and q₂; 0: there is no such direction yet
  double measured;             // least ‖b − A x‖ measured
  double stalls;               // measurements that improved on `measured` by less than a tenth
  double kept;                 // 1: the x of `measured` is in `best`; 0: it is 0
  double restarts;             // Krylov spaces begun after the first
  double coefficients;         // α that the first Krylov space has given
};
constexpr int64_t kMinresStateWidth = 17;
constexpr int64_t kMinresResidual = 0;  // its columns
constexpr int64_t kMinresCoefficients = 16;
static_assert(sizeof(MinresState) == kMinresStateWidth * sizeof(double), "MinresState is read as a row of float64");

struct ProductSums {
  double vAv;   // vᵀ A v, in operator_unit
  double AvAv;  // ‖A v‖², in operator_unit²
};

struct TurnSums {
  double uu;  // ‖u‖², in operator_unit²
  double qq;  // ‖q‖²
  double xq;  // xᵀ q, x in solution_unit
  double xx;  // ‖x‖², in solution_unit²
};

// What one step of a row has decided so far.
struct MinresStep {
  double alpha = 0.0, beta = 0.0;           // u = A v − α v − β v₋
  double turn = 0.0, turn_before = 0.0;     // q = v − turn q₁ − turn_before q₂
  double tau = 0.0;                         // x ← x + τ q
  double gamma_bar = 0.0, beta_next = 0.0;  // in operator_unit
  double solution_norm = 0.0;               // ‖x + τ q‖
  double scale = 1.0, divisor = 1.0;        // the next v is u, or b − A x, times scale / divisor
  Best best = Best::kNothing;
  bool recorded = false;        // α and β belong to the first Krylov space
  bool take_step = false;       // x moves
  bool restart = false;         // v = (b − A x) / ‖b − A x‖
  bool may_overflow = false;    // x + τ q may leave the finite numbers
  bool clear_solution = false;  // x ← 0
};

// Whether the row measures b − A x: the vector that the operator was given is x.
IMAML_HOST_DEVICE bool minres_measures(int32_t status) { return status == kVerifying || status == kSuspect; }

// ‖(a, b)‖ of numbers in operator_unit, whose squares are numbers.
IMAML_HOST_DEVICE double minres_length(double a, double b) { return sqrt(a * a + b * b); }

// Of x in sums.
IMAML_HOST_DEVICE double minres_solution_unit(const MinresState& state) {
  return fmin(fmax(state.unit / state.operator_unit, 0x1p-1000), 0x1p1000);
}

// scale / divisor = 1 / norm, the scale a power of two: norms of float32 vectors may be no float32 numbers.
IMAML_HOST_DEVICE void minres_normalise(MinresStep& step, double norm, bool wide) {
  const double most = wide ? 1000.0 : 120.0;
  step.scale = ldexp(1.0, -static_cast<int>(fmin(fmax(ilogb(norm), -most), most)));
  step.divisor = norm * step.scale;
}

IMAML_HOST_DEVICE void minres_new_space(MinresState& state) {
  state.beta = state.sine = state.delta = state.epsilon = state.gamma = state.gamma_before = 0.0;
  state.cosine = -1.0;
}

// Before the first iteration (row_start). `warm`: there is an x0.
IMAML_HOST_DEVICE int32_t minres_start(MinresState& state, const BeginSums& sums, double b_scale, double r_scale,
                                       double rtol, double atol, bool wide, bool warm, MinresStep& step) {
  RowStart start;
  const int32_t status = row_start(start, sums, b_scale, r_scale, rtol, atol, wide);
  state = MinresState{};
  state.residual = state.measured = start.residual;
  state.threshold = start.threshold;
  state.unit = start.unit;
  state.operator_unit = 1.0;
  state.kept = warm ? 1.0 : 0.0;
  minres_new_space(state);
  step.clear_solution = start.clear_solution || !warm;
  if (status == kIterating) minres_normalise(step, start.residual, wide);
  return status;
}

// Of float64 numbers alone: whether ‖A v‖² has left the range of numbers, and is to be summed again in a new unit.
IMAML_HOST_DEVICE bool minres_rescale(MinresState& state, const ProductSums& sums) {
  const double scale = row_scale_of_sum(sums.AvAv);
  if (scale == 1.0 || (scale > 1.0 && state.operator_norm > 0.0)) return false;
  state.operator_unit /= scale;
  state.operator_norm *= scale, state.beta *= scale, state.delta *= scale, state.epsilon *= scale;
  state.gamma *= scale, state.gamma_before *= scale;
  return true;
}

// Once A v is known:  α,  and what the rotation before makes of the new column.
IMAML_HOST_DEVICE void minres_product(MinresState& state, int32_t& status, const ProductSums& sums, MinresStep& step) {
  if (!is_finite(sums.vAv) || !is_finite(sums.AvAv)) {
    status = kNonFinite;
    return;
  }
  state.operator_norm = fmax(state.operator_norm, sqrt(sums.AvAv));
  step.alpha = sums.vAv * state.operator_unit;
  step.beta = state.beta * state.operator_unit;
  step.gamma_bar = state.sine * state.delta - state.cosine * sums.vAv;
  const double delta = state.cosine * state.delta + state.sine * sums.vAv;
  if (state.gamma > 0.0) step.turn = delta / state.gamma;
  if (state.gamma_before > 0.0) step.turn_before = state.epsilon / state.gamma_before;
  if (state.restarts == 0.0) {
    step.recorded = true;
    state.coefficients += 1.0;
  }
}

// Once u and q are known:  β₊,  and the step. ‖A r‖ = ‖r‖ ‖(γ̄, δ₊)‖: where that is nothing, r is a null vector of A,
// and no step makes it smaller.
IMAML_HOST_DEVICE void minres_turn(MinresState& state, int32_t& status, const TurnSums& sums, double unit_roundoff,
                                   double largest, MinresStep& step) {
  if (!is_finite(sums.uu) || !is_finite(sums.qq)) {
    status = kNonFinite;
    return;
  }
  const double epsilon = 2.0 * unit_roundoff;
  const double negligible = sqrt(epsilon * sqrt(epsilon)) * state.operator_norm;
  step.beta_next = sqrt(sums.uu);
  if (step.beta_next <= negligible) step.beta_next = 0.0;
  const double delta_next = -state.cosine * step.beta_next;
  const double gamma = minres_length(step.gamma_bar, step.beta_next);
  if (minres_length(step.gamma_bar, delta_next) <= negligible || gamma <= negligible) {
    status = kSuspect;
    return;
  }
  const double unit = minres_solution_unit(state);
  // Units are powers of two: by their exponents, so that what is a number at the end need not be one on the way.
  const double of_units = step.gamma_bar / gamma * (state.residual / state.unit / gamma);
  step.tau = ldexp(of_units, ilogb(state.unit) - ilogb(state.operator_unit));
  const double t = step.tau / unit;
  step.solution_norm = sqrt(fmax(sums.xx + t * (2.0 * sums.xq + t * sums.qq), 0.0)) * unit;
  step.may_overflow = !(step.solution_norm < largest);
}

// Whether the step is taken. Not one to an x so long that the rounding of A x alone exceeds the residual by far: the
// row measures where it is.
IMAML_HOST_DEVICE void minres_take(MinresState& state, int32_t& status, int32_t& iterations, bool overflows,
                                   double unit_roundoff, bool wide, MinresStep& step) {
  if (overflows) {
    status = kNonFinite;
    return;
  }
  const double rounding = 2.0 * unit_roundoff * state.operator_norm * state.operator_unit * step.solution_norm;
  if (rounding > 64.0 * state.residual) {
    status = kVerifying;
    return;
  }
  const double gamma = minres_length(step.gamma_bar, step.beta_next);
  state.delta = -state.cosine * step.beta_next;
  state.epsilon = state.sine * step.beta_next;
  state.cosine = step.gamma_bar / gamma;
  state.sine = step.beta_next / gamma;
  state.gamma_before = state.gamma;
  state.gamma = gamma;
  state.beta = step.beta_next;
  state.residual *= state.sine;
  ++iterations;
  step.take_step = true;
  // A residual within the tolerance is measured next, and so is the one of a space that is exhausted.
  if (state.residual <= state.threshold || state.beta == 0.0) {
    status = kVerifying;
  } else {
    minres_normalise(step, state.beta * state.operator_unit, wide);
  }
}

// b − A x has been measured, for the x that the row has: ‖b − A x‖² = rr in unit².
IMAML_HOST_DEVICE void minres_measured(MinresState& state, int32_t& status, double rr, bool wide, MinresStep& step) {
  if (!is_finite(rr)) {
    status = kNonFinite;
    return;
  }
  const double norm = sqrt(rr) * state.unit;
  const bool confirmed = status == kSuspect && norm <= 2.0 * state.residual;
  state.residual = norm;
  if (norm <= state.threshold || confirmed) {
    status = norm <= state.threshold ? kConverged : kSingular;
    return;
  }
  if (norm > 0.9 * state.measured) state.stalls += 1.0;
  const bool least = norm < state.measured;
  if (least) state.measured = norm;
  if (state.stalls >= 2.0) {
    status = kStagnated;
    state.residual = state.measured;
    if (least) return;
    step.best = state.kept > 0.0 ? Best::kRestore : Best::kNothing;
    step.clear_solution = state.kept == 0.0;
    return;
  }
  if (least) {
    step.best = Best::kKeep;
    state.kept = 1.0;
  }
  status = kIterating;
  state.restarts += 1.0;
  step.restart = true;
  minres_new_space(state);
  minres_normalise(step, norm, wide);
}

}  // namespace imaml_ext
