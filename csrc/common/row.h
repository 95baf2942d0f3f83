// What the rows of every solver have in common: their states, how a solve begins, and sums that may leave the range of
// numbers. For host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/host_device.h"

namespace imaml_ext {

// imaml_ext.SolveStatus has the same numbers; the last are rows still at work.
enum RowStatus : int32_t {
  kConverged = 0,
  kMaxIterations = 1,
  kNegativeCurvature = 2,
  kNonFinite = 3,
  kDiverged = 6,
  kSingular = 7,
  kStagnated = 8,
  kIterating = 16,
  kVerifying = 17,  // b − A x is measured next
  kSuspect = 18,    // the same, of a row that is SINGULAR if that confirms it
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What becomes of `best`, the memory of one more iterate.
enum class Best : int32_t {
  kNothing,
  kKeep,     // best ← x, before x changes
  kRestore,  // x ← best
};

IMAML_HOST_DEVICE bool row_is_active(int32_t status) { return status >= kIterating; }

IMAML_HOST_DEVICE bool is_finite(double value) { return fabs(value) <= 1.7976931348623157e308; }

// A scale for a sum of squares of float64 numbers that came out as `squares` unscaled: 1 where that lost nothing.
IMAML_HOST_DEVICE double row_scale_of_sum(double squares) {
  if (squares > 1e-200 && squares < 1e200) return 1.0;
  return squares <= 1e-200 ? 0x1p600 : 0x1p-600;
}

struct BeginSums {
  double bb;  // ‖b‖²
  double rr;  // ‖r‖²
  double xx;  // ‖x0‖²
};

// What a row begins with.
struct RowStart {
  double residual;      // ‖b − A x0‖
  double threshold;     // max(rtol ‖b‖, atol)
  double unit;          // of the vectors in sums: a power of two next to ‖r‖ for float64, 1 for narrower types
  bool clear_solution;  // x must be set to zero
};

// Before the first iteration: r = b − A x0 has been formed (r = b when x0 = 0). The sums bb and rr are of b times
// b_scale and of r times r_scale. `wide`: the vectors are float64.
IMAML_HOST_DEVICE int32_t row_start(RowStart& start, const BeginSums& sums, double b_scale, double r_scale, double rtol,
                                    double atol, bool wide) {
  const double b_norm = sqrt(sums.bb) / b_scale;
  const double r_norm = sqrt(sums.rr) / r_scale;
  start = {r_norm, fmax(rtol * b_norm, atol), 1.0, false};
  // A warm start that is not finite is no iterate to keep. (It makes r so too; a finite one beyond 1e154 does not.)
  if (!is_finite(sums.xx) && !is_finite(sums.rr)) {
    start.clear_solution = true;
    start.residual = b_norm;
    return kNonFinite;
  }
  if (!is_finite(b_norm) || !is_finite(r_norm)) return kNonFinite;
  if (sums.bb == 0.0) {  // A x = 0: x = 0, whatever x0
    start.clear_solution = true;
    start.residual = 0.0;
    return kConverged;
  }
  if (r_norm <= start.threshold) return kConverged;
  if (wide) start.unit = ldexp(1.0, static_cast<int>(fmin(fmax(ilogb(r_norm), -1000.0), 1000.0)));
  return kIterating;
}

}  // namespace imaml_ext
