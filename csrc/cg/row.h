// What one row of a batched conjugate-gradient solve decides: its step length, its next direction, when it stops and
// why. Written once, for host and device: the CPU and the CUDA kernels call the same functions.
//
// Row b solves A x = b with A = H + diag(shift). The recurrence is Hestenes and Stiefel (1952), preconditioned:
//
//     α = rᵀz / pᵀAp      x ← x + α p      r ← r − α A p      z = M r      β = rᵀz / (rᵀz)_old      p ← z + β p
//
// A residual carried by recurrence drifts away from b − A x as rounding errors gather, and no bound on that drift is
// both safe and tight: ‖A‖ is not known, nor how the operator rounds. A row is therefore CONVERGED only when b − A x
// has been measured to be within its tolerance. Where ‖r‖ is, the row turns VERIFYING: the vector it hands to the
// operator next is x itself. The row then stops, or its directions start again from the residual that was measured. A
// row that four such measurements have hardly improved has reached what its arithmetic allows: STAGNATED.
#pragma once

#include "common/row.h"

namespace imaml_ext {

// One row of the float64 tensor `state` [B, kRowStateWidth]. Sums over a row (rᵀz, pᵀAp, …) are taken of the vectors
// divided by `unit`: a power of two next to ‖r‖ for float64, and 1 for narrower types, whose squares float64 always
// holds. Norms are those of the vectors themselves.
struct RowState {
  double rz;              // rᵀz of the last direction; 0: the next direction starts afresh (β = 0)
  double residual;        // ‖r‖ at the iterate the row holds
  double threshold;       // max(rtol ‖b‖, atol)
  double unit;            // of the vectors in sums
  double operator_norm2;  // largest ‖A p‖² / ‖p‖² met so far, a lower estimate of ‖A‖²
  double solution_bound;  // ≥ ‖x‖; 0 exactly when x = 0
  double least;           // least ‖r‖ since the last measurement
  double kept;            // ‖r‖ of the iterate in `best`; infinity: there is none
  double measured;        // least ‖b − A x‖ that a measurement has found above the threshold
  double stalls;          // measurements that improved on `measured` by less than a tenth
  double alpha;           // α of the last cg_step_; 0: it took none, because the row has ended or measures
  double beta;            // β of the direction after it
};
constexpr int64_t kRowStateWidth = 12;
constexpr int64_t kResidual = 1;  // its column
constexpr int64_t kAlpha = 10;    // its column, before that of β
static_assert(sizeof(RowState) == kRowStateWidth * sizeof(double), "RowState is read as a row of float64");

struct Curvature {
  double pAp;   // pᵀ A p
  double ApAp;  // ‖A p‖²
  double pp;    // ‖p‖²
};

// Before the first iteration (row_start). Afterwards `clear_solution` says whether x must be set to zero.
IMAML_HOST_DEVICE int32_t row_begin(RowState& state, const BeginSums& sums, double b_scale, double r_scale, double rtol,
                                    double atol, bool wide, bool& clear_solution) {
  RowStart start;
  const int32_t status = row_start(start, sums, b_scale, r_scale, rtol, atol, wide);
  clear_solution = start.clear_solution;
  const double x_norm = clear_solution ? 0.0 : sqrt(sums.xx);
  state = RowState{
      0.0, start.residual, start.threshold, start.unit, 0.0, x_norm, start.residual, kInfinity, kInfinity, 0.0, 0.0,
      0.0};
  return status;
}

// A sum of r times r_scale, as one of r in the row's unit.
IMAML_HOST_DEVICE double row_rescaled(const RowState& state, double r_scale, double sum) {
  const double factor = 1.0 / (state.unit * r_scale);
  return sum * factor * factor;
}

// The row ends with the iterate that it has kept, where its residual is at most `slack` times the present one.
IMAML_HOST_DEVICE Best row_end(RowState& state, int32_t& status, int32_t end, double slack) {
  status = end;
  if (!(state.kept < slack * state.residual)) return Best::kNothing;
  state.residual = state.kept;
  return Best::kRestore;
}

// A singular row prefers the iterate from before it ran off along the kernel, where a residual says little of x.
IMAML_HOST_DEVICE Best row_end_singular(RowState& state, int32_t& status) {
  return row_end(state, status, kSingular, 4.0);
}

// Once A p is known. Returns α; 0 where the row does not move (it stopped, or it only measures). `length` is ‖α p‖.
// On the very first step from x = 0 a row without positive curvature is given b / shift: `take_scaled_rhs`.
//
// Curvature counts as positive when the cosine of the angle between p and A p stands out of the rounding of either, and
// pᵀAp / ‖p‖² out of that of a product: no such quotient lies below the least eigenvalue. For an operator whose
// products have errors of about u ‖A‖ ‖p‖ this is sure of a positive definite A up to a condition of about 1 / (8 u).
// Along the kernel of a singular A the quotient is rounding, and the step, its inverse, would be about 1 / u times too
// long.
IMAML_HOST_DEVICE double row_step_length(RowState& state, int32_t& status, const Curvature& c, double unit_roundoff,
                                         double largest, double& length, bool& take_scaled_rhs, Best& best) {
  take_scaled_rhs = false;
  best = Best::kNothing;
  length = sqrt(c.pp) * state.unit;
  if (status == kVerifying) {  // p is x
    state.solution_bound = length;
    return 0.0;
  }
  if (!is_finite(c.pAp) || !is_finite(c.pp)) {  // so they are where A p is finite, unless it overflows them
    status = kNonFinite;
    return 0.0;
  }
  // Where ‖A p‖² leaves the range of numbers, the sign of pᵀAp alone is looked at.
  const bool in_range = c.ApAp > 1e-200 && is_finite(c.ApAp);
  if (in_range && c.pp > 0.0 && c.ApAp / c.pp > state.operator_norm2) state.operator_norm2 = c.ApAp / c.pp;
  const double u2 = unit_roundoff * unit_roundoff;
  const bool stands_out =
      c.pAp * c.pAp > 64.0 * u2 * c.pp * c.ApAp && c.pAp * c.pAp > 16.0 * u2 * state.operator_norm2 * c.pp * c.pp;
  if (!(c.pAp > 0.0) || (in_range && !stands_out)) {
    take_scaled_rhs = state.solution_bound == 0.0;
    if (c.pAp < -8.0 * unit_roundoff * sqrt(state.operator_norm2) * c.pp) {
      status = kNegativeCurvature;
    } else if (take_scaled_rhs) {
      status = kSingular;
    } else {
      best = row_end_singular(state, status);
    }
    return 0.0;
  }
  const double alpha = state.rz / c.pAp;
  if (!(alpha <= largest)) {  // not representable in the vectors' type
    status = kNonFinite;
    return 0.0;
  }
  length *= alpha;
  return alpha;
}

// The row was given x = b / shift. Then b − A x = −H p / shift when p is b and the shift is one number: with
// pᵀAp and ‖A p‖² in hand, ‖H p‖² = ‖A p‖² − 2 s pᵀAp + s² ‖p‖². Otherwise nothing has measured it: NaN.
// That p = z is r = b shows in ‖z‖² = rᵀz = ‖r‖² (Cauchy and Schwarz), the sums being the same up to their order.
IMAML_HOST_DEVICE void row_scaled_rhs(RowState& state, const Curvature& c, bool shift_is_number, double s) {
  if (shift_is_number && !(s > 0.0)) return;  // x stays 0, and ‖b‖ its residual
  const double norm = state.residual / state.unit;
  const double rr = norm * norm;
  const bool p_is_b = fabs(state.rz - rr) <= 1e-13 * rr && fabs(c.pp - rr) <= 1e-13 * rr;
  const double Hp_squared = c.ApAp - 2.0 * s * c.pAp + s * s * c.pp;
  const bool known = p_is_b && shift_is_number && is_finite(Hp_squared);
  state.residual = known ? sqrt(fmax(Hp_squared, 0.0)) / s * state.unit : NAN;
}

// Whether x + α p might leave the finite numbers: |x_j| ≤ ‖x‖. Where true the caller looks at every element.
IMAML_HOST_DEVICE bool row_may_overflow(const RowState& state, double length, double largest) {
  return !(state.solution_bound + length < largest);
}

// b − A x has been measured, for the x that the row has.
IMAML_HOST_DEVICE void row_measured(RowState& state, int32_t& status, double norm, Best& best) {
  state.residual = norm;
  state.rz = 0.0;  // directions start again from the measured residual
  if (norm <= state.threshold) {
    status = kConverged;
    return;
  }
  if (norm > 0.9 * state.measured) state.stalls += 1.0;
  if (state.stalls >= 4.0) {
    best = row_end(state, status, kStagnated, 1.0);
    if (best == Best::kRestore && state.kept < state.measured) {  // known by recurrence alone
      status = kVerifying;
      state.kept = kInfinity;
    }
    return;
  }
  status = kIterating;
  state.least = norm;
  state.measured = fmin(state.measured, norm);
  if (norm < state.kept) {
    best = Best::kKeep;
    state.kept = norm;
  }
}

// Once the new residual is known. Returns whether the step x ← x + α p is taken.
//
// ‖A‖ ‖e‖²_A ≥ ‖r‖², and the error e falls in the norm of A. So for a positive definite A of condition κ a residual
// never exceeds an earlier one by more than √κ: where it does by more than 1 / √u, A is singular to working precision.
// The iterates of a singular A run off along its kernel, which is why one is kept before it or its residual grows much.
IMAML_HOST_DEVICE bool row_residual(RowState& state, int32_t& status, int32_t& iterations, double length, double rr,
                                    double unit_roundoff, Best& best) {
  if (!is_finite(rr)) {  // the iterate before this step was the last finite one, and so was its residual
    status = kNonFinite;
    return false;
  }
  const double norm = sqrt(rr) * state.unit;
  if (status == kVerifying) {
    row_measured(state, status, norm, best);
    return false;
  }
  if (norm * sqrt(unit_roundoff) > state.least) {
    best = row_end_singular(state, status);
    return false;
  }
  const double grown = 4.0 * state.least;
  const bool grows = norm > grown && state.residual <= grown;
  const bool runs_off = length > 32.0 * state.solution_bound && state.solution_bound > 0.0;
  if ((grows || runs_off) && state.residual < state.kept && state.measured == kInfinity) {
    best = Best::kKeep;
    state.kept = state.residual;
  }
  ++iterations;
  state.residual = norm;
  if (norm < state.least) state.least = norm;
  state.solution_bound += length;
  if (norm <= state.threshold) status = kVerifying;
  return true;
}

// Once z = M r is known. Returns β; stops a row whose preconditioner is not positive definite.
IMAML_HOST_DEVICE double row_direction(RowState& state, int32_t& status, double rz, double largest) {
  state.beta = 0.0;
  if (status != kIterating) return 0.0;
  if (!is_finite(rz)) {
    status = kNonFinite;
    return 0.0;
  }
  if (!(rz > 0.0)) {
    status = kNegativeCurvature;
    return 0.0;
  }
  const double beta = state.rz > 0.0 ? rz / state.rz : 0.0;
  state.rz = rz;
  if (!(beta <= largest)) {
    status = kNonFinite;
    return 0.0;
  }
  state.beta = beta;
  return beta;
}

}  // namespace imaml_ext
