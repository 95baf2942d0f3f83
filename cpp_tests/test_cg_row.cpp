// What a row decides, apart from any vector: the same functions run inside the CPU and the CUDA kernels.
#include <cmath>
#include <limits>
#include <utility>

#include "cg/row.h"
#include "cg/shift.h"
#include "check.h"

using namespace imaml_ext;

namespace {

constexpr double kU = 1.1102230246251565e-16;  // float64
constexpr double kLargest = std::numeric_limits<double>::max();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

RowState iterating(double rr, double threshold) {
  RowState state{};
  state.rz = rr;
  state.residual = state.least = std::sqrt(rr);
  state.threshold = threshold;
  state.unit = 1.0;
  state.kept = state.measured = kInf;
  return state;
}

int32_t begin(RowState& state, const BeginSums& sums, double rtol, double atol, bool& clear) {
  return row_begin(state, sums, 1.0, 1.0, rtol, atol, /*wide=*/false, clear);
}

void begin_decides() {
  RowState state{};
  bool clear = true;
  EXPECT(begin(state, {4.0, 4.0, 0.0}, 1e-3, 0.0, clear) == kIterating);
  EXPECT(!clear && state.threshold == 2e-3 && state.residual == 2.0 && state.rz == 0.0 && state.solution_bound == 0.0);
  EXPECT(state.unit == 1.0 && state.kept == kInf && state.measured == kInf);
  EXPECT(begin(state, {4.0, 4.0, 0.0}, 1e-3, 5.0, clear) == kConverged);  // atol above ‖b‖
  EXPECT(state.threshold == 5.0);
  EXPECT(begin(state, {0.0, 9.0, 9.0}, 1e-3, 0.0, clear) == kConverged && clear);  // b = 0, whatever x0
  EXPECT(state.residual == 0.0 && state.solution_bound == 0.0);
  EXPECT(begin(state, {kNan, kNan, 0.0}, 1e-3, 0.0, clear) == kNonFinite && !clear);
  EXPECT(begin(state, {kInf, 1.0, 1.0}, 1e-3, 0.0, clear) == kNonFinite && !clear);
  EXPECT(begin(state, {4.0, kNan, 1.0}, 1e-3, 0.0, clear) == kNonFinite && !clear);
  EXPECT(begin(state, {4.0, kNan, kInf}, 1e-3, 0.0, clear) == kNonFinite && clear);
  EXPECT(begin(state, {4.0, 4.0, kInf}, 1e-3, 0.0, clear) == kIterating && !clear);  // ‖x0‖² alone overflows
  EXPECT(begin(state, {4.0, 1e-8, 1.0}, 1e-3, 0.0, clear) == kConverged && !clear);  // a warm start good enough
  EXPECT(begin(state, {4.0, 1e-2, 1.0}, 1e-3, 0.0, clear) == kIterating);
}

void sums_of_float64_keep_their_range() {
  EXPECT(row_scale_of_sum(1.0) == 1.0);
  EXPECT(row_scale_of_sum(0.0) == 0x1p600 && row_scale_of_sum(1e-250) == 0x1p600);
  EXPECT(row_scale_of_sum(1e250) == 0x1p-600 && row_scale_of_sum(kInf) == 0x1p-600);
  // ‖b‖ = 2⁻⁶⁰⁰, so that ‖2⁶⁰⁰ b‖² = 1: the row's own scale makes ‖r‖ about 1.
  RowState state{};
  bool clear = false;
  EXPECT(row_begin(state, {1.0, 1.0, 0.0}, 0x1p600, 0x1p600, 0.5, 0.0, true, clear) == kIterating);
  EXPECT(state.residual == 0x1p-600 && state.threshold == 0x1p-601 && state.unit == 0x1p-600);
  EXPECT(row_rescaled(state, 0x1p300, 0x1p-600) == 1.0);
  EXPECT(row_begin(state, {1.0, 1.0, 0.0}, 0x1p-600, 0x1p-600, 0.5, 0.0, true, clear) == kIterating);
  EXPECT(state.residual == 0x1p600 && state.unit == 0x1p600);
  // ‖b‖ itself is beyond the largest number.
  EXPECT(row_begin(state, {0x1p900, 0x1p900, 0.0}, 0x1p-600, 0x1p-600, 0.5, 0.0, true, clear) == kNonFinite);
}

void step_length() {
  bool scaled = true;
  double length = 0.0;
  Best best = Best::kNothing;
  RowState state = iterating(6.0, 1e-6);
  int32_t status = kIterating;
  EXPECT(row_step_length(state, status, {3.0, 18.0, 2.0}, kU, kLargest, length, scaled, best) == 2.0);
  EXPECT(status == kIterating && !scaled);
  EXPECT(state.operator_norm2 == 9.0);
  EXPECT_CLOSE(length, 2.0 * std::sqrt(2.0), 1e-12);

  for (const double curvature : {0.0, -1.0, -1e-300, 1e-16}) {  // all but -1 are lost in rounding
    const int32_t expected = curvature == -1.0 ? kNegativeCurvature : kSingular;
    status = kIterating;
    state = iterating(6.0, 1e-6);
    EXPECT(row_step_length(state, status, {curvature, 1.0, 1.0}, kU, kLargest, length, scaled, best) == 0.0);
    EXPECT(status == expected && scaled && best == Best::kNothing);  // x is still 0: b / shift
    status = kIterating;
    state = iterating(6.0, 1e-6);
    state.solution_bound = 1.0;
    state.kept = 0.25;
    row_step_length(state, status, {curvature, 1.0, 1.0}, kU, kLargest, length, scaled, best);
    EXPECT(status == expected && !scaled);
    EXPECT(best == (expected == kSingular ? Best::kRestore : Best::kNothing));
    EXPECT(state.residual == (expected == kSingular ? 0.25 : std::sqrt(6.0)));
  }
  // A p is a millionth of a rounding error beside what A does to other vectors: p is in the kernel.
  state = iterating(1.0, 1e-6);
  state.solution_bound = state.operator_norm2 = 1.0;
  status = kIterating;
  row_step_length(state, status, {1e-22, 1e-44, 1.0}, kU, kLargest, length, scaled, best);
  EXPECT(status == kSingular);
  // pᵀAp / ‖p‖² within the rounding of a product, or above it.
  for (const auto& [units, expected] : {std::pair{3.0, kSingular}, std::pair{5.0, kIterating}}) {
    state = iterating(1.0, 1e-6);
    state.solution_bound = state.operator_norm2 = 1.0;
    status = kIterating;
    const double pAp = units * kU;
    row_step_length(state, status, {pAp, 1.1 * pAp * pAp, 1.0}, kU, kLargest, length, scaled, best);
    EXPECT(status == expected);
  }
  for (const double bad : {kNan, kInf, -kInf}) {
    status = kIterating;
    state = iterating(6.0, 1e-6);
    EXPECT(row_step_length(state, status, {bad, 1.0, 1.0}, kU, kLargest, length, scaled, best) == 0.0 &&
           status == kNonFinite);
    status = kIterating;
    row_step_length(state, status, {1.0, 1.0, bad}, kU, kLargest, length, scaled, best);
    EXPECT(status == kNonFinite);
  }
  // ‖A p‖² alone leaves the range of numbers, pᵀAp does not.
  for (const auto& [pAp, ApAp] : {std::pair{1e200, kInf}, std::pair{1e-200, 0.0}}) {
    status = kIterating;
    state = iterating(1.0, 1e-6);
    EXPECT_CLOSE(row_step_length(state, status, {pAp, ApAp, 1.0}, kU, kLargest, length, scaled, best) * pAp, 1.0,
                 1e-12);
    EXPECT(status == kIterating);
    row_step_length(state, status, {-pAp, ApAp, 1.0}, kU, kLargest, length, scaled, best);
    EXPECT(status == kNegativeCurvature);
  }
  status = kIterating;  // a step that float32 cannot hold
  state = iterating(1.0, 1e-6);
  row_step_length(state, status, {1e-60, 1e-120, 1.0}, kU, std::numeric_limits<float>::max(), length, scaled, best);
  EXPECT(status == kNonFinite);

  status = kVerifying;  // p is x: nothing moves, ‖x‖ is known exactly now
  state = iterating(6.0, 1e-6);
  state.solution_bound = 100.0;
  EXPECT(row_step_length(state, status, {-5.0, 4.0, 9.0}, kU, kLargest, length, scaled, best) == 0.0);
  EXPECT(status == kVerifying && state.solution_bound == 3.0);
}

void only_a_measured_residual_converges() {
  RowState state = iterating(1.0, 1e-3);
  int32_t status = kIterating, iterations = 0;
  Best best = Best::kNothing;
  EXPECT(row_residual(state, status, iterations, 0.5, 1e-8, kU, best));
  EXPECT(status == kVerifying && iterations == 1 && state.residual == 1e-4);
  // The measured residual is too large: start again from it, without a direction to be conjugate to.
  state.rz = 7.0;
  EXPECT(!row_residual(state, status, iterations, 0.0, 1e-2, kU, best));
  EXPECT(status == kIterating && iterations == 1 && state.residual == 0.1 && state.measured == 0.1);
  EXPECT(best == Best::kKeep && state.kept == 0.1);
  EXPECT(row_direction(state, status, 1e-2, kLargest) == 0.0 && state.rz == 1e-2);
  // The next one is small enough.
  status = kVerifying;
  EXPECT(!row_residual(state, status, iterations, 0.0, 1e-8, kU, best));
  EXPECT(status == kConverged);
  // A residual measured to be zero is converged whatever the tolerance.
  state = iterating(1.0, 0.0);
  status = kVerifying;
  row_residual(state, status, iterations, 0.0, 0.0, kU, best);
  EXPECT(status == kConverged);
}

void stagnation() {
  RowState state = iterating(1.0, 1e-6);
  int32_t status = kVerifying, iterations = 9;
  for (const auto& [norm, expected] :
       {std::pair{1e-3, kIterating}, std::pair{8e-4, kIterating}, std::pair{7.9e-4, kIterating},
        std::pair{2e-3, kIterating}, std::pair{7.8e-4, kIterating}, std::pair{1e-3, kStagnated}}) {
    Best best = Best::kNothing;
    status = kVerifying;
    row_residual(state, status, iterations, 0.0, norm * norm, kU, best);
    EXPECT(status == expected);
    const bool least = norm < 1e-3 || state.stalls == 0.0;
    EXPECT(best == (expected == kStagnated ? Best::kRestore : least ? Best::kKeep : Best::kNothing));
  }
  EXPECT_CLOSE(state.residual, 7.8e-4, 1e-12);  // the least that was measured
}

void growth_of_the_residual() {
  const double u32 = 5.9604644775390625e-08;
  RowState state = iterating(1.0, 1e-6);
  int32_t status = kIterating, iterations = 0;
  Best best = Best::kNothing;
  EXPECT(row_residual(state, status, iterations, 1.0, 9.0, u32, best));
  EXPECT(best == Best::kNothing && state.least == 1.0);
  EXPECT(row_residual(state, status, iterations, 1.0, 25.0, u32, best));  // five times the least
  EXPECT(best == Best::kKeep && state.kept == 3.0);                       // what the row has still, before the step
  best = Best::kNothing;
  EXPECT(row_residual(state, status, iterations, 1.0, 900.0, u32, best));
  EXPECT(best == Best::kNothing && state.residual == 30.0);
  EXPECT(!row_residual(state, status, iterations, 1.0, 1e8, u32, best));  // beyond 1 / √u of the least
  EXPECT(status == kSingular && best == Best::kRestore && state.residual == 3.0 && iterations == 3);
}

void a_residual_that_is_not_finite_takes_no_step() {
  RowState state = iterating(1.0, 1e-3);
  int32_t status = kIterating, iterations = 3;
  Best best = Best::kNothing;
  EXPECT(!row_residual(state, status, iterations, 1.0, kNan, kU, best));
  EXPECT(status == kNonFinite && iterations == 3 && state.residual == 1.0);
}

void directions() {
  RowState state = iterating(4.0, 1e-3);
  int32_t status = kIterating;
  EXPECT(row_direction(state, status, 1.0, kLargest) == 0.25 && state.rz == 1.0);
  status = kConverged;
  EXPECT(row_direction(state, status, 9.0, kLargest) == 0.0 && state.rz == 1.0);
  status = kIterating;
  EXPECT(row_direction(state, status, -1.0, kLargest) == 0.0 && status == kNegativeCurvature);
  status = kIterating;
  EXPECT(row_direction(state, status, kNan, kLargest) == 0.0 && status == kNonFinite);
}

void scaled_right_hand_side() {
  // H = −3, s = 1, p = b = 2: A p = −4, x = 2, b − A x = 2 + 4 = 6
  RowState state = iterating(4.0, 1e-3);
  row_scaled_rhs(state, {-8.0, 16.0, 4.0}, true, 1.0);
  EXPECT_CLOSE(state.residual, 6.0, 1e-12);
  state = iterating(4.0, 1e-3);
  state.unit = 0x1p10;  // b is 2¹¹, and sums are those of b / 2¹⁰
  state.residual = 0x1p11;
  row_scaled_rhs(state, {-8.0, 16.0, 4.0}, true, 1.0);
  EXPECT_CLOSE(state.residual, 6.0 * 0x1p10, 1e-12);
  state = iterating(4.0, 1e-3);
  row_scaled_rhs(state, {-8.0, 16.0, 4.0}, false, 1.0);  // a shift for every parameter
  EXPECT(std::isnan(state.residual));
  state = iterating(4.0, 1e-3);
  row_scaled_rhs(state, {-8.0, kInf, 4.0}, true, 1.0);
  EXPECT(std::isnan(state.residual));
  state = iterating(4.0, 1e-3);
  state.rz = 5.0;  // preconditioned: p is not b
  row_scaled_rhs(state, {-8.0, 16.0, 4.0}, true, 1.0);
  EXPECT(std::isnan(state.residual));
  state = iterating(4.0, 1e-3);
  row_scaled_rhs(state, {-8.0, 16.0, 4.0}, true, 0.0);  // no shift: x stays 0
  EXPECT(state.residual == 2.0);
}

void overflow_is_looked_for_only_near_the_edge() {
  RowState state = iterating(1.0, 1e-3);
  state.solution_bound = 1e30;
  EXPECT(!row_may_overflow(state, 1.0, std::numeric_limits<float>::max()));
  state.solution_bound = 3.4e38;
  EXPECT(row_may_overflow(state, 1e38, std::numeric_limits<float>::max()));
  state.solution_bound = kNan;
  EXPECT(row_may_overflow(state, 1.0, std::numeric_limits<float>::max()));
}

// Against conjugate gradients on diag(1, 3) + σ with b = (1, 1): steps, residuals and directions in closed form.
void shifts_follow_a_row() {
  const double sigma = 0.5, d[2] = {1.0, 3.0};
  RowState row = iterating(2.0, 1e-12);
  ShiftState shift{1.0, 0.0, 0.0, 0.0, 0.0};
  double r[2] = {1.0, 1.0}, p[2] = {1.0, 1.0};               // of the row
  double rs[2] = {1.0, 1.0}, ps[2] = {1.0, 1.0}, x[2] = {};  // of the shifted system
  for (int step = 0; step < 2; ++step) {
    double rr = 0.0, pAp = 0.0, next = 0.0, rrs = 0.0, pAps = 0.0, nexts = 0.0;
    for (int k = 0; k < 2; ++k) {
      rr += r[k] * r[k], pAp += p[k] * d[k] * p[k];
      rrs += rs[k] * rs[k], pAps += ps[k] * (d[k] + sigma) * ps[k];
    }
    row.alpha = rr / pAp;
    for (int k = 0; k < 2; ++k) {
      x[k] += rrs / pAps * ps[k];
      r[k] -= row.alpha * d[k] * p[k], rs[k] -= rrs / pAps * (d[k] + sigma) * ps[k];
      next += r[k] * r[k], nexts += rs[k] * rs[k];
    }
    row.beta = next / rr, row.residual = std::sqrt(next);
    shift_step(row, shift, sigma);
    EXPECT_CLOSE(shift.alpha, rrs / pAps, 1e-12);
    if (step == 0) EXPECT_CLOSE(shift.zeta * r[0], rs[0], 1e-12);
    if (step == 0) EXPECT_CLOSE(shift.beta, nexts / rrs, 1e-12);
    for (int k = 0; k < 2; ++k) p[k] = r[k] + row.beta * p[k], ps[k] = rs[k] + nexts / rrs * ps[k];
  }
  EXPECT_CLOSE(x[0], 1.0 / 1.5, 1e-12);
  EXPECT(shift.zeta == 0.0 && shift.steps == 2.0);  // within the tolerance: it follows no more
  shift_step(row, shift, sigma);
  EXPECT(shift.alpha == 0.0 && shift.steps == 2.0);
}

void a_shift_follows_no_row_that_has_stood_still() {
  RowState row = iterating(4.0, 1e-3);
  ShiftState shift{1.0, 0.0, 0.0, 0.0, 0.0};
  row.alpha = 0.5, row.beta = 0.25;
  shift_step(row, shift, 2.0);
  EXPECT(shift.alpha == 0.25 && shift.beta == 0.0625 && shift.zeta == 0.5 && shift.carry == 0.25);
  row.alpha = 0.0;  // it measures
  shift_step(row, shift, 2.0);
  EXPECT(shift.alpha == 0.0 && shift.zeta == 0.0);
  row.alpha = 0.5;  // and goes on from what it has measured
  shift_step(row, shift, 2.0);
  EXPECT(shift.alpha == 0.0 && shift.steps == 1.0);
}

}  // namespace

int main() {
  return run_tests({{"begin_decides", begin_decides},
                    {"step_length", step_length},
                    {"sums_of_float64_keep_their_range", sums_of_float64_keep_their_range},
                    {"only_a_measured_residual_converges", only_a_measured_residual_converges},
                    {"stagnation", stagnation},
                    {"growth_of_the_residual", growth_of_the_residual},
                    {"a_residual_that_is_not_finite_takes_no_step", a_residual_that_is_not_finite_takes_no_step},
                    {"directions", directions},
                    {"scaled_right_hand_side", scaled_right_hand_side},
                    {"overflow_is_looked_for_only_near_the_edge", overflow_is_looked_for_only_near_the_edge},
                    {"shifts_follow_a_row", shifts_follow_a_row},
                    {"a_shift_follows_no_row_that_has_stood_still", a_shift_follows_no_row_that_has_stood_still}});
}
