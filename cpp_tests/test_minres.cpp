// What a row of MINRES decides, apart from any vector; and the solver as a C++ user calls it.
#include <ATen/ATen.h>

#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "check.h"
#include "minres/row.h"
#include "minres/solver.h"

using namespace imaml_ext;

namespace {

constexpr double kU = 1.1102230246251565e-16;  // float64
constexpr double kLargest = std::numeric_limits<double>::max();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A row of ‖b‖ = 2 from x = 0.
MinresState begun(double rtol = 1e-6) {
  MinresState state;
  MinresStep step;
  EXPECT(minres_start(state, {4.0, 4.0, 0.0}, 1.0, 1.0, rtol, 0.0, true, false, step) == kIterating);
  EXPECT(step.clear_solution && step.scale * 2.0 == step.divisor);
  return state;
}

void a_step_of_two_eigenvalues() {
  // A = diag(2, -1), b = (√2, √2): α = 1/2, β = 3/2, and after two steps the residual is 0.
  MinresState state = begun();
  int32_t status = kIterating, iterations = 0;
  MinresStep step;
  EXPECT(!minres_rescale(state, {0.5, 2.5}));
  minres_product(state, status, {0.5, 2.5}, step);
  EXPECT(step.alpha == 0.5 && step.beta == 0.0 && step.turn == 0.0 && step.recorded);
  minres_turn(state, status, {2.25, 1.0, 0.0, 0.0}, kU, kLargest, step);
  minres_take(state, status, iterations, false, kU, true, step);
  EXPECT(status == kIterating && step.take_step && iterations == 1);
  EXPECT_CLOSE(step.tau, 0.5 * 2.0 / 2.5, 1e-14);  // the least of ‖b − t A b‖ is at t = bᵀAb / ‖Ab‖²
  EXPECT_CLOSE(state.residual, 2.0 * 1.5 / std::sqrt(2.5), 1e-14);
  EXPECT_CLOSE(step.divisor / step.scale, 1.5, 1e-14);

  step = MinresStep{};
  minres_product(state, status, {0.5, 2.5}, step);
  EXPECT_CLOSE(step.beta, 1.5, 1e-14);
  minres_turn(state, status, {1e-30, 1.0, 0.0, 1.0}, kU, kLargest, step);
  minres_take(state, status, iterations, false, kU, true, step);
  EXPECT(status == kVerifying && state.residual == 0.0 && iterations == 2 && state.coefficients == 2.0);
}

void products_that_end_a_row() {
  for (const auto& sums : {ProductSums{kNan, 1.0}, ProductSums{1.0, kNan}}) {
    MinresState state = begun();
    int32_t status = kIterating;
    MinresStep step;
    minres_product(state, status, sums, step);
    EXPECT(status == kNonFinite && state.coefficients == 0.0);
  }
  MinresState state = begun();
  int32_t status = kIterating, iterations = 0;
  MinresStep step;
  EXPECT(minres_rescale(state, {0.0, 0.0}));  // A v = 0: v is a null vector, in any unit
  minres_product(state, status, {0.0, 0.0}, step);
  minres_turn(state, status, {0.0, 1.0, 0.0, 0.0}, kU, kLargest, step);
  EXPECT(status == kSuspect && !step.take_step);
  minres_measured(state, status, 1.0, true, step);  // ‖b − A x‖ = 2, in a unit of 2
  EXPECT(status == kSingular && state.residual == 2.0);

  state = begun();
  status = kIterating;
  step = MinresStep{};
  minres_product(state, status, {1.0, 1.0}, step);
  minres_turn(state, status, {0.0, 1.0, 0.0, kInfinity}, kU, kLargest, step);
  EXPECT(step.may_overflow);
  minres_take(state, status, iterations, true, kU, true, step);
  EXPECT(status == kNonFinite && state.residual == 2.0 && iterations == 0 && !step.take_step);
}

void no_step_to_an_x_that_rounding_drowns() {
  MinresState state = begun();
  state.residual = 1e-14;
  int32_t status = kIterating, iterations = 0;
  MinresStep step;
  minres_product(state, status, {1.0, 1.25}, step);
  minres_turn(state, status, {0.25, 1.0, 0.0, 1e8}, kU, kLargest, step);  // ‖x‖ = 20,000: rounding of 5e-12
  minres_take(state, status, iterations, false, kU, true, step);
  EXPECT(status == kVerifying && !step.take_step && state.residual == 1e-14);
}

void measurements() {
  MinresState state = begun();
  MinresStep step;
  int32_t status = kVerifying;
  minres_measured(state, status, 0.25, true, step);  // ‖b − A x‖ = 1, half of the least before
  EXPECT(status == kIterating && step.restart && step.best == Best::kKeep && state.measured == 1.0);
  EXPECT(state.restarts == 1.0 && state.cosine == -1.0 && state.beta == 0.0 && state.kept == 1.0);
  for (const auto& [end, best] : {std::pair{kIterating, Best::kNothing}, std::pair{kStagnated, Best::kRestore}}) {
    step = MinresStep{};
    status = kVerifying;
    minres_measured(state, status, 0.3, true, step);
    EXPECT(status == end && step.best == best);
  }
  EXPECT(state.residual == 1.0);

  state = begun();
  for (int k = 0; k < 2; ++k) {  // nothing is better than x = 0
    step = MinresStep{};
    status = kVerifying;
    minres_measured(state, status, 4.0, true, step);
  }
  EXPECT(status == kStagnated && step.clear_solution && step.best == Best::kNothing && state.residual == 2.0);
}

void a_unit_for_matrices_of_any_size() {
  MinresState state = begun();
  EXPECT(minres_rescale(state, {1e250, 1e250}) && state.operator_unit == 0x1p600);
  state = begun();
  state.operator_norm = 1.0, state.gamma = 2.0;
  EXPECT(!minres_rescale(state, {0.0, 1e-250}));  // of a vector near the kernel
  EXPECT(minres_rescale(state, {0.0, 1e250}) && state.gamma == 0x1p-599 && state.operator_norm == 0x1p-600);
}

void solves_indefinite_systems() {
  const auto wide = at::TensorOptions().dtype(at::kDouble);
  const auto q = std::get<0>(at::linalg_qr(at::randn({4, 30, 30}, wide)));
  auto values = at::rand({4, 1, 30}, wide) + 0.5;
  values.slice(2, 0, 15).neg_();
  const auto matrices = at::matmul(q * values, q.transpose(1, 2));
  const auto b = at::randn({4, 30}, wide);
  const RowOperator product = [&](const at::Tensor& p, RowRange rows) {
    return at::matmul(matrices.slice(0, rows.first, rows.last), p.unsqueeze(2)).squeeze(2);
  };
  MinresOptions options;
  options.max_iterations = 100;
  options.rtol = at::full({1}, 1e-10, wide);
  options.check_every = 1;
  options.rows_per_block = 3;
  options.lanczos = true;
  const MinresResult result = minres(product, b, options);
  EXPECT(result.status.eq(kConverged).all().item<bool>());
  EXPECT(at::allclose(at::matmul(matrices, result.x.unsqueeze(2)).squeeze(2), b, 1e-8, 1e-8));
  EXPECT(result.lanczos.diagonal.size(1) == 100 && result.lanczos.steps.min().item<int>() >= 10);
  // The same bits where the device decides when to stop: here a loop that stands for it.
  for (const int64_t every : {1, 4, 7}) {
    options.check_every = every;
    options.device_loop = [](const at::Tensor& flag, const std::function<void()>& body) {
      while (flag.item<bool>()) body();
    };
    const MinresResult on_device = minres(product, b, options);
    EXPECT(at::equal(on_device.x, result.x) && at::equal(on_device.iterations, result.iterations));
    EXPECT(at::equal(on_device.lanczos.diagonal, result.lanczos.diagonal));
  }
  EXPECT(throws_saying([&] { minres(nullptr, b); }, "minres: A must be callable, got an empty function"));
}

}  // namespace

int main() {
  at::manual_seed(0);
  return run_tests({{"steps", a_step_of_two_eigenvalues},
                    {"ends", products_that_end_a_row},
                    {"too long", no_step_to_an_x_that_rounding_drowns},
                    {"measurements", measurements},
                    {"units", a_unit_for_matrices_of_any_size},
                    {"solves", solves_indefinite_systems}});
}
