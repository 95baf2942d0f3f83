// What one row of a batched least-squares solve decides: its step length, its next direction, when it stops and why.
// Written once, for host and device: the CPU and the CUDA kernels call the same functions.
//
// Row b minimises ‖M x − y‖² + xᵀS x, S = diag(shift), by conjugate gradients on the normal equations in the form CGLS
// (Hestenes and Stiefel, 1952), which carries the residual r = y − M x and makes the gradient s from it by a product:
//
//     q = M p     α = ‖s‖² / (‖q‖² + pᵀS p)     x ← x + α p     r ← r − α q
//     s = Mᵀr − S x     β = ‖s‖² / ‖s‖²_old     p ← s + β p
//
// In exact arithmetic its iterates are those of LSQR (Paige and Saunders, 1982), and in floating point it is as
// accurate (Björck, Elfving and Strakoš, SIAM J. Matrix Anal. Appl. 19, 1998). It can begin anywhere where S is not 0,
// and S may differ from unknown to unknown; LSQR would need another vector for that. LSQR's vectors have norm 1, and so
// have these, but for a power of two: r = ρ r̂ and p = π p̂. Neither the magnitude of y nor that of M is in what the
// callbacks are given, and scaling by a power of two changes no bit but of exponents.
//
// Norms of recurrences drift away from those of x as rounding errors gather. A row is therefore CONVERGED only when
// y − M x and the gradient have been measured: it turns VERIFYING, and the vector it hands to M next is x itself.
#pragma once

#include <bit>

#include "common/row.h"

