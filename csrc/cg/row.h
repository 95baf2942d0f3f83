// What one row of a batched conjugate-gradient solve decides: its step length, its next direction, when it stops and
// why. Written once, for host and device: the CPU and the CUDA kernels call the same functions.
//
// Row b solves A x = b with A = H + diag(shift). The recurrence is Hestenes and Stiefel (1952), preconditioned:
//
//     α = rᵀz / pᵀAp      x ← x + α p      r ← r − α A p      z = M r      β = rᵀz / (rᵀz)_old      p ← z + β p
//
// A residual carried by recurrence drifts away from b − A x as rounding errors gather. A row therefore keeps a running
// bound on that drift (van der Vorst and Ye, SIAM J. Sci. Comput. 22, 2000) and is CONVERGED only when ‖r‖ + drift is
// within its tolerance. When ‖r‖ alone is, the row turns VERIFYING: the vector it hands to the operator next is x
// itself, so that b − A x is measured rather than extrapolated, and the row either stops or starts again from there.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace imaml_ext {

// The first four are results (imaml_ext.CGStatus has the same numbers); the last two are rows still at work.
enum RowStatus : int32_t {
  kConverged = 0,
  kMaxIterations = 1,
  kNegativeCurvature = 2,
  kNonFinite = 3,
  kIterating = 4,
  kVerifying = 5,
};

// One row of the float64 tensor `state` [B, kRowStateWidth].
struct RowState {
  double rz;              // rᵀz of the last direction; 0: the next direction starts afresh (β = 0)
  double rr;              // rᵀr at the iterate the row holds
  double threshold;       // max(rtol ‖b‖, atol)
  double operator_norm;   // largest ‖A p‖ / ‖p‖ met so far, a lower estimate of ‖A‖
  double solution_bound;  // ≥ ‖x‖; 0 exactly when x = 0
  double drift;           // bound on ‖(b − A x) − r‖
};
constexpr int64_t kRowStateWidth = 6;
constexpr int64_t kResidualSquared = 1;  // the column of rr
static_assert(sizeof(RowState) == kRowStateWidth * sizeof(double), "RowState is read as a row of float64");

struct Curvature {
  double pAp;   // pᵀ A p
  double ApAp;  // ‖A p‖²
  double pp;    // ‖p‖²
};

IMAML_HOST_DEVICE bool row_is_active(int32_t status) { return status >= kIterating; }

IMAML_HOST_DEVICE bool is_finite(double value) { return fabs(value) <= 1.7976931348623157e308; }

// Before the first iteration: r = b − A x0 has been formed (r = b when x0 = 0).
// bb = ‖b‖², rr = ‖r‖², xx = ‖x0‖². Afterwards `clear_solution` says whether x must be set to zero.
IMAML_HOST_DEVICE int32_t row_begin(RowState& state, double bb, double rr, double xx, double rtol, double atol,
                                    double unit_roundoff, bool& clear_solution) {
  const double threshold = fmax(rtol * sqrt(bb), atol);
  state = RowState{0.0, rr, threshold, 0.0, sqrt(xx), 0.0};
  clear_solution = false;
  if (!is_finite(xx)) {  // a warm start that is not finite is no iterate to keep
    clear_solution = true;
    state.solution_bound = 0.0;
    state.rr = bb;
    return kNonFinite;
  }
  if (!is_finite(bb) || !is_finite(rr)) return kNonFinite;
  if (bb == 0.0) {  // A x = 0: x = 0, whatever x0
    clear_solution = true;
    state.solution_bound = 0.0;
    state.rr = 0.0;
    return kConverged;
  }
  if (xx > 0.0) {  // ‖A x0‖ ≤ ‖b‖ + ‖r‖, which also bounds the rounding error of the measured residual
    state.operator_norm = (sqrt(bb) + sqrt(rr)) / sqrt(xx);
    state.drift = unit_roundoff * (sqrt(bb) + sqrt(rr));
  }
  return sqrt(rr) + state.drift <= threshold ? kConverged : kIterating;
}

