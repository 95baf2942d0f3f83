// The solver as a C++ user calls it: a std::function for H p, no Python anywhere.
#include <ATen/ATen.h>

#include <functional>
#include <vector>

#include "cg/row.h"
#include "cg/solver.h"
#include "check.h"

using namespace imaml_ext;

namespace {

// Random symmetric positive definite matrices [B, N, N] in float64, condition number about `condition`.
at::Tensor spd(int64_t rows, int64_t cols, double condition) {
  const auto wide = at::TensorOptions().dtype(at::kDouble);
  const auto q = std::get<0>(at::linalg_qr(at::randn({rows, cols, cols}, wide)));
  const auto spectrum = at::pow(condition, -at::rand({rows, 1, cols}, wide));
  return at::matmul(q * spectrum, q.transpose(1, 2));
}

RowOperator multiply(const at::Tensor& matrices) {
  return [matrices](const at::Tensor& p) { return at::matmul(matrices, p.unsqueeze(2)).squeeze(2); };
}

at::Tensor relative_residual(const at::Tensor& matrices, const at::Tensor& x, const at::Tensor& b) {
  return (b - multiply(matrices)(x)).norm(2, 1) / b.norm(2, 1);
}

void agrees_with_a_direct_solve() {
  for (const int64_t rows : {1, 2, 7}) {
    for (const int64_t cols : {1, 31, 130}) {
      const auto a = spd(rows, cols, 50.0);
      const auto b = at::randn({rows, cols}, a.options());
      CgOptions options;
      options.max_iterations = 4 * cols + 20;
      options.rtol = at::full({1}, 1e-11, a.options());
      options.check_every = 1;
      const CgResult result = cg(multiply(a), b, options);
      EXPECT(result.status.eq(kConverged).all().item<bool>());
      EXPECT(relative_residual(a, result.x, b).max().item<double>() <= 1e-11);
      const auto direct = at::linalg_solve(a, b.unsqueeze(2)).squeeze(2);
      EXPECT(at::allclose(result.x, direct, 1e-8, 1e-8));
      EXPECT(result.iterations.max().item<int>() <= cols + 10);
    }
  }
}

void shift_preconditioner_and_warm_start() {
  const int64_t rows = 3, cols = 40;
  const auto a = spd(rows, cols, 10.0);
  const auto b = at::randn({rows, cols}, a.options());
  const auto shift = at::rand({rows, cols}, a.options()) * 100;
  const auto shifted = a + at::diag_embed(shift);
  CgOptions options;
  options.shift = shift;
  options.max_iterations = 200;
  options.rtol = at::full({rows}, 1e-10, a.options());
  options.check_every = 1;
  const auto plain = cg(multiply(a), b, options);
  EXPECT(relative_residual(shifted, plain.x, b).max().item<double>() <= 1e-10);

  options.inverse_diagonal = 1.0 / shifted.diagonal(0, 1, 2).contiguous();
  const auto diagonal = cg(multiply(a), b, options);
  EXPECT(relative_residual(shifted, diagonal.x, b).max().item<double>() <= 1e-10);
  EXPECT(diagonal.iterations.lt(plain.iterations).all().item<bool>());

  const auto inverse_diagonal = options.inverse_diagonal;
  options.inverse_diagonal = at::Tensor();
  options.preconditioner = [&](const at::Tensor& r) { return inverse_diagonal * r; };
  const auto callable = cg(multiply(a), b, options);
  EXPECT(callable.iterations.equal(diagonal.iterations));
  EXPECT(at::allclose(callable.x, diagonal.x, 1e-12, 1e-12));

  options.preconditioner = nullptr;
  options.x0 = plain.x;
  const auto warm = cg(multiply(a), b, options);
  EXPECT(warm.iterations.eq(0).all().item<bool>());
  EXPECT(warm.x.equal(plain.x));
}

void rows_fail_alone() {
  const auto wide = at::TensorOptions().dtype(at::kDouble);
  auto diagonal = at::rand({6, 50}, wide) + 1.0;
  auto b = at::randn({6, 50}, wide);
  const auto healthy = cg([&](const at::Tensor& p) { return diagonal * p; }, b);
  auto broken = diagonal.clone();
  broken[1].fill_(-1.0);
  broken[3][7] = std::nan("");
  auto broken_b = b.clone();
  broken_b[4][0] = INFINITY;
  broken_b[5].zero_();
  const auto result = cg([&](const at::Tensor& p) { return broken * p; }, broken_b);
  EXPECT(result.status[1].item<int>() == kNegativeCurvature);
  EXPECT(result.status[3].item<int>() == kNonFinite);
  EXPECT(result.status[4].item<int>() == kNonFinite);
  EXPECT(result.status[5].item<int>() == kConverged && result.iterations[5].item<int>() == 0);
  EXPECT(result.x.isfinite().all().item<bool>());
  for (const int64_t row : {0, 2}) {
    EXPECT(result.x[row].equal(healthy.x[row]));
    EXPECT(result.status[row].equal(healthy.status[row]));
  }
}

void begins_with_b_and_leaves_it_alone() {
  const auto b = at::randn({3, 50}), before = b.clone();
  std::vector<const void*> seen;
  const RowOperator twice = [&](const at::Tensor& p) {
    seen.push_back(p.const_data_ptr());
    return 2 * p;
  };
  CgOptions options;
  options.max_iterations = 2;
  const auto from_nothing = cg(twice, b, options);
  EXPECT(seen.size() == 2 && seen[0] == b.const_data_ptr() && seen[1] != b.const_data_ptr());
  EXPECT(b.equal(before));
  options.x0 = at::zeros_like(b);
  EXPECT(cg(twice, b, options).x.equal(from_nothing.x));
}

void calls_exactly_as_often_as_it_says() {
  const auto b = at::randn({4, 9});
  int calls = 0;
  const RowOperator identity = [&](const at::Tensor& p) {
    ++calls;
    return p;
  };
  CgOptions options;
  options.max_iterations = 6;
  cg(identity, b, options);
  EXPECT(calls == 6);
  calls = 0;
  options.check_every = 2;
  const auto result = cg(identity, b, options);
  EXPECT(calls == 2 && result.iterations.eq(1).all().item<bool>() && at::allclose(result.x, b));
  calls = 0;
  options.max_iterations = 0;
  EXPECT(cg(identity, b, options).status.eq(kMaxIterations).all().item<bool>() && calls == 0);
}

void blocks_of_rows_have_the_bits_of_the_batch() {
  auto d = at::rand({7, 300}) + 0.1;
  const auto b = at::randn({7, 300});
  d[2].fill_(-3.0);
  CgOptions options;
  options.shift = at::rand({7, 1});
  options.x0 = at::randn_like(b);
  options.inverse_diagonal = at::rand({1, 300}) + 0.5;
  const auto together = cg([&](const at::Tensor& p) { return d * p; }, b, options);
  EXPECT(together.status[2].item<int>() == kNegativeCurvature);
  for (const int64_t size : {1, 2, 5, 7, 9}) {
    options.rows_per_block = size;
    int64_t next = 0;
    const auto apart = cg(
        [&](const at::Tensor& p, RowRange rows) {
          EXPECT(rows.first == next || rows.last == next);
          next = rows.last;
          return d.narrow(0, rows.first, rows.count()) * p;
        },
        b, options);
    EXPECT(next == 7);
    EXPECT(apart.x.equal(together.x) && apart.status.equal(together.status));
    EXPECT(apart.iterations.equal(together.iterations) && apart.residual_norm.equal(together.residual_norm));
  }
}

void bad_arguments_are_named() {
  const auto b = at::randn({2, 3});
  const RowOperator identity = [](const at::Tensor& p) { return p; };
  EXPECT(throws_saying([&] { cg(nullptr, b); }, "A must be callable"));
  EXPECT(throws_saying([&] { cg(identity, b[0]); }, "b must have shape [B, N]"));
  EXPECT(throws_saying([&] { cg(identity, b.to(at::kInt)); }, "b must be float32"));
  EXPECT(throws_saying([&] { cg([](const at::Tensor& p) { return p[0]; }, b); },
                       "what A returns must have the shape of b"));
  EXPECT(throws_saying([&] { cg([](const at::Tensor&) { return at::Tensor(); }, b); }, "A returned no tensor"));
  CgOptions options;
  options.max_iterations = -1;
  EXPECT(throws_saying([&] { cg(identity, b, options); }, "max_iterations must be at least 0"));
  EXPECT(throws_saying([&] { cg(std::function<at::Tensor(const at::Tensor&)>(), b); }, "A must be callable"));
  options = {};
  options.rows_per_block = -1;
  EXPECT(throws_saying([&] { cg(identity, b, options); }, "rows_per_block must be at least 0"));
  options = {};
  options.shift = at::zeros({3, 3});
  EXPECT(throws_saying([&] { cg(identity, b, options); }, "shift must have shape"));
  options = {};
  options.x0 = at::zeros({2, 3}, at::kDouble);
  EXPECT(throws_saying([&] { cg(identity, b, options); }, "x0 must have the dtype of b"));
  EXPECT(
      throws_saying([&] { cg([](const at::Tensor&) -> at::Tensor { throw std::runtime_error("mine"); }, b); }, "mine"));
}

void keeps_lanczos_coefficients_and_shifted_systems() {
  const auto a = spd(2, 6, 10.0);
  const auto b = at::randn({2, 6}, a.options());
  CgOptions options;
  options.max_iterations = 40;
  options.rtol = at::full({1}, 1e-12, a.options());
  options.lanczos = true;
  options.shifts = at::tensor({0.0, 0.5, 2.0}, a.options()).expand({2, 3}).contiguous();
  const CgResult result = cg(multiply(a), b, options);
  for (int64_t j = 0; j < 3; ++j) {
    const auto x = result.shifted->x.select(1, j);
    const auto residual = relative_residual(a + options.shifts[0][j] * at::eye(6, a.options()), x, b);
    EXPECT(residual.max().item<double>() <= 1e-10);
  }
  // T_00 = bᵀ A b / bᵀ b
  const auto rayleigh = (b * multiply(a)(b)).sum(1) / (b * b).sum(1);
  EXPECT(at::allclose(result.lanczos->diagonal.select(1, 0), rayleigh, 1e-10, 0.0));
  EXPECT(result.lanczos->steps.gt(0).logical_and(result.lanczos->steps.le(result.iterations)).all().item<bool>());
  options.x0 = b;
  EXPECT(throws_saying([&] { cg(multiply(a), b, options); }, "shifts must come without x0"));
  options.x0.reset();
  options.check_every = 1;
  options.device_loop = [](const at::Tensor&, const std::function<void()>&) {};
  EXPECT(throws_saying([&] { cg(multiply(a), b, options); }, "check_every must be 0 inside a CUDA graph"));
}

}  // namespace

int main() {
  at::manual_seed(20191909);
  return run_tests(
      {{"agrees_with_a_direct_solve", agrees_with_a_direct_solve},
       {"shift_preconditioner_and_warm_start", shift_preconditioner_and_warm_start},
       {"rows_fail_alone", rows_fail_alone},
       {"begins_with_b_and_leaves_it_alone", begins_with_b_and_leaves_it_alone},
       {"calls_exactly_as_often_as_it_says", calls_exactly_as_often_as_it_says},
       {"blocks_of_rows_have_the_bits_of_the_batch", blocks_of_rows_have_the_bits_of_the_batch},
       {"bad_arguments_are_named", bad_arguments_are_named},
       {"keeps_lanczos_coefficients_and_shifted_systems", keeps_lanczos_coefficients_and_shifted_systems}});
}