namespace imaml_ext {

constexpr int32_t kBeginning = 20;  // a row at work for which Mᵀy is not yet known

// One row of the float64 tensor `state` [B, kLsqrStateWidth]. Norms of residuals and gradients, and what is made of
// them, are in units of `unit`.
struct LsqrState {
  double residual;        // ‖y − M x‖ of the x that the row holds
  double gradient;        // ‖Mᵀ(y − M x) − S x‖ of that x
  double unit;            // a power of two next to ‖y‖
  double rhs;             // ‖y‖
  double rhs_gradient;    // ‖Mᵀy‖
  double rtol;            // relative tolerance
  double threshold;       // max(rtol ‖Mᵀy‖, atol); at first, atol
  double next_residual;   // ‖r‖ of the r̂ in memory; x follows when s is known
  double r_scale;         // ρ / unit
  double p_scale;         // π / unit
  double p_norm;          // ‖p̂‖
  double damped_p_norm;   // ‖S^½ p̂‖
  double step;            // α π / unit: x ← x + unit step p̂
  double exhausted;       // 1: M p is 0 to working precision, and x must be measured
  double operator_norm;   // largest ‖M v‖ / ‖v‖ or ‖Mᵀv‖ / ‖v‖ met so far, a lower estimate of ‖M‖
  double solution_bound;  // ≥ ‖x‖; infinity: a warm start that nothing has measured
  double least;           // least (‖r‖² + xᵀS x)^½ since the last measurement
  double kept;            // gradient of the iterate in `best`; infinity: there is none
  double kept_residual;   // its residual
  double measured;        // least gradient that a measurement has found above the tolerance
  double stalls;          // measurements that improved on `measured` by less than a tenth
};
constexpr int64_t kLsqrStateWidth = 21;
constexpr int64_t kLsqrResidual = 0, kLsqrGradient = 1, kLsqrUnit = 2;  // its columns
static_assert(sizeof(LsqrState) == kLsqrStateWidth * sizeof(double), "LsqrState is read as a row of float64");

// What the arithmetic of a solve is.
struct LsqrNumbers {
  double unit_roundoff;     // of the vectors' type
  double compute_roundoff;  // of the type that products are computed in
  double largest;           // number of the vectors' type
  double compute_largest;   // of the other
  int32_t most_exponent;    // of a unit: its inverse is a number of that type too
};

// r̂ ← keep r̂ − step q   or, of a row that verifies,   r̂ ← step (y − q)
struct ResidualMove {
  double keep;
  double step;
};

// For x with the step that it takes, if any.
struct GradientNorms {
  double s;         // ‖Mᵀr̂ − S x / ρ‖
  double t;         // ‖Mᵀr̂‖
  double x;         // ‖x‖; 0 where not asked for
  double damped_x;  // ‖S^½ x‖
};

struct DirectionMove {
  double gradient = 0.0;  // p̂ ← gradient ŝ + keep p̂, where the row is at work afterwards and does not verify
  double keep = 0.0;
  bool take_step = false;
  bool clear_solution = false;
  Best best = Best::kNothing;
};

// The exponent of a positive number; −1023 for 0 and below the normal numbers.
IMAML_HOST_DEVICE int32_t exponent_of(double value) {
  return static_cast<int32_t>(std::bit_cast<uint64_t>(value) >> 52) - 1023;
}

// 2 to the power of `exponent`, taken into the bounds, which are those of normal numbers at most.
IMAML_HOST_DEVICE double power_of_two(int32_t exponent, int32_t least, int32_t most) {
  exponent = exponent < least ? least : exponent > most ? most : exponent;
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// ρ / unit for a residual of such a norm. One far below rounding is not followed.
IMAML_HOST_DEVICE double lsqr_residual_scale(const LsqrState& state, double norm, const LsqrNumbers& numbers) {
  const int32_t of_unit = exponent_of(state.unit);
  const int32_t lowest = -numbers.most_exponent - of_unit, highest = numbers.most_exponent - of_unit;
  return power_of_two(exponent_of(norm), lowest > -200 ? lowest : -200, highest < 1023 ? highest : 1023);
}

// Before the first product, r being y.
IMAML_HOST_DEVICE void lsqr_begin_row(LsqrState& state, double y_norm, double rtol, double atol, bool warm,
                                      const LsqrNumbers& numbers) {
  state = LsqrState{};
  const bool known = is_finite(y_norm) && y_norm > 0.0;
  state.unit = known ? power_of_two(exponent_of(y_norm), -numbers.most_exponent, numbers.most_exponent) : 1.0;
  state.rhs = state.residual = state.next_residual = y_norm / state.unit;
  state.gradient = NAN;
  state.rtol = rtol;
  state.threshold = atol / state.unit;
  state.r_scale = 1.0;
  state.solution_bound = warm ? kInfinity : 0.0;
  state.least = state.kept = state.measured = kInfinity;
}

// Once ‖q‖ is known, q = M p̂; of a row that verifies, ‖y − M x‖. Returns how r follows.
//
// A direction is in the kernel of M to working precision where ‖q‖ is within the rounding of a product. A step along it
// would be about 1 / u times too long. Directions are combinations of Mᵀr, so that this comes of rounding alone: the
// row measures what it has.
IMAML_HOST_DEVICE ResidualMove lsqr_step_length(LsqrState& state, int32_t& status, double norm,
                                                const LsqrNumbers& numbers) {
  if (status == kVerifying) {
    const double in_units = norm / state.unit;
    if (!is_finite(in_units)) {
      status = kNonFinite;
      return {0.0, 0.0};
    }
    state.r_scale = lsqr_residual_scale(state, in_units, numbers);
    return {0.0, 1.0 / (state.unit * state.r_scale)};
  }
  const double curvature = hypot(norm, state.damped_p_norm);
  if (!is_finite(curvature)) {
    status = kNonFinite;
    return {0.0, 0.0};
  }
  state.operator_norm = fmax(state.operator_norm, norm / state.p_norm);
  const double scale = lsqr_residual_scale(state, state.next_residual, numbers);
  const double keep = state.r_scale / scale;
  state.r_scale = scale;
  state.step = state.exhausted = 0.0;
  if (!(curvature > 8.0 * numbers.compute_roundoff * state.operator_norm * state.p_norm)) {
    state.exhausted = 1.0;
    return {keep, 0.0};
  }
  state.step = state.gradient / state.p_scale / curvature * (state.gradient / curvature);
  if (!(state.step * state.unit <= numbers.compute_largest && state.step / scale <= numbers.compute_largest))
    status = kNonFinite;
  return {keep, state.step / scale};
}

// Once ‖r̂‖² is known.
IMAML_HOST_DEVICE void lsqr_residual_known(LsqrState& state, int32_t& status, double rr) {
  state.next_residual = sqrt(rr) * state.r_scale;
  if (!is_finite(rr)) status = kNonFinite;
}

// p ← s + β p, of norm ‖s‖² + β² ‖p‖² as s is orthogonal to the p before it.
IMAML_HOST_DEVICE void lsqr_turn(LsqrState& state, double beta, DirectionMove& move) {
  const double norm = beta > 0.0 ? hypot(state.gradient, beta * state.p_scale * state.p_norm) : state.gradient;
  const double scale = power_of_two(exponent_of(norm), -1000, 1000);
  move.gradient = state.r_scale / scale;
  move.keep = beta * state.p_scale / scale;
  state.p_scale = scale;
}

// What Mᵀr̂ tells of ‖M‖. Where Mᵀy is 0 to working precision, no gradient can be told from it that is not above the
// rounding of Mᵀy: the tolerance is not below that.
IMAML_HOST_DEVICE void lsqr_note_product(LsqrState& state, double t, const LsqrNumbers& numbers) {
  if (state.next_residual > 0.0)
    state.operator_norm = fmax(state.operator_norm, t * state.r_scale / state.next_residual);
  const double rounding = 16.0 * numbers.compute_roundoff * state.operator_norm * state.rhs;
  if (state.rhs_gradient <= rounding) state.threshold = fmax(state.threshold, rounding);
}

// Whether norms of x, measured or not, are within a tolerance: that of the gradient, or, of a consistent system, that
// of the residual, xᵀS x being a part of it.
IMAML_HOST_DEVICE bool lsqr_is_within(const LsqrState& state, double objective) {
  return state.gradient <= state.threshold || objective <= state.rtol * state.rhs;
}

// Mᵀy is known.
IMAML_HOST_DEVICE void lsqr_begun(LsqrState& state, int32_t& status, const GradientNorms& norms, DirectionMove& move) {
  if (state.rhs == 0.0) {  // M x = 0: x = 0, whatever x0
    move.clear_solution = true;
    state.gradient = 0.0;
    status = kConverged;
    return;
  }
  move.clear_solution = !is_finite(norms.x);
  state.rhs_gradient = state.gradient;
  state.threshold = fmax(state.threshold, state.rtol * state.gradient);
  state.least = state.rhs;
  if (move.clear_solution || !is_finite(state.gradient) || !is_finite(state.rhs)) {
    status = kNonFinite;
  } else if (state.solution_bound > 0.0) {
    status = kVerifying;
  } else {
    status = lsqr_is_within(state, state.rhs) ? kConverged : kIterating;
  }
}

// y − M x and its gradient have been measured, for the x that the row has.
IMAML_HOST_DEVICE void lsqr_measured(LsqrState& state, int32_t& status, double objective, DirectionMove& move) {
  state.least = objective;
  if (lsqr_is_within(state, objective)) {
    status = kConverged;
    return;
  }
  if (state.gradient > 0.9 * state.measured) state.stalls += 1.0;
  if (state.stalls >= 4.0) {
    status = kStagnated;
    if (state.kept < state.gradient) {
      move.best = Best::kRestore;
      state.gradient = state.kept;
      state.residual = state.kept_residual;
    }
    return;
  }
  state.measured = fmin(state.measured, state.gradient);
  if (state.gradient < state.kept) {
    move.best = Best::kKeep;
    state.kept = state.gradient;
    state.kept_residual = state.residual;
  }
  status = kIterating;
}

// A step of the recurrence. Where the gradient is within the rounding of the product that made it, the recurrence has
// nothing more to tell, and the row measures.
IMAML_HOST_DEVICE void lsqr_stepped(LsqrState& state, int32_t& status, int32_t& iterations, double objective, double t,
                                    DirectionMove& move, const LsqrNumbers& numbers) {
  move.take_step = state.step > 0.0;
  iterations += move.take_step ? 1 : 0;
  state.least = fmin(state.least, objective);
  const double of_residual = 8.0 * numbers.compute_roundoff + 0.5 * numbers.unit_roundoff;  // r̂ is stored
  const double rounding =
      of_residual * state.operator_norm * state.residual + 2.0 * numbers.unit_roundoff * t * state.r_scale;
  if (lsqr_is_within(state, objective) || state.exhausted > 0.0 || state.gradient <= rounding) status = kVerifying;
}

// Once s is known; `knows_solution`: ‖x‖ was asked for. Every step makes ‖r‖² + xᵀS x smaller: where it has become four
// times as large, rmatvec is not the adjoint of matvec.
IMAML_HOST_DEVICE void lsqr_gradient_known(LsqrState& state, int32_t& status, int32_t& iterations,
                                           const GradientNorms& norms, bool knows_solution, DirectionMove& move,
                                           const LsqrNumbers& numbers) {
  double beta = 0.0;
  const double gradient = norms.s * state.r_scale;
  if (status == kBeginning) {
    state.gradient = norms.t * state.r_scale;
    lsqr_begun(state, status, norms, move);
  } else {
    const double objective = hypot(state.next_residual, norms.damped_x / state.unit);
    if (!is_finite(gradient) || !is_finite(norms.x) || !is_finite(objective)) {
      status = kNonFinite;
      return;
    }
    if (status == kIterating && objective > 2.0 * state.least) {
      status = kDiverged;
      return;
    }
    beta = gradient / state.gradient * (gradient / state.gradient);
    state.solution_bound = knows_solution ? norms.x : state.solution_bound + state.unit * state.step * state.p_norm;
    state.gradient = gradient;
    state.residual = state.next_residual;
    lsqr_note_product(state, norms.t, numbers);
    if (status == kVerifying) {
      beta = 0.0;
      lsqr_measured(state, status, objective, move);
    } else {
      lsqr_stepped(state, status, iterations, objective, norms.t, move, numbers);
    }
  }
  if (status == kIterating) lsqr_turn(state, beta, move);
}

// Once the sums ‖p̂‖² and p̂ᵀS p̂ are known.
IMAML_HOST_DEVICE void lsqr_direction_known(LsqrState& state, int32_t& status, double pp, double pSp) {
  state.p_norm = sqrt(pp);
  state.damped_p_norm = sqrt(pSp);
  if (!is_finite(pp) || !is_finite(pSp)) status = kNonFinite;
}

// Whether ‖x‖ must be summed: where there is damping, where x itself is measured or is a warm start, and where a step
// might leave the finite numbers.
IMAML_HOST_DEVICE bool lsqr_asks_for_solution(const LsqrState& state, int32_t status, bool damped, double largest) {
  if (status == kBeginning) return state.solution_bound > 0.0;
  if (status == kVerifying || damped) return true;
  return !(state.solution_bound + state.unit * state.step * state.p_norm < largest);
}

}  // namespace imaml_ext