// Once A p is known. Returns α; 0 where the row does not move (it stopped, or it only measures).
// On the very first step from x = 0 a row of non-positive curvature is given b / shift: `take_scaled_rhs`.
//
// Curvature counts as positive when the cosine of the angle between p and A p stands out of the rounding of either. A
// positive definite A of condition κ has a cosine above 2 √κ / (κ + 1) (Kantorovich), so that only κ beyond 1 / (16 u²)
// is mistaken: 5e30 in float64, 2e13 in float32. A singular A is caught before x grows without bound along its kernel.
IMAML_HOST_DEVICE double row_step_length(RowState& state, int32_t& status, const Curvature& c, double unit_roundoff,
                                         double largest, bool& take_scaled_rhs) {
  take_scaled_rhs = false;
  if (!is_finite(c.pAp) || !is_finite(c.ApAp) || !is_finite(c.pp)) {
    status = kNonFinite;
    return 0.0;
  }
  if (c.pp > 0.0) state.operator_norm = fmax(state.operator_norm, sqrt(c.ApAp / c.pp));
  if (status == kVerifying) {  // p is x
    state.solution_bound = sqrt(c.pp);
    return 0.0;
  }
  if (!(c.pAp > 8.0 * unit_roundoff * sqrt(c.pp) * sqrt(c.ApAp))) {
    status = kNegativeCurvature;
    take_scaled_rhs = state.solution_bound == 0.0;
    return 0.0;
  }
  const double alpha = state.rz / c.pAp;
  if (!(alpha <= largest)) {  // not representable in the vectors' type
    status = kNonFinite;
    return 0.0;
  }
  return alpha;
}

// The row was given x = b / shift. Then b − A x = −H p / shift when p is b and the shift is one number: with
// pᵀAp and ‖A p‖² in hand, ‖H p‖² = ‖A p‖² − 2 s pᵀAp + s² ‖p‖². Otherwise nothing has measured it: NaN.
// That p = z is r = b shows in ‖z‖² = rᵀz = ‖r‖² (Cauchy and Schwarz), the sums being the same up to their order.
IMAML_HOST_DEVICE void row_scaled_rhs(RowState& state, const Curvature& c, bool shift_is_number, double s) {
  if (shift_is_number && !(s > 0.0)) return;  // x stays 0, and ‖b‖ its residual
  const double margin = 1e-13 * state.rr;
  const bool p_is_b = fabs(state.rz - state.rr) <= margin && fabs(c.pp - state.rr) <= margin;
  const double Hp_squared = c.ApAp - 2.0 * s * c.pAp + s * s * c.pp;
  state.rr = p_is_b && shift_is_number ? fmax(Hp_squared, 0.0) / (s * s) : NAN;
}

// Whether x + α p might leave the finite numbers: |x_j| ≤ ‖x‖. Where true the caller looks at every element.
IMAML_HOST_DEVICE bool row_may_overflow(const RowState& state, double alpha, const Curvature& c, double largest) {
  return !(state.solution_bound + alpha * sqrt(c.pp) < largest);
}

// Once the new residual is known. Returns whether the step x ← x + α p is taken.
IMAML_HOST_DEVICE bool row_residual(RowState& state, int32_t& status, int32_t& iterations, double alpha,
                                    const Curvature& c, double rr, double unit_roundoff) {
  if (!is_finite(rr)) {  // the iterate before this step was the last finite one, and so was its residual
    status = kNonFinite;
    return false;
  }
  state.rr = rr;
  const double norm = sqrt(rr);
  if (status == kVerifying) {
    state.drift = unit_roundoff * state.operator_norm * state.solution_bound;
    state.rz = 0.0;  // directions start again from the measured residual
    status = (norm + state.drift <= state.threshold || rr == 0.0) ? kConverged : kIterating;
    return false;
  }
  ++iterations;
  state.solution_bound += alpha * sqrt(c.pp);
  state.drift += unit_roundoff * state.operator_norm * state.solution_bound;
  if (norm <= state.threshold) status = norm + state.drift <= state.threshold ? kConverged : kVerifying;
  return true;
}

// Once z = M r is known. Returns β; stops a row whose preconditioner is not positive definite.
IMAML_HOST_DEVICE double row_direction(RowState& state, int32_t& status, double rz, double largest) {
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
  return beta;
}

}  // namespace imaml_ext
