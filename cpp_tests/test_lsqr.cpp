// What a row of least squares decides, apart from any vector; and the solver as a C++ user calls it.
#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "check.h"
#include "lsqr/row.h"
#include "lsqr/solver.h"

using namespace imaml_ext;

namespace {

constexpr double kU = 0x1p-53;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr LsqrNumbers kFloat64{kU, kU, 1e308, 1e308, 1000};

// M = 3 in one unknown, y = 4: r̂ = y / 4 = 1, Mᵀr̂ = 3.
LsqrState begun(int32_t& status, double rtol = 1e-9, double s = 3.0) {
  LsqrState state;
  int32_t iterations = 0;
  DirectionMove move;
  lsqr_begin_row(state, 4.0, rtol, 0.0, /*warm=*/false, kFloat64);
  EXPECT(state.unit == 4.0 && state.rhs == 1.0);
  status = kBeginning;
  lsqr_gradient_known(state, status, iterations, {s, s, 0.0, 0.0}, false, move, kFloat64);
  EXPECT(move.keep == 0.0 && iterations == 0);
  if (status == kIterating) EXPECT(state.p_scale * move.gradient == 1.0);
  return state;
}

void a_step_to_the_solution() {
  int32_t status = 0, iterations = 0;
  LsqrState state = begun(status);
  EXPECT(status == kIterating && state.gradient == 3.0 && state.p_scale == 2.0);
  lsqr_direction_known(state, status, 2.25, 0.0);  // p̂ = 1.5
  const ResidualMove residual = lsqr_step_length(state, status, 4.5, kFloat64);
  EXPECT_CLOSE(state.unit * state.step * 1.5, 4.0 / 3.0, 1e-15);  // x = y / M
  EXPECT_CLOSE(residual.step * 4.5, 1.0, 1e-15);
  lsqr_residual_known(state, status, 0.0);
  DirectionMove move;
  lsqr_gradient_known(state, status, iterations, {0.0, 0.0, 0.0, 0.0}, false, move, kFloat64);
  EXPECT(status == kVerifying && move.take_step && iterations == 1 && state.residual == 0.0);
  lsqr_step_length(state, status, 0.0, kFloat64);
  lsqr_residual_known(state, status, 0.0);
  lsqr_gradient_known(state, status, iterations, {0.0, 0.0, 4.0 / 3.0, 0.0}, true, move, kFloat64);
  EXPECT(status == kConverged && state.solution_bound == 4.0 / 3.0 && iterations == 1);
}

void what_ends_a_row() {
  int32_t status = 0, iterations = 0;
  begun(status, 1e-9, 0.0);
  EXPECT(status == kConverged);  // Mᵀy = 0
  begun(status, 1e-9, kNan);
  EXPECT(status == kNonFinite);
  LsqrState state = begun(status);
  lsqr_direction_known(state, status, 2.25, 0.0);
  lsqr_step_length(state, status, kNan, kFloat64);
  EXPECT(status == kNonFinite);

  state = begun(status);  // an rmatvec of the wrong sign: r grows
  lsqr_direction_known(state, status, 2.25, 0.0);
  lsqr_step_length(state, status, 4.5, kFloat64);
  lsqr_residual_known(state, status, 4.1);
  DirectionMove move;
  lsqr_gradient_known(state, status, iterations, {6.0, 6.0, 0.0, 0.0}, false, move, kFloat64);
  EXPECT(status == kDiverged && !move.take_step && state.residual == 1.0);

  state = begun(status);  // a direction in the kernel: no step, x is measured
  lsqr_direction_known(state, status, 2.25, 0.0);
  EXPECT(lsqr_step_length(state, status, 1e-16, kFloat64).step != 0.0);  // ‖M‖ is not known to be larger
  state.operator_norm = 3.0;
  EXPECT(lsqr_step_length(state, status, 1e-16, kFloat64).step == 0.0 && state.exhausted == 1.0);
}

void measurements_that_gain_nothing() {
  int32_t status = 0, iterations = 0;
  LsqrState state = begun(status);
  for (const double gradient : {0.5, 0.4, 0.39, 0.45, 0.41}) {
    EXPECT(status == kIterating);
    status = kVerifying;
    lsqr_step_length(state, status, 2.0, kFloat64);
    lsqr_residual_known(state, status, 1.0);
    DirectionMove move;
    lsqr_gradient_known(state, status, iterations, {gradient / state.r_scale, 1.0, 1.0, 0.0}, true, move, kFloat64);
    if (gradient < state.measured * 1.0001 && status == kIterating) EXPECT(move.best == Best::kKeep);
  }
  status = kVerifying;
  DirectionMove move;
  lsqr_gradient_known(state, status, iterations, {0.6 / state.r_scale, 1.0, 1.0, 0.0}, true, move, kFloat64);
  EXPECT(status == kStagnated && move.best == Best::kRestore);
  EXPECT_CLOSE(state.gradient, 0.39, 1e-15);
}

void powers_of_two() {
  EXPECT(exponent_of(1.0) == 0 && exponent_of(0.75) == -1 && exponent_of(0x1p900) == 900 && exponent_of(0.0) == -1023);
  EXPECT(power_of_two(-3, -1000, 1000) == 0.125 && power_of_two(-1023, -1000, 1000) == 0x1p-1000);
  EXPECT(power_of_two(70, -5, 60) == 0x1p60);
}

void solves_tall_and_wide() {
  for (const auto& [m, n] : {std::pair{30, 12}, std::pair{12, 30}}) {
    const at::Tensor M = at::randn({3, m, n}, at::kDouble), y = at::randn({3, m}, at::kDouble);
    const auto matvec = [&](const at::Tensor& p) { return M.matmul(p.unsqueeze(2)).squeeze(2); };
    const auto rmatvec = [&](const at::Tensor& q) { return M.mT().matmul(q.unsqueeze(2)).squeeze(2); };
    LsqrOptions options;
    options.rtol = at::full({1}, 1e-10, at::kDouble);
    const LsqrResult result = lsqr(matvec, rmatvec, y, n, options);
    EXPECT(result.status.eq(kConverged).all().item<bool>());
    const at::Tensor direct = at::linalg_pinv(M).matmul(y.unsqueeze(2)).squeeze(2);
    EXPECT(at::allclose(result.x, direct, 1e-6, 1e-7));
    EXPECT(throws_saying([&, n = n] { lsqr(matvec, rmatvec, y, n + 1); }, "lsqr: rmatvec must have the shape of x"));
    EXPECT(throws_saying([&, n = n] { lsqr(nullptr, rmatvec, y, n); }, "lsqr: matvec must be callable"));
  }
}

}  // namespace

int main() {
  at::manual_seed(0);
  return run_tests({{"steps", a_step_to_the_solution},
                    {"ends", what_ends_a_row},
                    {"measurements", measurements_that_gain_nothing},
                    {"powers", powers_of_two},
                    {"solves", solves_tall_and_wide}});
}
