// What a row decides, apart from any vector: the same functions run inside the CPU and the CUDA kernels.
#include <limits>

#include "cg/row.h"
#include "check.h"

using namespace imaml_ext;

namespace {

constexpr double kU = 1.1102230246251565e-16;  // float64
constexpr double kLargest = std::numeric_limits<double>::max();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

RowState iterating(double rz, double threshold) {
  RowState state{};
  state.rz = rz;
  state.rr = rz;
  state.threshold = threshold;
  return state;
}

void begin_decides() {
  RowState state{};
  bool clear = true;
  EXPECT(row_begin(state, 4.0, 4.0, 0.0, 1e-3, 0.0, kU, clear) == kIterating);
  EXPECT(!clear && state.threshold == 2e-3 && state.rr == 4.0 && state.rz == 0.0 && state.solution_bound == 0.0);
  EXPECT(row_begin(state, 4.0, 4.0, 0.0, 1e-3, 5.0, kU, clear) == kConverged);  // atol above ‖b‖
  EXPECT(state.threshold == 5.0);
  EXPECT(row_begin(state, 0.0, 9.0, 9.0, 1e-3, 0.0, kU, clear) == kConverged && clear);  // b = 0, whatever x0
  EXPECT(state.rr == 0.0 && state.solution_bound == 0.0);
  EXPECT(row_begin(state, kNan, kNan, 0.0, 1e-3, 0.0, kU, clear) == kNonFinite && !clear);
  EXPECT(row_begin(state, kInf, 1.0, 1.0, 1e-3, 0.0, kU, clear) == kNonFinite && !clear);
  EXPECT(row_begin(state, 4.0, kNan, 1.0, 1e-3, 0.0, kU, clear) == kNonFinite && !clear);
  EXPECT(row_begin(state, 4.0, 4.0, kInf, 1e-3, 0.0, kU, clear) == kNonFinite && clear);
  EXPECT(row_begin(state, 4.0, 1e-8, 1.0, 1e-3, 0.0, kU, clear) == kConverged && !clear);  // a warm start good enough
  EXPECT(row_begin(state, 4.0, 1e-2, 1.0, 1e-3, 0.0, kU, clear) == kIterating);
}

void step_length() {
  bool scaled = true;
  RowState state = iterating(6.0, 1e-6);
  int32_t status = kIterating;
  EXPECT(row_step_length(state, status, {3.0, 18.0, 2.0}, kU, kLargest, scaled) == 2.0);
  EXPECT(status == kIterating && !scaled && state.operator_norm == 3.0);

  for (const double curvature : {0.0, -1.0, -1e-300, 1e-16}) {  // the last is lost in rounding
    status = kIterating;
    state = iterating(6.0, 1e-6);
    EXPECT(row_step_length(state, status, {curvature, 1.0, 1.0}, kU, kLargest, scaled) == 0.0);
    EXPECT(status == kNegativeCurvature && scaled);  // x is still 0: b / shift
    status = kIterating;
    state.solution_bound = 1.0;
    row_step_length(state, status, {curvature, 1.0, 1.0}, kU, kLargest, scaled);
    EXPECT(status == kNegativeCurvature && !scaled);
  }
  for (const double bad : {kNan, kInf, -kInf}) {
    status = kIterating;
    state = iterating(6.0, 1e-6);
    EXPECT(row_step_length(state, status, {bad, 1.0, 1.0}, kU, kLargest, scaled) == 0.0 && status == kNonFinite);
    status = kIterating;
    row_step_length(state, status, {1.0, bad, 1.0}, kU, kLargest, scaled);
    EXPECT(status == kNonFinite);
  }
  status = kIterating;  // a step that float32 cannot hold
  state = iterating(1.0, 1e-6);
  row_step_length(state, status, {1e-60, 1e-120, 1.0}, kU, std::numeric_limits<float>::max(), scaled);
  EXPECT(status == kNonFinite);

  status = kVerifying;  // p is x: nothing moves, ‖x‖ is known exactly now
  state = iterating(6.0, 1e-6);
  state.solution_bound = 100.0;
  EXPECT(row_step_length(state, status, {-5.0, 4.0, 9.0}, kU, kLargest, scaled) == 0.0);
  EXPECT(status == kVerifying && state.solution_bound == 3.0);
}

void convergence_needs_a_trustworthy_residual() {
  // Well conditioned: the drift is nothing beside the tolerance.
  RowState state = iterating(1.0, 1e-3);
  int32_t status = kIterating, iterations = 0;
  state.operator_norm = 2.0;
  EXPECT(row_residual(state, status, iterations, 0.5, {2.0, 4.0, 1.0}, 1e-8, kU));
  EXPECT(status == kConverged && iterations == 1 && state.rr == 1e-8);

  // ‖A‖ ‖x‖ so large that float32 rounding exceeds the tolerance: measure.
  const double u32 = 5.9604644775390625e-08;
  state = iterating(1.0, 1e-3);
  state.operator_norm = 1e6;
  status = kIterating;
  iterations = 0;
  EXPECT(row_residual(state, status, iterations, 1.0, {1.0, 1.0, 1.0}, 1e-8, u32));
  EXPECT(status == kVerifying && iterations == 1);
  // The measured residual is too large: start again from it, without a direction to be conjugate to.
  state.rz = 7.0;
  EXPECT(!row_residual(state, status, iterations, 0.0, {1.0, 1.0, 1.0}, 1e-2, u32));
  EXPECT(status == kIterating && iterations == 1 && state.rr == 1e-2);
  EXPECT(row_direction(state, status, 1e-2, kLargest) == 0.0 && state.rz == 1e-2);
  // The next one is small enough.
  state.operator_norm = 1.0;
  state.solution_bound = 1.0;
  status = kVerifying;
  EXPECT(!row_residual(state, status, iterations, 0.0, {1.0, 1.0, 1.0}, 1e-8, u32));
  EXPECT(status == kConverged);
  // A residual measured to be zero is converged whatever the tolerance.
  state = iterating(1.0, 0.0);
  state.operator_norm = 1.0;
  state.solution_bound = 1.0;
  status = kVerifying;
  row_residual(state, status, iterations, 0.0, {1.0, 1.0, 1.0}, 0.0, kU);
  EXPECT(status == kConverged);
}

void a_residual_that_is_not_finite_takes_no_step() {
  RowState state = iterating(1.0, 1e-3);
  int32_t status = kIterating, iterations = 3;
  EXPECT(!row_residual(state, status, iterations, 1.0, {1.0, 1.0, 1.0}, kNan, kU));
  EXPECT(status == kNonFinite && iterations == 3 && state.rr == 1.0);
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
  EXPECT_CLOSE(state.rr, 36.0, 1e-12);
  state = iterating(4.0, 1e-3);
  row_scaled_rhs(state, {-8.0, 16.0, 4.0}, false, 1.0);  // a shift for every parameter
  EXPECT(std::isnan(state.rr));
  state = iterating(4.0, 1e-3);
  state.rz = 5.0;  // preconditioned: p is not b
  row_scaled_rhs(state, {-8.0, 16.0, 4.0}, true, 1.0);
  EXPECT(std::isnan(state.rr));
  state = iterating(4.0, 1e-3);
  row_scaled_rhs(state, {-8.0, 16.0, 4.0}, true, 0.0);  // no shift: x stays 0
  EXPECT(state.rr == 4.0);
}

void overflow_is_looked_for_only_near_the_edge() {
  RowState state = iterating(1.0, 1e-3);
  state.solution_bound = 1e30;
  EXPECT(!row_may_overflow(state, 1.0, {1.0, 1.0, 1.0}, std::numeric_limits<float>::max()));
  state.solution_bound = 3.4e38;
  EXPECT(row_may_overflow(state, 1e38, {1.0, 1.0, 1.0}, std::numeric_limits<float>::max()));
  state.solution_bound = kNan;
  EXPECT(row_may_overflow(state, 1.0, {1.0, 1.0, 1.0}, std::numeric_limits<float>::max()));
}

}  // namespace

int main() {
  return run_tests({{"begin_decides", begin_decides},
                    {"step_length", step_length},
                    {"convergence_needs_a_trustworthy_residual", convergence_needs_a_trustworthy_residual},
                    {"a_residual_that_is_not_finite_takes_no_step", a_residual_that_is_not_finite_takes_no_step},
                    {"directions", directions},
                    {"scaled_right_hand_side", scaled_right_hand_side},
                    {"overflow_is_looked_for_only_near_the_edge", overflow_is_looked_for_only_near_the_edge}});
}
